"""The mini world's web site: LAION-like metadata, and its images over real HTTP on loopback.

Run by itself, it serves until interrupted:

    python -m pipeline.miniworld.website --metadata web/metadata
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import http.client
import io
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

from PIL import Image

from pipeline.config import WebsiteConfig
from pipeline.errors import UserError
from pipeline.miniworld import links, world
from pipeline.miniworld.links import Link, link
from pipeline.storage import Storage

HOST = "127.0.0.1"
METADATA = "web/metadata"
"""Folder of the metadata under a root."""

_ABOUT = "web/site.json"
_DONE = b"done"
_START_S = 60.0  # a loaded machine imports slowly
_LINGER_S = 10.0  # workers of a killed job must not find their web gone and count that as rot
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


@dataclass(frozen=True)
class Site:
    """A running web site: its address as "host:port", and where its metadata lies."""

    host: str
    metadata: str


@contextlib.contextmanager
def ensure(cfg: WebsiteConfig, storage: Storage) -> Iterator[Site]:
    """Have the site running and its metadata under `storage` for the time of the context.

    A site that runs already is used if it serves the same world; otherwise a process is started.
    It leaves when the last job that uses it has gone, killed ones included. Raises UserError where
    another program holds the port.
    """
    publish_metadata(cfg, storage)
    process, hold = _attach(cfg.port)
    try:
        yield Site(f"{HOST}:{cfg.port}", storage.url(METADATA))
    finally:
        hold.close()
        if process is not None:
            _dismiss(process)


def publish_metadata(cfg: WebsiteConfig, storage: Storage) -> None:
    """Write the metadata of this configuration under `storage`, unless it is there already."""
    about = {"world": _world(), "port": cfg.port, "rows": cfg.rows, "seed": cfg.seed}
    if storage.exists(_ABOUT) and storage.read_json(_ABOUT) == about:
        return
    storage.delete(METADATA)
    links.write_metadata(storage, METADATA, f"http://{HOST}:{cfg.port}", cfg.rows, cfg.seed)
    storage.write_json(_ABOUT, about)


def serve(port: int) -> _Server:
    """A bound server on loopback; `serve_forever()` runs it. Port 0 takes a free one."""
    try:
        return _Server((HOST, port), _Handler)
    except OSError as error:
        raise UserError(_taken(port)) from error


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


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256
    # SO_REUSEADDR would let two sites share a port on some systems, but without it a site that
    # was just stopped blocks its own port for a minute.
    allow_reuse_address = True

    def __init__(self, address: tuple[str, int], handler: type[_Handler]) -> None:
        super().__init__(address, handler)
        self.told_to_wait: set[str] = set()
        self.holders = 0
        self.lock = threading.Lock()

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # clients that leave early are part of this web


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body are two writes
    server: _Server

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        if url.path == "/about":
            return self._send(200, json.dumps({"world": _world()}).encode(), "application/json")
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


def _world() -> str:
    """Which world this code serves: pictures and fates are functions of these sources."""
    digest = hashlib.sha256()
    for module in (world, links):
        digest.update(Path(str(module.__file__)).read_bytes())
    return digest.hexdigest()[:16]


def _serves_this_world(port: int) -> bool:
    """Whether this world's site answers on `port`; UserError if something else does."""
    try:
        with socket.create_connection((HOST, port), timeout=5.0):
            pass
    except OSError:
        return False  # nobody there
    try:
        connection = http.client.HTTPConnection(HOST, port, timeout=5.0)
        connection.request("GET", "/about", headers={"Connection": "close"})
        about = json.loads(connection.getresponse().read(10_000))
        connection.close()
    except (OSError, ValueError, http.client.HTTPException):
        raise UserError(_taken(port)) from None
    if not isinstance(about, dict) or "world" not in about:
        raise UserError(_taken(port))
    if about["world"] != _world():
        raise UserError(
            f"port {port} on {HOST} serves another version of the mini world; stop that site, or "
            "choose another port with --website.port"
        )
    return True


def _taken(port: int) -> str:
    return (
        f"port {port} on {HOST} is taken by another program; free it, or choose another port with "
        "--website.port"
    )


def _attach(port: int) -> tuple[subprocess.Popen[bytes] | None, socket.socket]:
    """Find or start the site; the process if it is ours, and the connection that holds it."""
    for _ in range(3):  # a site that was found may be about to leave
        process = None if _serves_this_world(port) else _start(port)
        hold = socket.create_connection((HOST, port), timeout=_START_S)
        with contextlib.suppress(OSError):
            hold.sendall(b"GET /hold HTTP/1.0\r\n\r\n")
            if hold.recv(64).startswith(b"HTTP/1.1 200"):
                return process, hold
        hold.close()
    raise UserError(
        f"the mini world's web site on port {port} does not stay; stop it and run again"
    )


def _start(port: int) -> subprocess.Popen[bytes]:
    """Start the site as a process and wait until it answers."""
    environment = dict(os.environ)
    package_root = str(Path(__file__).resolve().parents[2])
    paths = [package_root, environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    module = "pipeline.miniworld.website"
    # Its stdin is a pipe from us: however we end, it reads the end. A session of its own, as Ctrl-C
    # is for the job: units in flight still need the site.
    process = subprocess.Popen(
        [sys.executable, "-m", module, f"--port={port}", "--until-stdin-closes"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=environment,
        start_new_session=True,
    )
    until = time.monotonic() + _START_S
    while time.monotonic() < until:
        if process.poll() is not None:
            if _serves_this_world(port):
                return process  # another job was faster to start the same site
            said = (process.stderr.read() if process.stderr else b"").decode(errors="replace")
            last = said.strip().rpartition("\n")[2]
            raise UserError(last or f"the mini world's web site did not start on port {port}")
        with contextlib.suppress(OSError), socket.create_connection((HOST, port), timeout=1.0):
            if _serves_this_world(port):
                return process
        time.sleep(0.05)
    process.kill()
    raise UserError(f"the mini world's web site did not answer on port {port} in {_START_S:.0f} s")


def _dismiss(process: subprocess.Popen[bytes]) -> None:
    """Tell the site that we are done: it leaves at once, or with the last other job."""
    with contextlib.suppress(subprocess.TimeoutExpired, OSError):
        process.communicate(_DONE, timeout=2.0)


def _leave_when_unused(server: _Server) -> None:
    """Wait for the end of stdin, then for the last holder, then end the process."""
    linger = 0.0 if sys.stdin.buffer.read() == _DONE else _LINGER_S
    idle_since = time.monotonic()
    while time.monotonic() - idle_since < linger or server.holders:
        if server.holders:
            idle_since = time.monotonic()
        time.sleep(0.05)
    os._exit(0)


def main(argv: list[str] | None = None) -> int:
    default = WebsiteConfig()
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.miniworld.website",
        description="Serve the mini world's images on loopback until interrupted.",
    )
    parser.add_argument(
        "--port", type=int, default=default.port, help="TCP port on 127.0.0.1 (%(default)s)"
    )
    parser.add_argument(
        "--metadata", help="first write the Parquet metadata below this root, under " + METADATA
    )
    parser.add_argument(
        "--rows", type=int, default=default.rows, help="metadata rows (%(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=default.seed, help="seed of rows, scores, faults (%(default)s)"
    )
    parser.add_argument("--until-stdin-closes", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    try:
        server = serve(args.port)
        if args.metadata:
            cfg = WebsiteConfig(port=args.port, rows=args.rows, seed=args.seed)
            publish_metadata(cfg, Storage(args.metadata))
            print(f"metadata: {Storage(args.metadata).url(METADATA)}")
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    for number in (signal.SIGTERM, signal.SIGINT):
        # a plain exit: requests in flight are nobody's loss
        signal.signal(number, lambda *_: os._exit(0))
    if args.until_stdin_closes:
        threading.Thread(target=_leave_when_unused, args=(server,), daemon=True).start()
    else:
        print(
            f"serving the mini world on http://{HOST}:{server.server_address[1]} (Ctrl-C stops)",
            flush=True,
        )
    server.serve_forever()
    return 0


if __name__ == "__main__":
    sys.exit(main())
