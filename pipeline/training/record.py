"""What a run leaves for those who watch: metrics, TensorBoard events, progress, what went wrong.

Rank 0 only. Files are written by a thread of its own, so that a slow store never stalls a step.
`metrics.jsonl` holds one JSON object per line; after a restart, lines beyond the checkpoint that
training goes on from are dropped, so that a step has one record.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from PIL import Image

from pipeline.errors import UserError
from pipeline.generation import png
from pipeline.storage import Storage
from pipeline.training.attempts import Attempt
from pipeline.training.row_groups import Corrupt
from pipeline.training.trackers import trackers

PROGRESS = "train/progress.json"
_BYTES_PER_S = 500_000

T = TypeVar("T")


def metrics_path(stage: str) -> str:
    """Where the records of a stage are, relative to the root."""
    return f"train/{stage}/metrics.jsonl"


def read_metrics(storage: Storage, stage: str) -> list[dict[str, Any]]:
    """Records of a stage, oldest first; [] if it has none."""
    path = metrics_path(stage)
    if not storage.exists(path):
        return []
    return [json.loads(line) for line in storage.read_bytes(path).splitlines() if line.strip()]


def samples_path(stage: str, step: int) -> str:
    """Where the grid of samples of a step is, relative to the root."""
    return f"train/{stage}/samples/step-{step:08d}.png"


def nonfinite_path(stage: str) -> str:
    """Where the steps of a stage are told that were not a number, relative to the root."""
    return f"train/{stage}/nonfinite.jsonl"


def write_nonfinite(storage: Storage, stage: str, found: Mapping[int, list[str]]) -> None:
    """Add steps that were not a number: {"step": ..., "keys": [keys of the rows that were not]}, no
    keys where the gradient alone was not. What was told of the same or later steps goes.
    """
    path = nonfinite_path(stage)
    old = storage.read_bytes(path).splitlines() if storage.exists(path) else []
    before = [line.decode() for line in old if json.loads(line)["step"] < min(found)]
    new = [json.dumps({"step": step, "keys": keys}) for step, keys in sorted(found.items())]
    storage.write_bytes(path, "".join(f"{line}\n" for line in [*before, *new]).encode())


def corrupt_path(stage: str) -> str:
    """Where the damaged row groups of a stage are told, relative to the root."""
    return f"train/{stage}/corrupt.jsonl"


def write_corrupt(storage: Storage, stage: str, found: Iterable[Corrupt]) -> list[Corrupt]:
    """Add damaged row groups, one line of JSON each; returns those that were not told before."""
    path = corrupt_path(stage)
    old = storage.read_bytes(path).splitlines() if storage.exists(path) else []
    told = {(line["path"], line["row_group"]) for line in map(json.loads, old)}
    new = [one for one in sorted(set(found)) if (one.path, one.row_group) not in told]
    if new:
        lines = [*(line.decode() for line in old), *(json.dumps(one._asdict()) for one in new)]
        storage.write_bytes(path, "".join(f"{line}\n" for line in lines).encode())
    return new


class Recorder:
    """Collects a stage's records and publishes them every `every_s` seconds and at `flush`.

    Args:
        storage: the run's root.
        stage: name of the stage.
        start: step that training goes on from.
        run: the run's token, so that a watcher tells this run's progress from an older one's.
        what: what the attempt runs with, see `attempts.about`.
        tracked: who is told besides TensorBoard, see trackers.py.
        check_owner: called before anything is written; it raises UserError to prevent it.
        every_s: longest time that the files are behind, seconds; more where they are large, for
            they are written whole.
    """

    def __init__(
        self,
        storage: Storage,
        stage: str,
        start: int,
        run: str = "",
        what: dict[str, Any] | None = None,
        tracked: Sequence[str] = (),
        check_owner: Callable[[], None] = lambda: None,
        every_s: float = 5.0,
    ) -> None:
        self._check_owner = check_owner
        self.storage, self.stage, self.every_s = storage, stage, every_s
        self._always = {"run": run, "stage": stage, "start": start}
        old = read_metrics(storage, stage) if start else []
        self._lines = [json.dumps(record) for record in old if record["step"] <= start]
        self._written, self._flushed, self._bytes = -1, 0.0, 0
        self._progress: dict[str, Any] = {}
        self._pictures: dict[str, bytes] = {}
        self._lock = threading.Lock()  # guards lines, progress and pictures
        self._publishing = threading.Lock()
        self._trackers = trackers(tracked, storage, stage, start, (what or {}).get("settings", {}))
        self._attempt = Attempt(storage, stage, start, what or {})
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._tick, name="recorder", daemon=True)
        self._thread.start()

    def log(self, record: dict[str, Any]) -> None:
        """Add a record; the numbers under its keys are told to TensorBoard and the others."""
        with self._lock:
            self._lines.append(json.dumps(record))
        for tracker in self._trackers:
            tracker.log(record)

    def picture(self, step: int, picture: Image.Image) -> None:
        """Add a grid of samples."""
        with self._lock:
            self._pictures[samples_path(self.stage, step)] = png.encode(picture)
        for tracker in self._trackers:
            tracker.picture(step, picture)

    def progress(self, **figures: Any) -> None:
        """What a watcher sees now; the newest call counts."""
        with self._lock:
            self._progress = {**self._always, "time": time.time(), **figures}

    def flush(self) -> None:
        """Publish everything now. Raises UserError when the store refuses."""
        self._check_owner()
        with self._publishing:
            with self._lock:
                lines, progress = list(self._lines), dict(self._progress)
                pictures = list(self._pictures.items())
            for path, data in pictures:
                self.storage.write_bytes(path, data)
                del self._pictures[path]
            if len(lines) != self._written:
                text = "".join(f"{line}\n" for line in lines)
                self.storage.write_bytes(metrics_path(self.stage), text.encode())
                self._written, self._bytes = len(lines), len(text)
                for tracker in self._trackers:
                    tracker.publish()
            if progress:
                self.storage.write_json(PROGRESS, progress)
                self._attempt.save(int(progress["step"]))

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        self.flush()
        for tracker in self._trackers:
            tracker.close()

    def _tick(self) -> None:
        while not self._stop.wait(min(self.every_s, 2.0)):
            try:
                self._publish_due()
            except UserError:
                continue  # a watcher's copy; the flush at a checkpoint says what is wrong

    def _publish_due(self) -> None:
        with self._lock:
            progress = dict(self._progress)
        if progress:
            self._check_owner()
            self.storage.write_json(PROGRESS, progress)
        now = time.monotonic()
        if now - self._flushed >= max(self.every_s, self._bytes / _BYTES_PER_S):
            self._flushed = now
            self.flush()


class Clock:
    """Where the time between two logs goes: samples per second, share of waiting for data."""

    def __init__(self, batch: int, step: int) -> None:
        self.batch, self.step = batch, step
        self.started = time.monotonic()
        self.waited = 0.0

    def timed(self, items: Iterator[T]) -> Iterator[T]:
        while True:
            before = time.monotonic()
            item = next(items, None)
            self.waited += time.monotonic() - before
            if item is None:
                return
            yield item

    def paused(self) -> Pause:
        """Time in this block (validation, checkpoints) counts as neither."""
        return Pause(self)

    def lap(self, step: int) -> tuple[int, float, float]:
        """Steps, samples per second and share of waiting since the last lap."""
        steps, spent = step - self.step, max(time.monotonic() - self.started, 1e-9)
        figures = steps, steps * self.batch / spent, self.waited / spent
        self.step, self.started, self.waited = step, time.monotonic(), 0.0
        return figures


class Pause:
    """See `Clock.paused`."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def __enter__(self) -> None:
        self.began = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self.clock.started += time.monotonic() - self.began
