"""A proxy on loopback in front of an S3 server, with the faults of real stores and real lines."""

from __future__ import annotations

import contextlib
import http.client
import random
import socket
import ssl
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import trustme

_ERROR = (
    '<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{0}</Code><Message>{0}</Message></Error>'
)


@dataclass
class Fault:
    """What becomes of some requests.

    `kind`: an HTTP status, with `code` as S3's error code ("200" is an error inside a success);
    reset (before the answer), lost (the request is done, its answer is not sent), cut (half the
    body, then a reset), short (half the body, then a plain end), stall (silence, then the end).
    """

    kind: str
    code: str = ""
    methods: str = "GET HEAD PUT POST DELETE"
    path: str = ""
    """Part of the path and query of the requests that are meant."""
    header: str = ""
    """Only requests with this header."""
    times: int = 1 << 30
    """The first so many requests."""
    share: float = 1.0
    """Of these, a seeded share."""
    seconds: float = 0.0
    """Silence of a stall."""
    body: str = ""
    """What is answered, in place of S3's error with `code`."""
    met: int = 0
    """Requests that met it."""


class FaultyS3(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def __init__(self, upstream: str, seed: int, certificate: trustme.LeafCert | None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.scheme = "http"
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            certificate.configure_cert(context)
            self.socket = context.wrap_socket(self.socket, server_side=True)
            self.scheme = "https"
        self.upstream = urlsplit(upstream).netloc
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        """Method, path and query of every request, in order."""
        self.refused: list[str] = []
        """The same of those that the store answered with 403."""
        self.random, self.lock = random.Random(seed), threading.Lock()

    @property
    def url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.server_address[1]}"

    def fault(self, method: str, path: str, headers: http.client.HTTPMessage) -> Fault | None:
        with self.lock:
            self.requests.append(f"{method} {path}")
            for fault in self.faults:
                meant = method in fault.methods.split() and fault.path in path
                if (
                    not meant
                    or fault.met >= fault.times
                    or (fault.header not in headers and fault.header)
                ):
                    continue
                if self.random.random() < fault.share:
                    fault.met += 1
                    return fault
        return None

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # broken lines are what it is for


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: FaultyS3

    def _any(self) -> None:
        body = self._body()
        fault = self.server.fault(self.command, self.path, self.headers)
        kind = fault.kind if fault else ""
        if kind == "stall":
            assert fault is not None
            time.sleep(fault.seconds)
            return self._reset()
        if kind == "reset":
            return self._reset()
        if fault and kind.isdigit():
            return self._answer(int(kind), {}, (fault.body or _ERROR.format(fault.code)).encode())
        status, headers, data = self._forward(body)
        if status == 403:
            with self.server.lock:
                self.server.refused.append(f"{self.command} {self.path}")
        if kind == "lost":
            return self._reset()
        if kind in ("cut", "short"):
            self._answer(status, headers, data, sent=len(data) // 2)
            return self._reset() if kind == "cut" else None
        self._answer(status, headers, data)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _any

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _body(self) -> bytes:
        if self.headers.get("Expect", "").lower() == "100-continue":
            self.send_response_only(100)
            self.end_headers()
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        data = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return data

    def _forward(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection(self.server.upstream, timeout=60)
        left_out = ("transfer-encoding", "content-length", "expect", "connection")
        headers = {k: v for k, v in self.headers.items() if k.lower() not in left_out}
        if body or self.command in ("PUT", "POST"):
            headers["Content-Length"] = str(len(body))
        connection.request(self.command, self.path, body=body, headers=headers)
        answer = connection.getresponse()
        data, kept = answer.read(), {}
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "connection", "date", "server"):
                kept[name] = value
        connection.close()
        return answer.status, kept, data

    def _answer(
        self, status: int, headers: dict[str, str], data: bytes, sent: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() != "content-length" or self.command == "HEAD":
                self.send_header(name, value)
        if self.command != "HEAD" and status != 204:
            self.send_header("Content-Length", str(len(data)))
        elif self.command == "HEAD" and "content-length" not in map(str.lower, headers):
            self.send_header("Content-Length", "0")
        self.end_headers()
        if self.command != "HEAD" and status != 204:
            self.wfile.write(data[:sent])
        self.wfile.flush()
        self.close_connection = sent is not None

    def _reset(self) -> None:
        with contextlib.suppress(OSError):
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True


@contextlib.contextmanager
def faulty(
    upstream: str, seed: int = 0, certificate: trustme.LeafCert | None = None
) -> Iterator[FaultyS3]:
    """The proxy, running; behind TLS where it has a certificate."""
    server = FaultyS3(upstream, seed, certificate)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
