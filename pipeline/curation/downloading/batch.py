"""One unit's rows on their way through img2dataset, until all have ended or the time is over.

A thread that hangs, in a name server or in a decoder, cannot be stopped. So the batch runs in
threads that can be left behind: once it is closed, nothing that they still do reaches anybody.
"""

from __future__ import annotations

import hashlib
import io
import math
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

from pipeline.config import DownloadConfig
from pipeline.curation.downloading import driven, raster
from pipeline.curation.downloading.blocklists import BlockLists
from pipeline.curation.downloading.outcomes import Outcome
from pipeline.curation.downloading.turns import Turns
from pipeline.curation.downloading.vetting import Header, undecodable, vet
from pipeline.curation.fetching.fetch import Fetched, FetchError

GRACE_S = 2.0
"""How long after the deadline images that have come may still be resized, seconds."""


class Fetches(Protocol):
    """Gets the body at a url by a moment of time.monotonic(); raises FetchError."""

    def __call__(
        self, url: str, until: float | None = None, listed: Callable[[str], bool] = ...
    ) -> Fetched: ...


@dataclass(frozen=True)
class Row:
    """What is asked for."""

    url: str | None
    digest: str = ""
    """What the body's digest has to be, hex, of the kind that the settings say; "" = anything."""


@dataclass(frozen=True)
class Image:
    """What is stored of a row that ended well."""

    image: bytes
    width: int
    height: int
    original_width: int
    original_height: int
    sha256: str
    """Of the body as it came, hex."""


class _Body(io.BytesIO):
    """A body on its way from the fetch to the resizer, and what is known of it.

    It keeps what was fetched, which may stand for a share of the worker's memory.
    """

    def __init__(self, fetched: Fetched, header: Header, sha256: str, outcome: Outcome) -> None:
        super().__init__(fetched.body)
        self.fetched, self.header = fetched, header
        self.sha256, self.outcome = sha256, outcome


class Batch:
    """Rows, their outcomes and the images that came; used once."""

    def __init__(
        self, rows: list[Row], fetcher: Fetches, blocked: BlockLists, cfg: DownloadConfig
    ) -> None:
        self.rows, self.fetcher, self.blocked, self.cfg = rows, fetcher, blocked, cfg
        self.images: dict[int, Image] = {}
        self._ended: dict[int, Outcome] = {}
        self._came: dict[int, _Body] = {}
        crowd = min(cfg.per_host, max(1, cfg.threads // 2))
        self._turns = Turns([row.url for row in rows], crowd)
        self._lock = threading.Lock()
        self._closed = False
        self._fault: BaseException | None = None
        self._until = math.inf
        self._whole = driven.Resizer(cfg)
        self._reduced = driven.Resizer(cfg, downscale="linear")

    def run(self) -> list[Outcome]:
        """Every row's outcome, in order; returns seconds after the deadline at the latest."""
        if self.cfg.unit_deadline_s:
            self._until = time.monotonic() + self.cfg.unit_deadline_s
        with tempfile.TemporaryDirectory(prefix="images-", ignore_cleanup_errors=True) as folder:
            work = threading.Thread(target=self._work, args=[folder], name="unit", daemon=True)
            work.start()
            left = self._until + GRACE_S - time.monotonic()
            work.join(None if math.isinf(left) else max(left, 0.0))
            late = work.is_alive()  # now: what it does from here on reaches nobody
            with self._lock:
                self._closed = True
            driven.silence.release(self)
        if self._fault is not None:
            raise self._fault
        # what img2dataset lost swallowed an exception; what is on its way had no time left
        rest = Outcome("deadline", transient=True) if late else Outcome("lost")
        return [self._ended.get(index, rest) for index in range(len(self.rows))]

    def _work(self, folder: str) -> None:
        try:
            urls = [row.url for row in self.rows]
            driven.download(urls, folder, self.cfg, self._fetch, self._resize, self._write)
        except BaseException as error:
            with self._lock:
                if not self._closed:
                    self._fault = error

    def _fetch(
        self, _row: tuple[int, str | None], **_: Any
    ) -> tuple[int, io.BytesIO | None, str | None]:
        """In the place of img2dataset's own, which asks as often as there are rows; which one it
        gets is ours to say. No exception leaves it: one would end the unit.
        """
        index = self._turns.take()
        wanted = self.rows[index]
        started, outcome = time.monotonic(), Outcome("ok")
        try:
            url = self._admitted(wanted)
            until = None if math.isinf(self._until) else self._until
            fetched = self.fetcher(url, until=until, listed=self.blocked.url)
            outcome = replace(outcome, size=len(fetched.body), tries=fetched.tries)
            digest = self._judged(fetched, wanted)
            header = vet(fetched.body, self.cfg)
            outcome = replace(outcome, side=min(header.width, header.height))
        except FetchError as error:
            late = error.cause == "timeout" and time.monotonic() >= self._until
            outcome = replace(
                outcome,
                cause="deadline" if late else error.cause,
                rule=error.rule,
                transient=error.transient,
                tries=max(outcome.tries, error.tries),
            )
        except Exception as error:
            outcome = replace(outcome, cause=f"internal_{type(error).__name__}")
        self._turns.done(index)
        outcome = replace(outcome, seconds=time.monotonic() - started)
        if outcome.cause == "ok":
            stream = self._came[index] = _Body(fetched, header, digest, outcome)
            return index, stream, None
        self._end(index, outcome)
        return index, None, outcome.cause

    def _admitted(self, wanted: Row) -> str:
        """The row's url, if it is to be asked for at all. Raises FetchError."""
        if self._closed or time.monotonic() >= self._until:
            raise FetchError("deadline", transient=True)
        if not wanted.url:
            raise FetchError("bad_url", "no url")
        return wanted.url

    def _judged(self, fetched: Fetched, wanted: Row) -> str:
        """The body's sha256, if its content may be stored and is what was asked for."""
        digest = hashlib.sha256(fetched.body)
        others = {"sha256": digest}
        if self.blocked.has("md5") or self.cfg.verify_hash == "md5":
            others["md5"] = hashlib.md5(fetched.body, usedforsecurity=False)
        if any(self.blocked.digest(kind, d.digest()) for kind, d in others.items()):
            raise FetchError("blocked", fetched.url, rule=True)
        if wanted.digest and others[self.cfg.verify_hash].hexdigest() != wanted.digest.lower():
            raise FetchError("hash_mismatch", fetched.url)
        return digest.hexdigest()

    def _resize(self, stream: _Body, boxes: Any = None) -> tuple[Any, ...]:
        """In the place of img2dataset's Resizer: theirs, on pixels of ours."""
        if self._closed:
            return (None,) * 5 + ("deadline",)
        body, header, pixels = stream.getvalue(), stream.header, None
        with driven.silence.held(self):
            try:
                if self.cfg.decode == "reduced":
                    pixels = raster.reduced(body, header, self.cfg.image_size)
                resizer = self._whole if pixels is None else self._reduced
                image, width, height = resizer(
                    raster.decode(body, header) if pixels is None else pixels
                )
            except FetchError as error:
                return (None,) * 5 + (error.cause,)
            except Exception as error:  # img2dataset would lose the row, and its body with it
                return (None,) * 5 + (f"internal_{type(error).__name__}",)
        if image is None:
            return (None,) * 5 + (undecodable(body),)
        return image, width, height, header.width, header.height, None

    def _write(self, image: bytes | None, meta: dict[str, Any]) -> None:
        """In the place of img2dataset's writers."""
        index = meta["row"]
        stream = self._came.pop(index, None)
        if stream is None:
            return  # it has not come, and has ended
        if image is None:
            self._end(index, replace(stream.outcome, cause=str(meta["error_message"])))
            return
        sizes = {
            name: meta[name] for name in ("width", "height", "original_width", "original_height")
        }
        self._end(index, stream.outcome, Image(image, sha256=stream.sha256, **sizes))

    def _end(self, index: int, outcome: Outcome, image: Image | None = None) -> None:
        with self._lock:
            if self._closed:
                return
            self._ended[index] = outcome
            if image is not None:
                self.images[index] = image
