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

import functools
import threading
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from pipeline.errors import UserError
from pipeline.shards import Manifest, row_bytes
from pipeline.shards_reader import Stacks
from pipeline.storage import Storage
from pipeline.training.row_groups import (
    Loader,
    Loading,
    Replaced,
    RowGroup,
    RowGroups,
    gather,
)

# Distinct streams of one seed: what is drawn for one purpose never repeats in another.
_ORDER, _SHUFFLE, _FLIP = 1, 2, 3
# A lane's next window is asked for bit by bit until this share of the current one is behind.
_ASKED_BY = 0.75


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
        flip: a coin decides for each row group and epoch whether its images are mirrored.

    Raises:
        UserError: fewer rows than lanes.
    """

    def __init__(
        self,
        row_groups: Sequence[int] | np.ndarray,
        lanes: int,
        shuffle_rows: int,
        seed: Sequence[int],
        flip: bool = False,
    ) -> None:
        self.sizes = np.asarray(row_groups, dtype=np.int64)
        self.rows = int(self.sizes.sum())
        if self.rows < lanes:
            short = f"{self.rows} training rows are fewer than {lanes} lanes"
            raise UserError(f"{short}; curate more rows or lower lanes")
        self.window = max(1, shuffle_rows)
        self.seed, self.flip = tuple(seed), flip
        self.starts = np.arange(lanes + 1, dtype=np.int64) * self.rows // lanes
        self._lines: OrderedDict[int, _Line] = OrderedDict()
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
        order, ends, _ = self._line(place.epoch)
        first = int(self.starts[lane]) + place.window * self.window
        last = min(first + self.window, int(self.starts[lane + 1]))
        at = np.arange(first, last)
        rng = np.random.default_rng((*self.seed, _SHUFFLE, place.epoch, lane, place.window))
        rng.shuffle(at)
        slot = np.searchsorted(ends, at, side="right")
        group = order[slot]
        return Rows(group, at - (ends[slot] - self.sizes[group]))

    def order(self, epoch: int) -> np.ndarray:
        """The row groups in the order of the epoch."""
        return self._line(epoch).order

    def flipped(self, epoch: int, group: int) -> bool:
        """Whether the images of a row group are mirrored in the epoch."""
        return bool(self._line(epoch).flipped[group])

    def _line(self, epoch: int) -> _Line:
        with self._lock:
            if epoch not in self._lines:
                rng = np.random.default_rng((*self.seed, _ORDER, epoch))
                order = rng.permutation(len(self.sizes))
                coins = np.random.default_rng((*self.seed, _FLIP, epoch)).random(len(self.sizes))
                flipped = (coins < 0.5) & self.flip
                self._lines[epoch] = _Line(order, np.cumsum(self.sizes[order]), flipped)
            while len(self._lines) > 2:  # neighbouring epochs only: lanes drift by a row an epoch
                self._lines.popitem(last=False)
            return self._lines[epoch]


class _Line(NamedTuple):
    """An epoch: its order of row groups, where each of them ends in the line of rows, and, by row
    group, whether its images are mirrored.
    """

    order: np.ndarray
    ends: np.ndarray
    flipped: np.ndarray


@dataclass
class Batch:
    """What one worker trains on at one step.

    `first` is the index of its first row in the global batch; `columns` maps a column to an array
    (rows, *shape) or a list, rows in lane order. `replaced` counts the rows that stand in for those
    of a damaged row group.
    """

    step: int
    first: int
    columns: dict[str, Any]
    replaced: int = 0

    @property
    def rows(self) -> int:
        return len(next(iter(self.columns.values())))


class Lanes:
    """The training rows of a sealed curation as batches.

    Args:
        storage: the curated root.
        manifest: its manifest.
        columns: the columns to read; nothing else is fetched.
        lanes, shuffle_rows, seed, flip: as in LanePlan.
        global_batch: rows of a step over all workers, a multiple of `lanes`.
        split: train or test.
        corrupt, verify: as in RowGroups.
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
        flip: bool = False,
        split: str = "train",
        corrupt: Literal["stop", "skip"] = "stop",
        verify: bool = False,
        readers: int = 4,
    ) -> None:
        if global_batch % lanes:
            raise UserError(
                f"global_batch {global_batch} is not a multiple of lanes {lanes}; change one"
            )
        self.source = RowGroups(
            storage, manifest, columns, split=split, corrupt=corrupt, verify=verify
        )
        self.plan = LanePlan(self.source.sizes, lanes, shuffle_rows, seed, flip)
        self.lanes, self.per_lane = lanes, global_batch // lanes
        self.columns, self.readers = list(columns), readers
        self.row_bytes = row_bytes(manifest, self.columns)
        self._stacks = Stacks()

    def epoch(self, step: int) -> float:
        """Epochs behind the run when `step` steps are done."""
        return step * self.per_lane * self.lanes / self.plan.rows

    def memory(self, world: int = 1) -> int:
        """Bytes of row groups that one worker of `world` holds at most: two windows of each of its
        lanes, with the row groups at both ends of each whole.
        """
        largest = int(self.plan.sizes.max())
        lane = 2 * (min(self.plan.window, self.plan.length(0) + 1) + 2 * (largest - 1))
        sides = 2 if self.plan.flip else 1
        return min(self.lanes // world * lane, sides * self.plan.rows) * self.row_bytes

    def batches(self, start: int, stop: int, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """Batches of steps start, start + 1, ..., stop - 1 of one worker of `world`.

        Each lane holds one window of rows in memory, and asks for the next one bit by bit. What is
        needed first, of all lanes, is read first: a seek waits for its first batch alone, and no
        lane for the windows of others.

        Raises:
            UserError: `world` does not divide the lanes.
        """
        if self.lanes % world:
            raise UserError(
                f"{world} workers do not divide {self.lanes} lanes; use a divisor, or other lanes"
            )
        share = self.lanes // world
        mine = range(rank * share, (rank + 1) * share)
        with Loader(self.source, self.readers) as loader:
            streams = [_Stream(self.plan, lane, loader) for lane in mine]
            for step in range(start, stop):
                yield self._assemble(step, streams, mine[0])

    def _assemble(self, step: int, streams: list[_Stream], first_lane: int) -> Batch:
        position, rows = step * self.per_lane, list[_Row]()
        for stream in streams:  # all of them ask before one of them waits
            stream.ask(position, self.per_lane)
        for stream in streams:
            stream.take(position, self.per_lane, rows)
        columns = gather(self.columns, [(row.group, row.row) for row in rows], self._stacks)
        replaced = sum(row.replaced for row in rows)
        return Batch(step, first_lane * self.per_lane, columns, replaced)


class _Row(NamedTuple):
    """A row where it lies; `replaced` if it stands in for one of a damaged row group."""

    group: RowGroup
    row: int
    replaced: bool


class _Window:
    """What is left of one window of one lane from `place` on, `position` in the lane's stream."""

    def __init__(
        self, plan: LanePlan, lane: int, loader: Loader, place: Place, position: int
    ) -> None:
        self.plan, self.loader, self.place = plan, loader, place._replace(offset=0)
        self.rows = plan.rows_of(lane, place)
        groups, first = np.unique(self.rows.group[place.offset :], return_index=True)
        by_use = np.argsort(first)
        self._unasked = deque(
            zip(groups[by_use].tolist(), (position + first[by_use]).tolist(), strict=True)
        )
        self._groups, self._held = len(groups), dict[int, Loading]()
        self._replaced: set[int] = set()

    def __len__(self) -> int:
        return len(self.rows.row)

    def ask(self, share: float = 1.0) -> None:
        """Ask for this share of the row groups, in the order of their use."""
        while self._unasked and len(self._held) < share * self._groups:
            group, position = self._unasked.popleft()
            self._held[group] = self._load(group, position)

    def row(self, offset: int) -> _Row:
        group = int(self.rows.group[offset])
        while True:
            try:
                found = self._held[group].result()
            except Replaced:
                self._held[group] = self._load(group, 0)
                continue
            return _Row(found, int(self.rows.row[offset]) % found.rows, group in self._replaced)

    def _load(self, group: int, position: int) -> Loading:
        epoch = self.place.epoch
        source, flipped = self.loader.source, functools.partial(self.plan.flipped, epoch)
        if source.is_corrupt(group, flipped(group)):
            self._replaced.add(group)
            group = source.stand_in(group, self.plan.order(epoch), flipped)
        return self.loader.load(group, flipped(group), position)


class _Stream:
    """One lane: the window that its rows are taken from, and the next one on its way."""

    def __init__(self, plan: LanePlan, lane: int, loader: Loader) -> None:
        self.plan, self.lane, self.loader = plan, lane, loader
        self.current: _Window | None = None
        self.coming: _Window | None = None

    def ask(self, position: int, count: int) -> None:
        """Ask for what the rows at [position, position + count) of the lane's stream need, and for
        the part of the next window that is due with them.
        """
        place = self.plan.place(self.lane, position)
        if self.current is None:
            self._enter(place, position)
        assert self.current is not None and self.coming is not None
        self.coming.ask((place.offset + count) / (_ASKED_BY * len(self.current)))

    def take(self, position: int, count: int, out: list[_Row]) -> None:
        """Append the rows at [position, position + count) of the lane's stream to `out`."""
        for at in range(position, position + count):
            place = self.plan.place(self.lane, at)
            if self.current is None or self.current.place != place._replace(offset=0):
                self._enter(place, at)
            assert self.current is not None
            out.append(self.current.row(place.offset))

    def _enter(self, place: Place, position: int) -> None:
        expected = self.coming is not None and self.coming.place == place._replace(offset=0)
        self.current = self.coming if expected else self._window(place, position)
        assert self.current is not None
        self.current.ask()
        behind = position - place.offset + len(self.current)
        self.coming = self._window(self.plan.after(self.lane, place), behind)

    def _window(self, place: Place, position: int) -> _Window:
        return _Window(self.plan, self.lane, self.loader, place, position)
