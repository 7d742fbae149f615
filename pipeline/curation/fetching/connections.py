"""HTTP/1.1 connections: framed by h11, vetted, deadlined, and kept for the next request.

h11 is strict where it matters for a connection that is used again: two lengths that differ, a
negative one, broken chunks, anything after the body. Such a connection ends with its response.
"""

from __future__ import annotations

import select
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Iterator

import h11

from pipeline.curation.fetching.deadline import Deadline
from pipeline.curation.fetching.failures import FetchError
from pipeline.curation.fetching.targets import Target

_BLOCK = 1 << 16
_MAX_HEAD = 1 << 16  # bytes of a response's head, of a chunk's, of the trailers
_MAX_INTERIM = 16  # responses of 1xx before the one that counts
_MAX_CRUMBS = 1024  # pieces of a body that may be tiny
_LEAST_PIECE = 16  # bytes that the pieces after those must have on average
_MAX_LEFTOVER, _LEFTOVER_S = 1 << 16, 0.5  # of a body nobody wants: read for the sake of keeping
_TLS = ssl.create_default_context()
_TLS.set_alpn_protocols(["http/1.1"])


class StaleConnection(Exception):
    """A kept connection turned out to be closed, before the server answered anything."""


class Connection:
    """One connection to one vetted address; a request at a time. The deadline is kept at every
    single read: a socket's own timeout starts anew with every byte, so a slow drip never ends.
    """

    def __init__(self, sock: socket.socket, address: str) -> None:
        self.address = address
        self._sock = sock
        self._http = h11.Connection(h11.CLIENT, max_incomplete_event_size=_MAX_HEAD)
        self._kept = self._heard = self._ended = self._two_lengths = False

    def ask(self, target: Target, headers: dict[str, str], clock: Deadline) -> h11.Response:
        """Send a GET, and give the head of its response.

        Raises StaleConnection, FetchError, h11.RemoteProtocolError, TimeoutError, OSError.
        """
        request = h11.Request(
            method="GET", target=target.path, headers=[("Host", target.netloc), *headers.items()]
        )
        self._heard = False
        try:
            self._sock.settimeout(clock.left())
            self._sock.sendall(self._http.send(request) + self._http.send(h11.EndOfMessage()))
            return self._head(clock)
        except TimeoutError:
            raise
        except OSError as error:
            if self._kept and not self._heard:
                raise StaleConnection from error
            raise

    def body(self, clock: Deadline) -> Iterator[bytes]:
        """What follows the head, in pieces. Raises as `ask` does; `incomplete` where it ends early.

        A server that sends few bytes and much framing costs more than it should: bad_response.
        """
        pieces = received = 0
        while isinstance(event := self._next(clock), h11.Data):
            pieces += 1
            received += len(event.data)
            if pieces > _MAX_CRUMBS and received < _LEAST_PIECE * pieces:
                raise FetchError("bad_response", f"a body in {pieces} pieces")
            yield event.data

    def finish(self, clock: Deadline) -> bool:
        """Whether another request may follow, after a short look for the end of the body."""
        try:
            if self._http.their_state is h11.SEND_BODY:
                clock, size = clock.within(_LEFTOVER_S), 0
                for piece in self.body(clock):
                    size += len(piece)
                    if size > _MAX_LEFTOVER:
                        return False
            # bytes that nobody asked for, or the end; or a body that others may see end elsewhere
            if any(self._http.trailing_data) or self._two_lengths:
                return False
            self._http.start_next_cycle()
        except (FetchError, h11.ProtocolError, OSError):
            return False
        self._kept = True
        return True

    def quiet(self) -> bool:
        """Whether nothing has come while it was kept: neither its end nor an answer unasked."""
        try:
            if isinstance(self._sock, ssl.SSLSocket) and self._sock.pending():
                return False
            poll = select.poll()  # select.select stops at file number 1024
            poll.register(self._sock, select.POLLIN)
            return not poll.poll(0)
        except (OSError, ValueError):
            return False

    def close(self) -> None:
        self._sock.close()

    def _head(self, clock: Deadline) -> h11.Response:
        for _ in range(_MAX_INTERIM + 1):
            event = self._next(clock)
            if isinstance(event, h11.Response):
                names = {name for name, _ in event.headers}
                self._two_lengths = {b"content-length", b"transfer-encoding"} <= names
                return event
        raise FetchError("bad_response", "no end of interim responses")

    def _next(self, clock: Deadline) -> object:
        in_body = self._http.their_state is h11.SEND_BODY
        try:
            while (event := self._http.next_event()) is h11.NEED_DATA:
                self._receive(clock)
            return event
        except h11.RemoteProtocolError as error:
            if not self._ended:
                raise
            if not in_body:
                raise ConnectionResetError("closed before the head was whole") from None
            raise FetchError("incomplete", str(error), transient=True) from None

    def _receive(self, clock: Deadline) -> None:
        self._sock.settimeout(clock.left())
        data = self._sock.recv(_BLOCK)
        if data and not self._heard and not b"HTTP/".startswith(data[:5]):
            raise FetchError("bad_response", f"no HTTP: {data[:20]!r}")
        self._heard, self._ended = self._heard or bool(data), not data
        self._http.receive_data(data)


def connect(addresses: list[str], target: Target, clock: Deadline) -> Connection:
    """A connection to the first of the vetted addresses that answers.

    Raises TimeoutError, ssl.SSLError, OSError.
    """
    error: OSError = ConnectionError("no address")
    for index, address in enumerate(addresses):
        try:
            # leave time for the addresses that follow (IPv6 without a route is common)
            share = clock.left() / (2 if index + 1 < len(addresses) else 1)
            sock = socket.create_connection((address, target.port), timeout=share)
            break
        except OSError as failed:
            error = failed
    else:
        raise error
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if target.tls:
            sock.settimeout(clock.left())  # of the whole handshake
            sock = _TLS.wrap_socket(sock, server_hostname=target.host)
        return Connection(sock, address)
    except BaseException:
        sock.close()
        raise


class Pool:
    """Connections without work, at most `size`, none older than `idle_s` seconds; for threads."""

    def __init__(self, size: int, idle_s: float) -> None:
        self.size, self.idle_s = size, idle_s
        self._idle: deque[tuple[float, str, Connection]] = deque()  # the oldest first
        self._lock = threading.Lock()

    def take(self, origin: str, addresses: list[str]) -> Connection | None:
        """The youngest one to `origin` whose address is still among those vetted for it."""
        with self._lock:
            unfit = self._expired()
            found = None
            for entry in reversed(list(self._idle)):
                if entry[1] != origin:
                    continue
                self._idle.remove(entry)
                if entry[2].address in addresses and entry[2].quiet():
                    found = entry[2]
                    break
                unfit.append(entry[2])
        for connection in unfit:
            connection.close()
        return found

    def give(self, origin: str, connection: Connection) -> None:
        """Keep a connection whose `finish` was true."""
        with self._lock:
            unfit = self._expired()
            self._idle.append((time.monotonic(), origin, connection))
            while len(self._idle) > self.size:
                unfit.append(self._idle.popleft()[2])
        for surplus in unfit:
            surplus.close()

    def close(self) -> None:
        """Close all of them."""
        with self._lock:
            unfit = [connection for _, _, connection in self._idle]
            self._idle.clear()
        for connection in unfit:
            connection.close()

    def __len__(self) -> int:
        return len(self._idle)

    def _expired(self) -> list[Connection]:
        oldest, expired = time.monotonic() - self.idle_s, []
        while self._idle and self._idle[0][0] < oldest:
            expired.append(self._idle.popleft()[2])
        return expired
