"""Aesthetic scores of a second table, found by LAION's hash, the metadata's own key or the url.

Only scores above the bound are kept, 12 bytes each, sorted, in one file that every worker reads
once: the 12 M V2 scores of LAION-5B above 6 are 150 MB. A row that is not found has no such score.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
import pyarrow.parquet as pq

from pipeline.config import FilterConfig
from pipeline.curation.filtering.schemas import SOURCE_KEY, Mapped
from pipeline.curation.urls import hashes, keys_of
from pipeline.errors import UserError
from pipeline.storage import Storage
from pipeline.tasks import TASK_BYTES, Spread

FILE = "scan/_scores.parquet"
MOST = 200_000_000
"""Scores that are joined: 2.4 GB in every worker."""
_ROW_BYTES, _COPIES = 12, 4
JOIN_BYTES = TASK_BYTES + _COPIES * _ROW_BYTES * MOST
"""Memory that the task of the largest join may need."""


@dataclass(frozen=True)
class ScoreTable:
    """The joined table under a root; cheap to send to a worker, which reads it at the first use."""

    by: str
    mark: str
    """Tells this table from an earlier one at the same place."""
    rows: int = 0

    @property
    def memory(self) -> int:
        """What a worker holds of it, bytes."""
        return _ROW_BYTES * self.rows

    def look_up(self, rows: pl.DataFrame, storage: Storage) -> np.ndarray:
        """Scores of rows, float32; NaN where the table holds none above the bound."""
        ids, scores = _loaded(storage, self.mark)
        wanted = identities(rows, self.by)
        found = np.full(rows.height, np.nan, np.float32)
        if len(ids):
            places = np.minimum(np.searchsorted(ids, wanted), len(ids) - 1)
            hit = (ids[places] == wanted) & rows[_column(self.by)].is_not_null().to_numpy()
            found[hit] = scores[places[hit]]
        return found


def identities(rows: pl.DataFrame, by: str) -> np.ndarray:
    """What rows are found by, as uint64; of a null any number."""
    if by == "hash":
        return rows["hash"].fill_null(0).to_numpy().view(np.uint64)
    texts = rows[_column(by)].fill_null("")
    return keys_of(texts) if by == "url" else hashes(texts)


def above(url: str, mapped: Mapped, cfg: FilterConfig, storage: Storage, name: str) -> int:
    """Write one file's scores above the bound, sorted by identity, to `name`; returns how many."""
    source, file = Storage.for_path(url)
    ours = _column(cfg.score_by)
    with source.local_copy(file) as path:
        frame = pl.scan_parquet(path, glob=False, hive_partitioning=False)
        above_bound = frame.filter(mapped.column("aesthetic") > cfg.min_aesthetic)
        rows = above_bound.select(mapped.column(ours), mapped.column("aesthetic")).collect()
    rows = rows.filter(pl.col(ours).is_not_null())
    _write(storage, name, identities(rows, cfg.score_by), rows["aesthetic"].to_numpy())
    return rows.height


def merge(names: Sequence[str], storage: Storage) -> int:
    """Join the files' scores to FILE; of an identity that repeats the first counts."""
    tables = [_read(storage, name) for name in names]
    if (count := sum(len(ids) for ids, _ in tables)) > MOST:
        raise UserError(
            f"the score table has {count:,} scores above filter.min_aesthetic, and every worker "
            f"holds them: at most {MOST:,} can be joined; raise the bound, or join them beforehand"
        )
    ids = np.concatenate([ids for ids, _ in tables])
    scores = np.concatenate([scores for _, scores in tables])
    order = np.argsort(ids, kind="stable")
    ids, scores = ids[order], scores[order]
    first = np.ones(len(ids), bool)
    first[1:] = ids[1:] != ids[:-1]
    _write(storage, FILE, ids[first], scores[first])
    return int(first.sum())


def build(
    cfg: FilterConfig,
    mapped: Mapping[str, Mapped],
    storage: Storage,
    spread: Spread,
    mark: str,
) -> ScoreTable:
    """Read the score table's files, a task each, and make them one."""
    names = {url: f"scan/_scores/{number:05d}.parquet" for number, url in enumerate(mapped)}
    work = functools.partial(_above, mapped=mapped, names=names, cfg=cfg, storage=storage)
    rows = sum(spread(work, list(mapped), "scores"))
    joined = functools.partial(merge, storage=storage)
    # read, joined, sorted and written: some copies at once
    memory = TASK_BYTES + _COPIES * _ROW_BYTES * min(rows, MOST)
    [rows] = spread(joined, [list(names.values())], "", memory)
    return ScoreTable(cfg.score_by, mark, rows)


def _above(
    url: str,
    mapped: Mapping[str, Mapped],
    names: Mapping[str, str],
    cfg: FilterConfig,
    storage: Storage,
) -> int:
    return above(url, mapped[url], cfg, storage, names[url])


def _column(by: str) -> str:
    return SOURCE_KEY if by == "key" else by


@functools.lru_cache(maxsize=1)
def _loaded(storage: Storage, mark: str) -> tuple[np.ndarray, np.ndarray]:
    return _read(storage, FILE)


def _read(storage: Storage, name: str) -> tuple[np.ndarray, np.ndarray]:
    with storage.open_input(name) as file:
        table = pq.read_table(file)
    return table["id"].to_numpy(), table["score"].to_numpy()


def _write(storage: Storage, name: str, ids: np.ndarray, scores: np.ndarray) -> None:
    order = np.argsort(ids, kind="stable")
    table = pl.DataFrame({"id": ids[order], "score": scores[order].astype(np.float32)}).to_arrow()
    with storage.publish(name) as sink:
        pq.write_table(table, sink, compression="none", use_dictionary=False)
