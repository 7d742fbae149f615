"""The server of the mini world's web: images drawn as they are asked for, and the web's faults.

Every path is a link of links.py, which says what becomes of a request. The one thing remembered is
who was told to wait (429), and which jobs hold the site.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import struct
import threading
import time
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

from PIL import Image

from pipeline.miniworld import links, world
from pipeline.miniworld.links import Link, link

HOST = "127.0.0.1"

_SLOW_S = 0.3
_DRAWN_SIDE = 64  # pixels
_STALL_S = 60.0
_HTML = (
    b"<!doctype html><html><head><title>Sign in</title></head><body>Please sign in.</body></html>"
)
# EXIF orientation -> how the stored picture is turned against the upright one
_TURNS = {
    3: Image.Transpose.ROTATE_180,
    6: Image.Transpose.ROTATE_90,
    8: Image.Transpose.ROTATE_270,
}


def picture(item: Link) -> bytes:
    """The encoded image of an alive link, as its server sends it."""
    scene = world.scene(item.scene_seed, "train")
    # Drawn small and enlarged: a quarter of the time, and the pipeline stores smaller ones anyway.
    shrink = min(1.0, _DRAWN_SIDE / min(item.width, item.height))
    size = (round(item.width * shrink), round(item.height * shrink))
    image = Image.fromarray(world.render(scene, size))
    image = image.resize((item.width, item.height), Image.Resampling.BICUBIC)
    out = io.BytesIO()
    if item.format == "JPEG":
        exif = Image.Exif()
        if item.orientation in _TURNS:
            image = image.transpose(_TURNS[item.orientation])
            exif[0x0112] = item.orientation
        image.save(out, "JPEG", quality=92, exif=exif)
    elif item.format == "PNG":
        image = image.quantize(128) if item.mode == "P" else image.convert(item.mode)
        image.save(out, "PNG", compress_level=1)
    else:
        image.save(out, item.format, quality=92, method=0)
    return out.getvalue()


@functools.cache
def world_version() -> str:
    """Which world this code serves: pictures and fates are functions of these sources."""
    digest = hashlib.sha256()
    for source in (world.__file__, links.__file__, __file__):
        digest.update(Path(str(source)).read_bytes())
    return digest.hexdigest()[:16]


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256
    # SO_REUSEADDR would let two sites share a port on some systems, but without it a site that
    # was just stopped blocks its own port for a minute.
    allow_reuse_address = True

    def __init__(self, address: tuple[str, int], handler: type[Handler]) -> None:
        super().__init__(address, handler)
        self.told_to_wait: set[str] = set()
        self.holders = 0
        self.lock = threading.Lock()

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # clients that leave early are part of this web


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body are two writes
    server: Server

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        if url.path == "/about":
            about = json.dumps({"world": world_version()}).encode()
            return self._send(200, about, "application/json")
        if url.path == "/hold":
            return self._hold()
        item = _item(url.path)
        if item is None:
            return self._send(404, b"no such page", "text/plain")
        if item.fate == "moved" and url.query == "moved":
            return self._image(item)
        getattr(self, f"_{item.fate}", self._image)(item)

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _hold(self) -> None:
        """A job uses the site for as long as this connection is open."""
        self.close_connection = True
        with self.server.lock:
            self.server.holders += 1
        try:
            self._head(200, "text/plain", {})
            self.rfile.read(1)
        finally:
            with self.server.lock:
                self.server.holders -= 1

    # --- fates; "ok" is _image ---

    def _image(self, item: Link) -> None:
        self._send(200, picture(item), f"image/{item.format.lower()}")

    def _tiny(self, item: Link) -> None:
        self._image(item)

    def _slow(self, item: Link) -> None:
        time.sleep(_SLOW_S)
        self._image(item)

    def _busy_once(self, item: Link) -> None:
        if item.path in self.server.told_to_wait:
            self.server.told_to_wait.discard(item.path)
            return self._image(item)
        self.server.told_to_wait.add(item.path)
        self._send(429, b"busy", "text/plain", {"Retry-After": "1"})

    def _moved(self, item: Link) -> None:
        self._send(302, b"", "text/plain", {"Location": f"{item.path}?moved"})

    def _moved_inside(self, item: Link) -> None:
        inside = ("http://169.254.169.254/latest/meta-data/", f"http://{HOST}:1/admin.png")
        self._send(302, b"", "text/plain", {"Location": inside[item.index % 2]})

    def _gone_404(self, item: Link) -> None:
        self._send(404, _HTML, "text/html")

    def _gone_410(self, item: Link) -> None:
        self._send(410, b"gone", "text/plain")

    def _denied_403(self, item: Link) -> None:
        self._send(403, b"hotlinking is not allowed", "text/plain")

    def _down_503(self, item: Link) -> None:
        self._send(503, b"down", "text/plain")

    def _truncated(self, item: Link) -> None:
        data = picture(item)
        self._send(200, data[: int(len(data) * 0.55)], "image/jpeg")

    def _html(self, item: Link) -> None:
        self._send(200, _HTML, "image/jpeg")

    def _empty(self, item: Link) -> None:
        self._send(200, b"", "image/jpeg")

    def _opted_out(self, item: Link) -> None:
        said = ("noai", "noimageai, noindex", "noindex")[item.index % 3]
        self._send(200, picture(item), "image/jpeg", {"X-Robots-Tag": said})

    def _bomb(self, item: Link) -> None:
        self._send(200, huge_png(30_000), "image/png")

    def _endless(self, item: Link) -> None:
        self._head(200, "image/jpeg", {"Content-Length": str(3 << 30)})
        block = picture(item) + bytes(1 << 16)
        for _ in range(1 << 12):
            self.wfile.write(block)

    def _stalled(self, item: Link) -> None:
        data = picture(item)
        self._head(200, "image/jpeg", {"Content-Length": str(len(data))})
        until = time.monotonic() + _STALL_S
        for byte in data:
            if time.monotonic() > until:
                break
            self.wfile.write(bytes([byte]))
            time.sleep(0.25)
        self.close_connection = True

    # --- plumbing ---

    def _send(
        self, status: int, body: bytes, kind: str, headers: dict[str, str] | None = None
    ) -> None:
        self._head(status, kind, {"Content-Length": str(len(body)), **(headers or {})})
        self.wfile.write(body)

    def _head(self, status: int, kind: str, headers: dict[str, str]) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()


def huge_png(side: int) -> bytes:
    """A PNG of a few hundred bytes whose header promises side x side pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checked = kind + data
        return struct.pack(">I", len(data)) + checked + struct.pack(">I", zlib.crc32(checked))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    body = zlib.compress(bytes(1 << 16))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    )


def _item(path: str) -> Link | None:
    parts = path.strip("/").split("/")
    if len(parts) != 2 or not parts[0].isdigit() or len(path) > 64:
        return None
    stem = parts[1].partition(".")[0]
    item = link(int(parts[0]), int(stem)) if stem.isdigit() else None
    return item if item is not None and item.path == path else None
