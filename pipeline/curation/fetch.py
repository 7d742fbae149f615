"""One image over HTTP from a web that is not our friend: every way it can end has a name.

http and https only; public addresses only, on every hop; one deadline for all of it; a cap on the
bytes; retries for what may pass, waiting as long as the server asks; opt-outs honoured.
"""

from __future__ import annotations

import contextlib
import email.utils
import http.client
import io
import math
import random
import socket
import ssl
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote, urljoin, urlsplit

from pipeline.config import DownloadConfig
from pipeline.curation.addresses import ForbiddenAddress, Resolver

_MAX_HOPS = 5
_BLOCK = 1 << 16
_REDIRECTS = {301, 302, 303, 307, 308}
_TRANSIENT_STATUS = {408, 425, 429, 500, 502, 503, 504}
_VALUED = {"unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"}
_OPT_OUT = {"noai", "noimageai", "noindex", "noimageindex", "none", "noml"}
_TLS = ssl.create_default_context()
_TLS.set_alpn_protocols(["http/1.1"])


@dataclass(frozen=True)
class Fetched:
    """A body, and the address that it came from after redirects."""

    body: bytes
    url: str
    tries: int = 1


class FetchError(Exception):
    """A fetch that ended without a body.

    `cause` is its class (http_404, timeout, ...); `rule` says that we declined, where otherwise
    the web failed; `transient` that a later try may succeed, after `wait_s` seconds if given.
    """

    def __init__(
        self,
        cause: str,
        detail: str = "",
        *,
        rule: bool = False,
        transient: bool = False,
        wait_s: float | None = None,
    ) -> None:
        super().__init__(f"{cause}: {detail}" if detail else cause)
        self.tries = 1
        self.cause, self.rule, self.transient, self.wait_s = cause, rule, transient, wait_s


class Fetcher:
    """Fetches under the rules of a DownloadConfig; safe to use from threads."""

    def __init__(
        self,
        cfg: DownloadConfig,
        resolver: Resolver | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.cfg, self.sleep = cfg, sleep
        self.resolver = resolver or Resolver(cfg.allow_private_hosts, threads=cfg.threads)
        self.agent_token = cfg.user_agent.partition("/")[0].strip().lower()
        self._hosts = _HostLimit(cfg.per_host)

    def __call__(self, url: str, until: float | None = None) -> Fetched:
        """The body at `url`, by the moment `until` of time.monotonic() at the latest.

        Raises FetchError, and nothing else for whatever the web does.
        """
        clock = _Deadline(self.cfg.timeout_s, until)
        tries = 0
        while True:
            try:
                return replace(self._follow(url, clock), tries=tries + 1)
            except FetchError as error:
                # Full jitter: a thousand workers must not come back in the same moment.
                wait = (
                    error.wait_s
                    if error.wait_s is not None
                    else random.uniform(0.1, 0.5 * 2**tries)
                )
                tries += 1
                error.tries = tries
                if not error.transient or tries > self.cfg.retries or wait >= clock.remaining:
                    raise
                self.sleep(wait)

    def _follow(self, url: str, clock: _Deadline) -> Fetched:
        for _ in range(_MAX_HOPS + 1):
            target = _Target.parse(url)
            with self._hosts.slot(target.host, clock), _classes():
                result = self._request(target, clock)
            if isinstance(result, Fetched):
                return result
            with _classes():
                url = urljoin(target.url, result)
        raise FetchError("too_many_redirects", url)

    def _request(self, target: _Target, clock: _Deadline) -> Fetched | str:
        """One request: a body, or where the server sends us instead."""
        addresses = self.resolver(target.host, target.port, clock.left())
        raw = _connect(addresses, target.port, clock)
        try:
            if target.tls:
                raw.settimeout(clock.left())
                raw = _TLS.wrap_socket(raw, server_hostname=target.host)
            connection = http.client.HTTPConnection(target.host, target.port)
            connection.sock = _TimedSocket(raw, clock)
            connection.request(
                "GET",
                target.path,
                headers={
                    "Host": target.netloc,
                    "User-Agent": self.cfg.user_agent,
                    "Accept": "image/*;q=1.0, */*;q=0.1",
                    "Accept-Encoding": "identity",
                    "Connection": "close",
                },
            )
            response = connection.getresponse()
            if _opted_out(response.headers, self.agent_token):
                raise FetchError("opted_out", target.url, rule=True)
            if response.status in _REDIRECTS and response.headers.get("Location"):
                # http.client reads headers as Latin-1; the web writes UTF-8 into them
                return (
                    str(response.headers["Location"]).encode("latin-1").decode("utf-8", "replace")
                )
            if response.status != 200:
                raise FetchError(
                    f"http_{response.status}",
                    target.url,
                    transient=response.status in _TRANSIENT_STATUS,
                    wait_s=_retry_after(response.headers.get("Retry-After")),
                )
            return Fetched(self._body(response), target.url)
        finally:
            raw.close()

    def _body(self, response: http.client.HTTPResponse) -> bytes:
        limit = self.cfg.max_bytes
        if (response.length or 0) > limit:
            raise FetchError("too_large", f"{response.length} bytes", rule=True)
        unpack = _decoder(response.headers.get("Content-Encoding", ""))
        out = io.BytesIO()
        promised, received = response.length, 0
        while block := response.read1(_BLOCK):
            received += len(block)
            # one byte over the limit is enough to know, so a gzip bomb never unfolds
            out.write(unpack(block, limit + 1 - out.tell()))
            if out.tell() > limit or received > limit:
                raise FetchError("too_large", f"over {limit} bytes", rule=True)
        if promised is not None and received < promised:
            raise FetchError("incomplete", f"{received} of {promised} bytes", transient=True)
        if not out.tell():
            raise FetchError("empty")
        return out.getvalue()


@dataclass(frozen=True)
class _Target:
    """A URL that may be asked for, in the parts that HTTP needs."""

    url: str
    host: str
    port: int
    netloc: str
    path: str
    tls: bool

    @classmethod
    def parse(cls, url: str) -> _Target:
        try:
            parts = urlsplit(url.strip())
            host, port = parts.hostname or "", parts.port
            if parts.scheme not in ("http", "https"):
                raise FetchError("forbidden_scheme", parts.scheme, rule=True)
            if not host.isascii():
                host = host.encode("idna").decode()
        except ValueError as error:  # a broken port, bracket or name
            raise FetchError("bad_url", str(error)) from None
        if not host or any(c <= " " or c == "\x7f" for c in host):
            raise FetchError("bad_url", url[:200])
        tls = parts.scheme == "https"
        # metadata holds raw spaces and umlauts; % stays, as it is quoted already
        path = quote(parts.path or "/", safe="/%:=&?~#+!$,;'@()*[]")
        if parts.query:
            path += "?" + quote(parts.query, safe="/%:=&?~+!$,;'@()*[]")
        netloc = f"[{host}]" if ":" in host else host
        if port is not None:
            netloc += f":{port}"
        return cls(
            f"{parts.scheme}://{netloc}{path}",
            host,
            port or (443 if tls else 80),
            netloc,
            path,
            tls,
        )


class _Deadline:
    """The moment by which everything must be over; waiting in our own queue does not count."""

    def __init__(self, seconds: float, latest: float | None = None) -> None:
        self.latest = math.inf if latest is None else latest
        self.until = min(time.monotonic() + seconds, self.latest)

    @property
    def remaining(self) -> float:
        """Seconds left, negative once it has passed."""
        return self.until - time.monotonic()

    def left(self) -> float:
        """Seconds left. Raises TimeoutError when there are none."""
        if (left := self.remaining) <= 0:
            raise TimeoutError("deadline")
        return left

    def extend(self, seconds: float) -> None:
        self.until = min(self.until + seconds, self.latest)


class _TimedSocket:
    """What http.client needs of a socket, with the deadline kept at every single read.

    A plain socket's timeout starts anew with every byte, so that a slow drip never ends.
    """

    def __init__(self, sock: socket.socket, clock: _Deadline) -> None:
        self.sock, self.clock = sock, clock

    def sendall(self, data: Any) -> None:
        self.sock.settimeout(self.clock.left())
        self.sock.sendall(data)

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(_TimedReader(self.sock, self.clock), _BLOCK)

    def close(self) -> None:
        pass  # the response is still being read; the fetcher closes the socket


class _TimedReader(io.RawIOBase):
    def __init__(self, sock: socket.socket, clock: _Deadline) -> None:
        self.sock, self.clock = sock, clock

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self.sock.settimeout(self.clock.left())
        return self.sock.recv_into(buffer)


class _HostLimit:
    """At most `limit` requests at a time to one host."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._lock = threading.Lock()
        self._slots: dict[str, tuple[threading.Semaphore, int]] = {}

    @contextlib.contextmanager
    def slot(self, host: str, clock: _Deadline) -> Iterator[None]:
        started = time.monotonic()
        with self._lock:
            semaphore, users = self._slots.get(host, (threading.Semaphore(self.limit), 0))
            self._slots[host] = semaphore, users + 1
        try:
            with semaphore:
                clock.extend(time.monotonic() - started)
                yield
        finally:
            with self._lock:
                semaphore, users = self._slots[host]
                if users == 1:
                    del self._slots[host]
                else:
                    self._slots[host] = semaphore, users - 1


def _connect(addresses: list[str], port: int, clock: _Deadline) -> socket.socket:
    """A connection to the first vetted address that answers."""
    error: OSError = ConnectionError("no address")
    for index, address in enumerate(addresses):
        try:
            # leave time for the addresses that follow (IPv6 without a route is common)
            share = clock.left() / (2 if index + 1 < len(addresses) else 1)
            sock = socket.create_connection((address, port), timeout=share)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return sock
        except OSError as failed:
            error = failed
    raise error


def _opted_out(headers: Any, agent_token: str) -> bool:
    """Whether an X-Robots-Tag, for everyone or for us by name, asks not to be used."""
    for value in headers.get_all("X-Robots-Tag", []):
        listed = str(value).lower()
        name, colon, rest = listed.partition(":")
        if colon and "," not in name and name.strip() not in _VALUED:  # "agent: directives"
            if name.strip() not in ("*", agent_token):
                continue
            listed = rest
        if _OPT_OUT & {directive.strip() for directive in listed.split(",")}:
            return True
    return False


def _retry_after(value: str | None) -> float | None:
    """Seconds to wait: the header holds seconds or a date. None if it is absent or broken."""
    if not value:
        return None
    if value.strip().isdigit():
        return float(value.strip()[:9])
    try:
        when = email.utils.parsedate_to_datetime(value)
        if when.tzinfo is None:
            when = when.replace(tzinfo=UTC)
        return max(0.0, (when - datetime.now(UTC)).total_seconds())
    except (ValueError, OverflowError):  # no date, or one with an absurd time zone
        return None


def _decoder(encoding: str) -> Callable[[bytes, int], bytes]:
    """Undoes a Content-Encoding block by block, giving at most the bytes asked for."""
    name = encoding.strip().lower()
    if name in ("", "identity"):
        return lambda block, limit: block
    if name in ("gzip", "x-gzip", "deflate"):
        return zlib.decompressobj(zlib.MAX_WBITS | 32).decompress  # 32: gzip or zlib, by its head
    raise FetchError("bad_encoding", name[:40])


@contextlib.contextmanager
def _classes() -> Iterator[None]:
    """Give what the network and the standard library raise its class."""
    try:
        yield
    except FetchError:
        raise
    except ForbiddenAddress as error:
        raise FetchError("forbidden_address", str(error), rule=True) from None
    except TimeoutError as error:
        raise FetchError("timeout", str(error), transient=True) from None
    except socket.gaierror as error:
        again = error.errno == socket.EAI_AGAIN
        raise FetchError("dns", str(error), transient=again) from None
    except ssl.SSLError as error:
        raise FetchError("tls", str(error)) from None
    except zlib.error as error:
        raise FetchError("bad_encoding", str(error)) from None
    except http.client.IncompleteRead as error:
        raise FetchError("incomplete", str(error), transient=True) from None
    except ConnectionError as error:  # before HTTPException: RemoteDisconnected is both
        raise FetchError("connection", str(error), transient=True) from None
    except UnicodeError as error:
        raise FetchError("bad_url", str(error)[:200]) from None
    except (http.client.HTTPException, ValueError) as error:
        raise FetchError("bad_response", f"{type(error).__name__}: {error}"[:200]) from None
    except OSError as error:
        raise FetchError("connection", str(error), transient=True) from None
