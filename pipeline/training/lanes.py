"""Deterministic lanes: the batch at step s is a function of (seed, s), whoever reads it.

A lane is one of L endless streams over the rows of a split. In epoch e a seeded permutation lays
the row groups end to end; lane l owns the rows [l N / L, (l + 1) N / L) of that line, so lanes are
equally long up to one row, and a row group on a border is read by both neighbours. Within a lane
the rows of each window of `shuffle_rows` are shuffled. Step s takes the same number of rows from
each lane, in lane order: row p of a lane's stream is row p mod n of its epoch p div n.

What follows from it:
- Every row of the split occurs once per epoch, in one lane; every row of a lane once per epoch.
- The position is the step number alone: seek is arithmetic, at any step, in constant time.
- A world of any size that divides L reads the same batches, in the same order.
- Ragged ends do not exist: no row is dropped or padded at the end of an epoch. A lane that has one
  row less starts its next epoch one row sooner, so that a batch may hold rows of two epochs.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from queue import Empty, Full, Queue
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import pyarrow.parquet as pq

from pipeline.errors import UserError
from pipeline.shards import Manifest, read_row_group
from pipeline.storage import Storage

# Distinct streams of one seed: what is drawn for one purpose never repeats in another.
_ORDER, _SHUFFLE = 1, 2
_OPEN_FILES = 16

T = TypeVar("T")
R = TypeVar("R")


class Place(NamedTuple):
    """Where a lane's stream is: its epoch, the window in that epoch, the row in that window."""

    epoch: int
    window: int
    offset: int


class Rows(NamedTuple):
    """Rows of one window in the order they are taken: row `row[i]` of row group `group[i]`."""

    group: np.ndarray
    row: np.ndarray


class LanePlan:
    """Which row is where. No I/O: arithmetic and seeded permutations only.

    Args:
        row_groups: rows of each row group of the split.
        lanes: number of lanes L.
        shuffle_rows: window in which a lane shuffles its rows.
        seed: any number of non-negative integers.

    Raises:
        UserError: fewer rows than lanes.
    """

    def __init__(
        self, row_groups: Sequence[int], lanes: int, shuffle_rows: int, seed: Sequence[int]
    ) -> None:
        self.sizes = np.asarray(row_groups, dtype=np.int64)
        self.rows = int(self.sizes.sum())
        if self.rows < lanes:
            short = f"{self.rows} training rows are fewer than {lanes} lanes"
            raise UserError(f"{short}; curate more rows or lower lanes")
        self.window = max(1, shuffle_rows)
        self.seed = tuple(seed)
        self.starts = np.arange(lanes + 1, dtype=np.int64) * self.rows // lanes
        self._lines: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()
        self._lock = threading.Lock()

    def length(self, lane: int) -> int:
        """Rows of a lane in an epoch."""
        return int(self.starts[lane + 1] - self.starts[lane])

    def place(self, lane: int, position: int) -> Place:
        """Place of the row at `position` (0, 1, ...) of the lane's endless stream."""
        epoch, inside = divmod(position, self.length(lane))
        return Place(epoch, *divmod(inside, self.window))

    def after(self, lane: int, place: Place) -> Place:
        """The first row of the window behind the one that holds `place`."""
        if (place.window + 1) * self.window < self.length(lane):
            return Place(place.epoch, place.window + 1, 0)
        return Place(place.epoch + 1, 0, 0)

    def rows_of(self, lane: int, place: Place) -> Rows:
        """The window that holds `place`, in the order its rows are taken."""
        order, ends = self._line(place.epoch)
        first = int(self.starts[lane]) + place.window * self.window
        last = min(first + self.window, int(self.starts[lane + 1]))
        at = np.arange(first, last)
        rng = np.random.default_rng((*self.seed, _SHUFFLE, place.epoch, lane, place.window))
        rng.shuffle(at)
        slot = np.searchsorted(ends, at, side="right")
        group = order[slot]
        return Rows(group, at - (ends[slot] - self.sizes[group]))

    def _line(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's order of row groups, and where each of them ends in the line of rows."""
        with self._lock:
            if epoch not in self._lines:
                rng = np.random.default_rng((*self.seed, _ORDER, epoch))
                order = rng.permutation(len(self.sizes))
                self._lines[epoch] = order, np.cumsum(self.sizes[order])
            while len(self._lines) > 2:  # neighbouring epochs only: lanes drift by a row an epoch
                self._lines.popitem(last=False)
            return self._lines[epoch]


@dataclass
class Batch:
    """What one worker trains on at one step.

    `first` is the index of its first row in the global batch; `columns` maps a column to an array
    (rows, *shape) or a list, rows in lane order.
    """

    step: int
    first: int
    columns: dict[str, Any]

    @property
    def rows(self) -> int:
        return len(next(iter(self.columns.values())))


class Lanes:
    """The training rows of a sealed curation as batches.

    Args:
        storage: the curated root.
        manifest: its manifest.
        columns: the columns to read; nothing else is fetched.
        lanes, shuffle_rows, seed: as in LanePlan.
        global_batch: rows of a step over all workers, a multiple of `lanes`.
        split: train or test.
        readers: row groups read side by side.
    """

    def __init__(
        self,
        storage: Storage,
        manifest: Manifest,
        columns: Sequence[str],
        *,
        lanes: int,
        global_batch: int,
        shuffle_rows: int,
        seed: Sequence[int],
        split: str = "train",
        readers: int = 4,
    ) -> None:
        if global_batch % lanes:
            raise UserError(
                f"global_batch {global_batch} is not a multiple of lanes {lanes}; change one"
            )
        shards = manifest.split(split)
        groups = [(shard["path"], i) for shard in shards for i in range(len(shard["row_groups"]))]
        sizes = [rows for shard in shards for rows in shard["row_groups"]]
        self.plan = LanePlan(sizes, lanes, shuffle_rows, seed)
        self.lanes, self.per_lane = lanes, global_batch // lanes
        self.columns, self.readers = list(columns), readers
        self._source = _RowGroups(storage, manifest, groups, self.columns)

    def epoch(self, step: int) -> float:
        """Epochs behind the run when `step` steps are done."""
        return step * self.per_lane * self.lanes / self.plan.rows

    def batches(self, start: int, stop: int, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """Batches of steps start, start + 1, ..., stop - 1 of one worker of `world`.

        Each lane holds one window of rows in memory, and fetches the next one in the background
        when a quarter of it is left.

        Raises:
            UserError: `world` does not divide the lanes.
        """
        if self.lanes % world:
            raise UserError(
                f"{world} workers do not divide {self.lanes} lanes; use a divisor, or other lanes"
            )
        share = self.lanes // world
        mine = range(rank * share, (rank + 1) * share)
        with ThreadPoolExecutor(self.readers, thread_name_prefix="lane-reader") as pool:
            try:
                streams = [_Stream(self.plan, lane, self._source, pool) for lane in mine]
                for step in range(start, stop):
                    yield self._assemble(step, streams, mine[0])
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _assemble(self, step: int, streams: list[_Stream], first_lane: int) -> Batch:
        rows: list[tuple[RowGroup, int]] = []
        for stream in streams:
            stream.take(step * self.per_lane, self.per_lane, rows)
        columns = {name: _gather(name, rows) for name in self.columns}
        return Batch(step, first_lane * self.per_lane, columns)


class RowGroup:
    """Columns of one row group in memory, shared by all windows that still need it."""

    __slots__ = ("__weakref__", "columns")

    def __init__(self, columns: dict[str, Any]) -> None:
        self.columns = columns


class _RowGroups:
    """Reads row groups; what is in memory already is not read again."""

    def __init__(
        self,
        storage: Storage,
        manifest: Manifest,
        groups: list[tuple[str, int]],
        columns: list[str],
    ) -> None:
        self.storage, self.manifest, self.groups, self.columns = storage, manifest, groups, columns
        self._held: weakref.WeakValueDictionary[int, RowGroup] = weakref.WeakValueDictionary()
        self._local = threading.local()  # a ParquetFile must not be shared between threads

    def read(self, group: int) -> RowGroup:
        held = self._held.get(group)
        if held is None:
            path, index = self.groups[group]
            try:
                held = RowGroup(read_row_group(self._file(path), index, self.columns))
            except (OSError, ValueError, KeyError) as error:
                line = " ".join(str(error).split())[:200]
                where = self.storage.url(path)
                raise UserError(
                    f"cannot read row group {index} of {where}: {line}; curate it again"
                ) from error
            self._held[group] = held
        return held

    def _file(self, path: str) -> pq.ParquetFile:
        files: OrderedDict[str, pq.ParquetFile] | None = getattr(self._local, "files", None)
        if files is None:
            files = self._local.files = OrderedDict()
        if path not in files:
            while len(files) >= _OPEN_FILES:
                files.popitem(last=False)[1].close()
            files[path] = self.manifest.open(self.storage, path)
        files.move_to_end(path)
        return files[path]


class _Window:
    """One window of one lane, in memory."""

    def __init__(self, plan: LanePlan, lane: int, place: Place, source: _RowGroups) -> None:
        rows = plan.rows_of(lane, place)
        self.groups = {int(group): source.read(int(group)) for group in np.unique(rows.group)}
        self.rows = rows

    def row(self, offset: int) -> tuple[RowGroup, int]:
        return self.groups[int(self.rows.group[offset])], int(self.rows.row[offset])

    def __len__(self) -> int:
        return len(self.rows.row)


class _Stream:
    """One lane, read window by window, the next one in the background."""

    def __init__(
        self, plan: LanePlan, lane: int, source: _RowGroups, pool: ThreadPoolExecutor
    ) -> None:
        self.plan, self.lane, self.source, self.pool = plan, lane, source, pool
        self.current: tuple[Place, _Window] | None = None
        self.coming: tuple[Place, Future[_Window]] | None = None

    def take(self, position: int, count: int, out: list[tuple[RowGroup, int]]) -> None:
        """Append the rows at [position, position + count) of the lane's stream to `out`."""
        for at in range(position, position + count):
            place = self.plan.place(self.lane, at)
            window = self._window(place._replace(offset=0))
            out.append(window.row(place.offset))
            if self.coming is None and (len(window) - place.offset) * 4 <= len(window) + 3:
                self._fetch(self.plan.after(self.lane, place))

    def _window(self, place: Place) -> _Window:
        if self.current is None or self.current[0] != place:
            if self.coming is None or self.coming[0] != place:
                self._fetch(place)
            assert self.coming is not None
            self.current = None  # let go of the old window before the wait for the new one
            self.current = place, self.coming[1].result()
            self.coming = None
        return self.current[1]

    def _fetch(self, place: Place) -> None:
        self.coming = place, self.pool.submit(_Window, self.plan, self.lane, place, self.source)


def _gather(name: str, rows: list[tuple[RowGroup, int]]) -> Any:
    """One column of the given rows: an array (rows, *shape), copied once, or a list."""
    sample = rows[0][0].columns[name]
    if not isinstance(sample, np.ndarray):
        return [group.columns[name][row] for group, row in rows]
    out = np.empty((len(rows), *sample.shape[1:]), dtype=sample.dtype)
    for i, (group, row) in enumerate(rows):
        out[i] = group.columns[name][row]
    return out


class ReadAhead(Generic[T, R]):
    """Runs an iterator in a background thread, at most `depth` finished items ahead.

    Iterate over it once; `close()` (or the end of a `with`) stops the thread. What the iterator
    raises, iteration raises.

    Args:
        items: the iterator; it is advanced in the thread only.
        depth: finished items that may wait.
        finish: work done in the thread on each item.
    """

    _END = object()

    def __init__(self, items: Iterable[T], finish: Callable[[T], R], depth: int = 4) -> None:
        self._queue: Queue[Any] = Queue(maxsize=depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=self._run, args=(iter(items), finish), name="read-ahead", daemon=True
        )
        self._thread.start()

    def _run(self, items: Iterator[T], finish: Callable[[T], R]) -> None:
        last: Any = self._END
        try:
            for item in items:
                if not self._put(finish(item)):
                    break
        except BaseException as error:
            last = error
        finally:
            close = getattr(items, "close", None)
            if close is not None:
                close()
            self._put(last)

    def _put(self, item: Any) -> bool:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.2)
                return True
            except Full:
                continue
        return False

    def __iter__(self) -> Iterator[R]:
        while True:
            item = self._queue.get()
            if item is self._END:
                return
            if isinstance(item, BaseException):
                raise item
            yield item

    def close(self) -> None:
        self._stop.set()
        try:
            while True:
                self._queue.get_nowait()
        except Empty:
            pass
        self._thread.join(timeout=5)

    def __enter__(self) -> ReadAhead[T, R]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
