"""A web server that means harm: each path is one way to hold, fill or fool whoever fetches it.

`CASES` says for each path how the fetch of it has to end. `Site` also serves what a test says.
"""

from __future__ import annotations

import gzip
import io
import itertools
import os
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from PIL import Image

from pipeline.config import DownloadConfig
from pipeline.curation.fetching.fetch import Fetcher

Answer = Callable[[BaseHTTPRequestHandler], None]


class Site:
    """A server on loopback whose paths answer as a test says; it notes what it was asked."""

    def __init__(self, answers: dict[str, Answer] | None = None, port: int = 0) -> None:
        self.answers: dict[str, Answer] = dict(answers or {})
        self.seen: list[str] = []
        self.agents: list[str] = []
        self.accepted = 0
        """Connections."""
        self.lock = threading.Lock()
        site = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_GET(self) -> None:
                with site.lock:
                    site.seen.append(self.path)
                    site.agents.append(self.headers["User-Agent"])
                site.answers.get(self.path, says(404))(self)

            def log_message(self, format: str, *args: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 256

            def get_request(self) -> tuple[socket.socket, object]:
                request = super().get_request()
                site.accepted += 1
                return request

            def handle_error(self, request: object, client_address: object) -> None:
                pass  # clients that leave are what this is about

        self.server = Server(("127.0.0.1", port), Handler)
        self.port = self.server.server_address[1]
        self.host = f"127.0.0.1:{self.port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def url(self, path: str) -> str:
        return f"http://{self.host}{path}"

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


def says(status: int, body: bytes = b"", **headers: str) -> Answer:
    """A sound response; `Content_Length` and whatever else is named may make it less so."""

    def answer(request: BaseHTTPRequestHandler) -> None:
        request.send_response(status)
        for name, value in {"Content_Length": str(len(body)), **headers}.items():
            request.send_header(name.replace("_", "-"), value)
        request.end_headers()
        request.wfile.write(body)

    return answer


def raw(*parts: bytes, then: Iterable[bytes] = ()) -> Answer:
    """Bytes as they are, and then the end of the connection."""

    def answer(request: BaseHTTPRequestHandler) -> None:
        request.close_connection = True
        for part in itertools.chain(parts, then):
            request.wfile.write(part)

    return answer


def drip(head: bytes, pause_s: float = 0.05) -> Answer:
    """A byte now and then: within any time-out of a single read, and without an end."""

    def answer(request: BaseHTTPRequestHandler) -> None:
        request.close_connection = True
        request.wfile.write(head)
        while True:
            time.sleep(pause_s)
            request.wfile.write(b"x")

    return answer


def silence(request: BaseHTTPRequestHandler) -> None:
    """No answer, until the client leaves."""
    request.close_connection = True
    request.connection.recv(1)


def reset(request: BaseHTTPRequestHandler) -> None:
    request.close_connection = True
    request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    request.connection.close()


def zeros(size: int) -> bytes:
    """`size` zeros as a raw deflate stream of a thousandth of it: one megabyte, repeated."""
    whole, rest = divmod(size, 1 << 20)
    pack, last = zlib.compressobj(9, wbits=-15), zlib.compressobj(9, wbits=-15)
    megabyte = pack.compress(bytes(1 << 20)) + pack.flush(zlib.Z_FULL_FLUSH)
    return megabyte * whole + last.compress(bytes(rest)) + last.flush()


def black_png(side: int) -> bytes:
    """A sound PNG of side x side black pixels: what decodes it, has them all."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + checksum

    size = side * (1 + 3 * side)  # a filter byte and three channels a row
    adler32 = struct.pack(">HH", size % 65521, 1)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", b"\x78\xda" + zeros(size) + adler32)
        + chunk(b"IEND", b"")
    )


def encoded(kind: str, side: int = 64) -> bytes:
    """A sound image of noise."""
    out = io.BytesIO()
    Image.frombytes("RGB", (side, side), os.urandom(3 * side * side)).save(out, kind, quality=100)
    return out.getvalue()


def progressive(side: int) -> bytes:
    """A sound JPEG that libjpeg holds whole, as coefficients, before it gives a pixel."""
    out = io.BytesIO()
    image = Image.new("RGB", (side, side), (200, 30, 30))
    image.save(out, "JPEG", progressive=True, subsampling=0)
    return out.getvalue()


def scan_bomb(side: int, scans: int) -> bytes:
    """A progressive JPEG that repeats its first scan: each one more walk over all its blocks."""
    out = io.BytesIO()
    Image.new("RGB", (side, side), (200, 30, 30)).save(out, "JPEG", progressive=True)
    body = out.getvalue()
    first = body.index(b"\xff\xda")
    second = min(body.index(marker, first + 2) for marker in (b"\xff\xda", b"\xff\xc4"))
    return body[:first] + body[first:second] * scans + body[second:]


@dataclass(frozen=True)
class Case:
    """How a path answers, and how the fetch of it ends: "ok", or a cause."""

    answer: Answer
    cause: str
    transient: bool = False
    rule: bool = False
    image: str = ""
    """How the download of it ends, where the fetch is "ok"."""


_OK = b"HTTP/1.1 200 OK\r\n"
_CHUNKED = _OK + b"Transfer-Encoding: chunked\r\n\r\n"
_ZEROS = bytes(1 << 16)
_INSIDE = {
    "metadata": "http://169.254.169.254/latest/meta-data/",
    "loopback": "http://127.0.0.1:1/",
    "ipv6-loopback": "http://[::1]/",
    "ipv6-mapped": "http://[::ffff:127.0.0.1]/",
    "ipv6-mapped-hex": "http://[::ffff:7f00:1]/",
    "nat64": "http://[64:ff9b::a9fe:a9fe]/",
    "6to4": "http://[2002:7f00:1::]/",
    "zero": "http://0/",
    "decimal": "http://2130706433/",
    "octal": "http://0177.0.0.1/",
    "hex": "http://0x7f000001/",
    "short": "http://127.1/",
    "private": "http://10.0.0.1/",
    "name": "http://localhost/",
    "scheme-relative": "//127.0.0.1:1/",
}


def _gzip_of(body: bytes, encoding: str = "gzip", **headers: str) -> Answer:
    return says(200, body, Content_Encoding=encoding, **headers)


def _cases() -> dict[str, Case]:
    png, jpeg = encoded("PNG"), encoded("JPEG")
    forever = itertools.repeat
    bomb = gzip.compress(b"")[:10] + zeros(4 << 30)
    noise = b"\x00\xff\r\n" + os.urandom(1 << 14)
    cases = {
        # --- time ---
        "/silence": Case(silence, "timeout", transient=True),
        "/drip-status": Case(drip(b"HTTP/1.1 200 O"), "timeout", transient=True),
        "/drip-head": Case(drip(_OK + b"X-Slow: "), "timeout", transient=True),
        "/drip-body": Case(drip(_OK + b"Content-Length: 9999\r\n\r\n"), "timeout", transient=True),
        "/drip-error": Case(drip(b"HTTP/1.1 404 No\r\nContent-Length: 99\r\n\r\n"), "http_404"),
        # --- size ---
        "/huge-promised": Case(says(200, Content_Length=str(10**12)), "too_large", rule=True),
        "/endless": Case(raw(_OK + b"\r\n", then=forever(_ZEROS)), "too_large", rule=True),
        "/endless-chunks": Case(
            raw(_CHUNKED, then=forever(b"10000\r\n" + _ZEROS + b"\r\n")), "too_large", rule=True
        ),
        "/gzip-bomb": Case(_gzip_of(bomb), "too_large", rule=True),
        # --- redirects ---
        "/loop": Case(says(302, Location="/loop"), "too_many_redirects"),
        "/ring-a": Case(says(301, Location="/ring-b"), "too_many_redirects"),
        "/ring-b": Case(says(308, Location="/ring-a"), "too_many_redirects"),
        "/to-file": Case(says(302, Location="file:///etc/passwd"), "forbidden_scheme", rule=True),
        "/to-gopher": Case(says(302, Location="gopher://a/"), "forbidden_scheme", rule=True),
        "/to-nowhere": Case(says(302, Location="http://[::1/"), "bad_url"),
        "/to-nothing": Case(says(302), "http_302"),
        # --- lengths ---
        "/too-long": Case(raw(_OK + b"Content-Length: %d\r\n\r\n" % len(png), png, png), "ok"),
        "/too-short": Case(raw(_OK + b"Content-Length: 99\r\n\r\nx"), "incomplete", transient=True),
        "/short-chunks": Case(raw(_CHUNKED + b"5\r\nabc"), "incomplete", transient=True),
        "/negative": Case(says(200, Content_Length="-5"), "bad_response"),
        "/no-number": Case(says(200, Content_Length="many"), "bad_response"),
        "/absurd-length": Case(says(200, Content_Length="9" * 40), "bad_response"),
        "/two-lengths": Case(
            raw(_OK + b"Content-Length: 3\r\nContent-Length: 5\r\n\r\nabcde"), "bad_response"
        ),
        "/chunks-and-length": Case(
            raw(
                _OK + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n",
                b"%x\r\n" % len(png) + png + b"\r\n0\r\n\r\n",
            ),
            "ok",
        ),
        # --- "not now" ---
        "/busy-seconds": Case(says(429, Retry_After="3600"), "http_429", transient=True),
        "/busy-date": Case(
            says(429, Retry_After="Fri, 31 Dec 2999 23:59:59 GMT"), "http_429", transient=True
        ),
        "/busy-absurd": Case(says(429, Retry_After="9" * 400), "http_429", transient=True),
        "/busy-negative": Case(says(429, Retry_After="-5"), "http_429", transient=True),
        "/busy-words": Case(says(503, Retry_After="soon \xb2"), "http_503", transient=True),
        # --- heads ---
        "/endless-headers": Case(raw(_OK, then=forever(b"X-A: b\r\n" * 500)), "bad_response"),
        "/endless-header": Case(raw(_OK + b"X-A: ", then=forever(b"a" * 4096)), "bad_response"),
        "/folded-header": Case(raw(_OK + b"X-A: b\r\n", then=forever(b" c\r\n")), "bad_response"),
        "/interim-flood": Case(
            raw(then=forever(b"HTTP/1.1 100 Continue\r\n\r\n" * 50)), "bad_response"
        ),
        "/hints-flood": Case(
            raw(then=forever(b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n")), "bad_response"
        ),
        "/upgrade": Case(raw(b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\n\r\n"), "bad_response"),
        "/ssh": Case(raw(b"SSH-2.0-OpenSSH_9.6\r\n"), "bad_response"),
        "/http-0.9": Case(raw(png), "bad_response"),
        "/nul": Case(raw(_OK + b"X-A: \x00\r\n\r\n"), "bad_response"),
        # --- bodies ---
        "/garbage-chunks": Case(raw(_CHUNKED, noise), "bad_response"),
        "/no-chunk": Case(raw(_CHUNKED + b"many\r\nbytes\r\n"), "bad_response"),
        "/long-chunk-line": Case(raw(_CHUNKED + b"5;", then=forever(b"x" * 512)), "bad_response"),
        "/crumbs": Case(raw(_CHUNKED, then=forever(b"1\r\nx\r\n" * 500)), "bad_response"),
        "/endless-trailers": Case(
            raw(_CHUNKED + b"3\r\nabc\r\n0\r\n", then=forever(b"X-A: b\r\n" * 500)), "bad_response"
        ),
        "/odd-coding": Case(
            raw(_OK + b"Transfer-Encoding: gzip\r\n\r\n" + gzip.compress(png)), "bad_response"
        ),
        "/hang-up": Case(raw(), "connection", transient=True),
        "/reset": Case(reset, "connection", transient=True),
        "/empty": Case(says(200), "empty"),
        "/empty-chunks": Case(raw(_CHUNKED + b"0\r\n\r\n"), "empty"),
        # --- encodings ---
        "/gzip": Case(_gzip_of(gzip.compress(png)), "ok"),
        "/deflate": Case(_gzip_of(zlib.compress(png), "deflate"), "ok"),
        "/raw-deflate": Case(_gzip_of(zlib.compress(png, wbits=-15), "deflate"), "ok"),
        "/br": Case(_gzip_of(b"brotli", "br"), "bad_encoding"),
        "/zstd": Case(_gzip_of(b"\x28\xb5\x2f\xfd", "zstd"), "bad_encoding"),
        "/gzip-twice": Case(_gzip_of(gzip.compress(gzip.compress(png)), "gzip, gzip"),
                            "bad_encoding"),
        "/gzip-not": Case(_gzip_of(png), "bad_encoding"),
        "/gzip-short": Case(_gzip_of(gzip.compress(png)[:-200]), "bad_encoding"),
        # --- statuses ---
        "/no-content": Case(says(204), "http_204"),
        "/part": Case(says(206, png), "http_206"),
        "/denied": Case(says(403, b"no"), "http_403"),
        "/not-made": Case(says(501), "http_501"),
        "/cloud": Case(says(522), "http_522", transient=True),
        "/broken": Case(says(500), "http_500", transient=True),
        "/made-up": Case(says(999), "http_999"),
        "/opted-out": Case(says(200, png, X_Robots_Tag="noml"), "opted_out", rule=True),
        # --- images ---
        "/sound.png": Case(says(200, png), "ok"),
        "/pixels.png": Case(says(200, black_png(30_000)), "ok", image="too_many_pixels"),
        "/scans.jpg": Case(says(200, scan_bomb(512, 5000)), "ok", image="too_many_scans"),
        "/cut.jpg": Case(says(200, jpeg[: len(jpeg) // 2]), "ok", image="truncated"),
        "/html.jpg": Case(says(200, b"<html>" * 99, Content_Type="image/jpeg"), "ok",
                          image="not_an_image"),
        "/large.jpg": Case(says(200, encoded("JPEG", 3000)), "ok"),
        "/middling.jpg": Case(says(200, encoded("JPEG", 1400)), "ok"),
        "/progressive.jpg": Case(says(200, progressive(7000)), "ok"),
        "/noise.jpg": Case(says(200, os.urandom(19 << 20)), "ok", image="not_an_image"),
    }  # fmt: skip
    for name, inside in _INSIDE.items():
        cases[f"/inside-{name}"] = Case(says(302, Location=inside), "forbidden_address", rule=True)
    return cases


class HostileSite(Site):
    """Serves every path of its `cases`."""

    def __init__(self) -> None:
        self.cases = _cases()
        super().__init__({path: case.answer for path, case in self.cases.items()})


def fetcher(site: Site, **settings: object) -> Fetcher:
    """One that may fetch from `site`, tries once and does not sleep."""
    cfg = DownloadConfig(timeout_s=30.0, retries=0, allow_private_hosts=[site.host])
    return Fetcher(replace(cfg, **settings), sleep=lambda seconds: None)
