"""One image over HTTP from a web that is not our friend: every way it can end has a name.

http and https only; public addresses only, on every hop; one deadline for all of it; a cap on the
bytes; retries for what may pass, waiting as long as the server asks; hosts are not pressed, and
given up when they are dead; opt-outs are honoured, robots.txt on request.
"""

from __future__ import annotations

import contextlib
import io
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from urllib.parse import urljoin

import h11

from pipeline.config import DownloadConfig
from pipeline.curation.fetching import robots, room
from pipeline.curation.fetching.addresses import Resolver
from pipeline.curation.fetching.breaker import Breaker
from pipeline.curation.fetching.connections import Connection, Pool, StaleConnection, connect
from pipeline.curation.fetching.courtesy import Courtesy
from pipeline.curation.fetching.deadline import Deadline
from pipeline.curation.fetching.failures import FetchError as FetchError
from pipeline.curation.fetching.failures import named, status_error, too_late
from pipeline.curation.fetching.replies import (
    Unpacker,
    header,
    opted_out,
    promised_bytes,
    retry_after,
)
from pipeline.curation.fetching.targets import Target

_MAX_HOPS = 5
_BUSY = {429, 503}
_REDIRECTS = {301, 302, 303, 307, 308}


@dataclass(frozen=True)
class Fetched:
    """A body, and the address that it came from after redirects.

    Large bodies are few at a time: the next may only come when this object is gone, so keep it
    with its body, and do not collect many.
    """

    body: bytes
    url: str
    seconds: float = 0.0
    """From the call to the body, queues and retries included."""
    tries: int = 1
    claim: room.Claim | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class _Wish:
    """What is asked for: an image, or a robots.txt, which is cut instead of refused."""

    accept: str
    max_bytes: int
    cut: bool = False
    listed: Callable[[str], bool] = lambda url: False
    asking: Callable[[], object] = lambda: None
    """Called before anything goes out to the network."""


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
        self.pool = Pool(cfg.threads, cfg.keep_alive_s)
        self.breaker = Breaker()
        self.courtesy = Courtesy(cfg.per_host, cfg.per_host_rate)
        self.robots = robots.Robots(self.agent_token, self._read_robots)
        self.room = room.Room(cfg.max_bytes, cfg.threads)
        self._image = _Wish("image/*;q=1.0, */*;q=0.1", cfg.max_bytes)

    def __call__(
        self,
        url: str,
        until: float | None = None,
        listed: Callable[[str], bool] = lambda url: False,
    ) -> Fetched:
        """The body at `url`. Raises FetchError, and nothing else for whatever the web does.

        `until` (monotonic seconds) ends everything, waiting for our turn included: `deadline`. A
        url that is `listed` is not asked for, wherever a redirect may lead: `blocked`.
        """
        began, tries = time.monotonic(), 1
        asked: set[int] = set()  # tries that asked for anything
        clock = Deadline(self.cfg.timeout_s, until)
        while True:
            try:
                image = replace(self._image, listed=listed, asking=partial(asked.add, tries))
                fetched = self._follow(url, clock, image)
                return replace(fetched, seconds=time.monotonic() - began, tries=len(asked))
            except FetchError as error:
                if error.cause == "timeout" and clock.patience <= 0:
                    error = too_late(str(error))
                error.tries = len(asked)
                # Full jitter: a thousand workers must not come back in the same moment.
                wait = random.uniform(0.1, 0.5 * 2 ** (tries - 1))
                if error.wait_s is not None:
                    wait = error.wait_s * random.uniform(1.0, 1.25)
                again = error.transient and error.soon and tries <= self.cfg.retries
                if not again or wait >= clock.remaining:
                    raise error from None
                tries += 1
            self.sleep(wait)

    def close(self) -> None:
        """Close the connections that are kept."""
        self.pool.close()

    def _follow(self, url: str, clock: Deadline, wish: _Wish) -> Fetched:
        for _ in range(_MAX_HOPS + 1):
            target, pause_s = Target.parse(url), 0.0
            if wish.listed(url) or wish.listed(target.url):
                raise FetchError("blocked", target.url, rule=True)
            with named():
                if self.cfg.robots_txt and not wish.cut:
                    pause_s = self.robots.check(target, clock)
                self.breaker.check(target.origin, asking=False)  # no turn is spent on the dead
                with self.courtesy.turn(target.host, clock, pause_s):
                    result = self._request(target, clock, wish)
            if isinstance(result, Fetched):
                return result
            try:
                url = urljoin(target.url, result)
            except ValueError as error:
                raise FetchError("bad_url", f"{result[:200]}: {error}") from None
        raise FetchError("too_many_redirects", url)

    def _request(self, target: Target, clock: Deadline, wish: _Wish) -> Fetched | str:
        """One request: a body, or where the server sends us instead."""
        self.breaker.check(target.origin)
        began = time.monotonic()
        try:
            with named():
                connection, response = self._ask(target, clock, wish)
        except FetchError as error:
            # a time-out of the little that was left of our time is not the host's fault
            tried_s = time.monotonic() - began
            slow = tried_s >= min(self.cfg.connect_timeout_s, self.cfg.timeout_s) / 2
            if error.cause == "connection" or (error.cause == "timeout" and slow):
                # every look at a robots.txt is for another image
                asked = f"{target.url}#{began}" if wish.cut else target.url
                self.breaker.failed(target.origin, asked, error.cause, began)
            raise
        self.breaker.answered(target.origin)
        busy = response.status_code in _BUSY
        self.courtesy.answered(target.host, retry_after(response) if busy else None)
        try:
            result = self._judge(target, response, connection, clock, wish)
        except FetchError:
            self._keep(target, connection, clock)
            raise
        except BaseException:
            connection.close()
            raise
        self._keep(target, connection, clock)
        return result

    def _ask(self, target: Target, clock: Deadline, wish: _Wish) -> tuple[Connection, h11.Response]:
        """A connection on which the head of the response has come."""
        opening = clock.within(self.cfg.connect_timeout_s)
        with _at_once_or_not(target):
            addresses = self.resolver(target.host, target.port, opening.left())
        wish.asking()
        connection = self.pool.take(target.origin, addresses)
        if connection is not None:
            try:
                return connection, self._head(connection, target, clock, wish)
            except StaleConnection:
                pass  # it had been closed while it was kept: no try at all
            opening = clock.within(self.cfg.connect_timeout_s)
        with _at_once_or_not(target):
            connection = connect(addresses, target, opening)
        return connection, self._head(connection, target, clock, wish)

    def _head(
        self, connection: Connection, target: Target, clock: Deadline, wish: _Wish
    ) -> h11.Response:
        headers = {
            "User-Agent": self.cfg.user_agent,
            "Accept": wish.accept,
            "Accept-Encoding": "identity",
        }
        if not self.cfg.keep_alive_s:
            headers["Connection"] = "close"
        try:
            return connection.ask(target, headers, clock)
        except BaseException:
            connection.close()
            raise

    def _keep(self, target: Target, connection: Connection, clock: Deadline) -> None:
        if self.cfg.keep_alive_s and connection.finish(clock):
            self.pool.give(target.origin, connection)
        else:
            connection.close()

    def _judge(
        self,
        target: Target,
        response: h11.Response,
        connection: Connection,
        clock: Deadline,
        wish: _Wish,
    ) -> Fetched | str:
        if not wish.cut and opted_out(response, self.agent_token):
            raise FetchError("opted_out", target.url, rule=True)
        location = header(response, b"location")
        if response.status_code in _REDIRECTS and location:
            return location
        if response.status_code != 200:
            raise status_error(response.status_code, target.url, retry_after(response))
        with named():
            return self._body(target, response, connection, clock, wish)

    def _body(
        self,
        target: Target,
        response: h11.Response,
        connection: Connection,
        clock: Deadline,
        wish: _Wish,
    ) -> Fetched:
        limit = wish.max_bytes
        promised = promised_bytes(response)
        if promised > limit and not wish.cut:
            raise FetchError("too_large", f"{promised} bytes", rule=True)
        unpack = Unpacker(header(response, b"content-encoding"))
        out, received, claim = io.BytesIO(), 0, None
        try:
            for piece in connection.body(clock):
                received += len(piece)
                if claim is None and max(promised, received, out.tell()) > self.room.small:
                    claim = self.room.claim(clock)
                # one byte over the limit is enough to know, so a gzip bomb never unfolds
                out.write(unpack(piece, limit + 1 - out.tell()))
                if out.tell() > limit or received > limit:
                    if wish.cut:
                        break
                    raise FetchError("too_large", f"over {limit} bytes", rule=True)
            else:
                unpack.finish()
        except BaseException:
            out.close()
            if claim is not None:
                claim.release()  # now: the traceback refers to it for longer
            raise
        if not out.tell():
            raise FetchError("empty")
        return Fetched(out.getvalue(), target.url, claim=claim)

    def _read_robots(self, url: str, clock: Deadline) -> bytes:
        wish = _Wish("text/plain, */*;q=0.5", robots.MAX_BYTES, cut=True)
        # a host's rules are not on the account of the image that happens to ask for them first
        clock = clock.renewed(self.cfg.timeout_s)
        return self._follow(url, clock, wish).body[: robots.MAX_BYTES]


@contextlib.contextmanager
def _at_once_or_not(target: Target) -> Iterator[None]:
    """A name or a connection that took its time is not tried again in this fetch: the system has
    tried several times already.
    """
    try:
        yield
    except TimeoutError as error:
        detail = f"{target.origin}: {error}"
        raise FetchError("timeout", detail, transient=True, soon=False) from None
