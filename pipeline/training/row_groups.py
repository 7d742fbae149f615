"""Row groups in memory: read by threads, the most urgent first, each once while somebody holds it.

A store that is busy or out of reach is tried again by the storage; what is left of that ends the
run. A row group whose bytes are damaged ends it too, or is replaced by the next one of the epoch's
order that can be read: which one that is depends on the shards alone, so every world and every
restart finds the same.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from queue import PriorityQueue
from typing import Any, Literal, NamedTuple

import numpy as np

from pipeline.errors import UserError
from pipeline.shards import Manifest
from pipeline.shards_reader import Column, DamagedShard, ShardReader, Stacks
from pipeline.storage import Storage

# Shards whose footers are kept; a local one is an open file too.
_OPEN_LOCAL, _OPEN_REMOTE = 64, 512


class RowGroup(NamedTuple):
    """Columns of one row group: tensors where they lie, others as lists."""

    columns: dict[str, Column | list[Any]]
    rows: int


def gather(
    names: Iterable[str], rows: Sequence[tuple[RowGroup, int]], stacks: Stacks
) -> dict[str, Any]:
    """Columns of the given rows: arrays (rows, *shape), copied once, or lists."""
    found: dict[str, Any] = {}
    for name in names:
        picked: list[Any] = [(group.columns[name], row) for group, row in rows]
        tensor = isinstance(picked[0][0], Column)
        found[name] = stacks.stack(picked) if tensor else [values[row] for values, row in picked]
    return found


class Corrupt(NamedTuple):
    """A row group that cannot be read, though the store gives it."""

    path: str
    row_group: int
    rows: int
    error: str


class RowGroups:
    """The row groups of a split.

    Args:
        storage: the curated root.
        manifest: its manifest.
        columns: what is read of each row group; nothing else is fetched.
        split: train or test.
        corrupt: what follows one that is damaged: stop, or skip, which replaces its rows.
        verify: compare pages with their checksums.
    """

    def __init__(
        self,
        storage: Storage,
        manifest: Manifest,
        columns: Sequence[str],
        *,
        split: str = "train",
        corrupt: Literal["stop", "skip"] = "stop",
        verify: bool = False,
    ) -> None:
        self.storage, self.manifest, self.columns = storage, manifest, list(columns)
        self.skip, self.verify = corrupt == "skip", verify
        shards = manifest.split(split)
        # arrays: a billion images lie in tens of millions of row groups
        each = itertools.chain.from_iterable(shard["row_groups"] for shard in shards)
        self.sizes = np.fromiter(each, np.int64)
        """Rows of each."""
        self._paths = [shard["path"] for shard in shards]
        self._ends = np.cumsum([len(shard["row_groups"]) for shard in shards], dtype=np.int64)
        self._shards: OrderedDict[str, ShardReader] = OrderedDict()
        self._corrupt: dict[tuple[int, bool], Corrupt] = {}
        self._lock = threading.Lock()

    @property
    def corrupt(self) -> list[Corrupt]:
        """The damaged ones met so far."""
        return sorted(set(self._corrupt.values()))

    def is_corrupt(self, group: int, flip: bool = False) -> bool:
        """Whether it is known to be damaged, where the plain or the mirrored images are read."""
        return (group, flip) in self._corrupt

    def read(self, group: int, flip: bool = False) -> RowGroup:
        """Read a row group, here and now.

        Raises:
            UserError: the store refuses, the shard was made again since, or it is damaged.
            Replaced: it is damaged, and another one has to stand in.
        """
        (path, index), rows = self._where(group), int(self.sizes[group])
        try:
            shard = self._shard(path)
            if index >= len(shard.row_groups) or shard.row_groups[index] != rows:
                raise UserError(
                    f"{self.storage.url(path)} has other row groups than the manifest says: it was "
                    "made again since; run jobs/curate.py to its end, which seals it anew"
                )
            columns = shard.read(index, self.columns, flip=flip, verify=self.verify)
        except DamagedShard as error:
            if not self.skip:
                raise UserError(
                    f"cannot read row group {index} of {self.storage.url(path)}: {error}; curate "
                    "it again, or train without it (corrupt: skip)"
                ) from error
            self._corrupt[group, flip] = Corrupt(path, index, rows, str(error))
            raise Replaced from error
        return RowGroup(columns, rows)

    def stand_in(self, group: int, order: Iterable[int], flipped: Callable[[int], bool]) -> int:
        """The row group that stands in for a damaged one: the next of `order`, which begins anew
        at its end, that is not known to be damaged. `flipped`: which are read mirrored.
        """
        order = list(order)
        at = order.index(group)
        for other in itertools.chain(order[at + 1 :], order[:at]):
            if (other, flipped(int(other))) not in self._corrupt:
                return int(other)
        where = self.storage.url(self._where(group)[0])
        raise UserError(f"no row group can be read, {where} is one of them; curate again")

    def _where(self, group: int) -> tuple[str, int]:
        """A row group's shard, and its number in that."""
        shard = int(np.searchsorted(self._ends, group, side="right"))
        return self._paths[shard], group - (int(self._ends[shard - 1]) if shard else 0)

    def _shard(self, path: str) -> ShardReader:
        with self._lock:
            if path in self._shards:
                self._shards.move_to_end(path)
                return self._shards[path]
        shard = ShardReader(self.storage, self.manifest, path)
        with self._lock:
            self._shards[path] = shard
            # what is dropped is closed when its last reader is through
            while len(self._shards) > (_OPEN_LOCAL if self.storage.local else _OPEN_REMOTE):
                self._shards.popitem(last=False)
        return shard


class Replaced(Exception):
    """A row group is damaged, and the settings want another one in its stead."""


class Loading(Future[RowGroup]):
    """A row group that is being read, or has been; in memory as long as somebody holds this."""


class Loader:
    """Threads that read row groups, the most urgent of those that wait; used in a `with`."""

    def __init__(self, source: RowGroups, threads: int) -> None:
        self.source = source
        self._held: weakref.WeakValueDictionary[tuple[int, bool], Loading] = (
            weakref.WeakValueDictionary()
        )
        self._work: PriorityQueue[tuple[int, int, tuple[int, bool]]] = PriorityQueue()
        self._number, self._closed, self._lock = itertools.count(), False, threading.Lock()
        self._threads = threads
        for i in range(threads):
            threading.Thread(target=self._run, name=f"lane-reader-{i}", daemon=True).start()

    def load(self, group: int, flip: bool, urgency: int) -> Loading:
        """Ask for a row group, of the mirrored images where `flip`; the one in memory, if any.

        One that nobody holds any more is not read. A lower `urgency` goes first. The result raises
        as `RowGroups.read` does.
        """
        wanted = group, flip
        loading = self._held.get(wanted)
        if loading is None:
            loading = self._held[wanted] = Loading()
            self._work.put((urgency, next(self._number), wanted))
        return loading

    def _run(self) -> None:
        while True:
            wanted = self._work.get()[-1]
            if self._closed:
                return
            self._read(wanted)

    def _read(self, wanted: tuple[int, bool]) -> None:
        with self._lock:
            loading = self._held.get(wanted)
            if loading is None or loading.running() or loading.done():
                return  # nobody holds it, or somebody does again who asked a second time
            loading.set_running_or_notify_cancel()
        try:
            loading.set_result(self.source.read(*wanted))
        except BaseException as error:
            loading.set_exception(error)

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        """The threads end after what they are about; what waits is not read."""
        self._closed = True
        for _thread in range(self._threads):
            self._work.put((-1, next(self._number), (-1, False)))
