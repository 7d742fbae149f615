"""Which rows of metadata pass, and under which condition the others are counted.

Two steps, for speed: numbers are judged on every row, while Parquet is being decoded, so that the
strings of a row that fails are never read; strings are judged on the few rows that are left.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import polars as pl

from pipeline.config import FilterConfig
from pipeline.curation.filtering.schemas import Mapped

SCORE_EDGES = [float(edge) for edge in np.arange(0.0, 10.5, 0.5)]
"""Bins of the histogram of aesthetic scores; what is outside counts in the first or last."""
_BINS = len(SCORE_EDGES) - 1
_PER_POINT = 2.0
_UNKNOWN = np.full(1, np.nan, np.float32)
Columns = Mapping[str, np.ndarray]
Fails = Callable[[Columns], np.ndarray]
_NUMBERS = ("aesthetic", "punsafe", "pwatermark", "similarity", "width", "height")


class Judge:
    """Counts the rows that it drops, each under the first condition that does:

    no_score, low_aesthetic (these with scores of a column), unsafe, watermark, low_similarity,
    small, aspect; then, of the rows left, no_url, language, caption_length.
    """

    def __init__(self, cfg: FilterConfig, mapped: Mapped) -> None:
        self.cfg, self.mapped = cfg, mapped
        self._clear()

    def _clear(self) -> None:
        self.seen = 0
        self.dropped: Counter[str] = Counter()
        self.scores = np.zeros(_BINS, np.int64)

    def numbers(self) -> pl.Expr:
        """Boolean: the row passes every condition on numbers. Counts as it is evaluated, which
        polars does once for each row, a row group at a time.
        """
        names = self._there()

        def judge(columns: Sequence[pl.Series]) -> pl.Series:
            return self._judge(len(columns[0]), dict(zip(names, columns, strict=True)))

        columns = [self.mapped.number(name) for name in names]
        return pl.map_batches(columns, judge, return_dtype=pl.Boolean, is_elementwise=True)

    def count(self, frame: pl.LazyFrame) -> None:
        """Count the rows of `frame` anew, by themselves."""
        self._clear()
        rows = frame.select(
            self.mapped.number(name).alias(name) for name in self._there()
        ).collect()
        self._judge(rows.height, rows.to_dict())

    def strings(self, rows: pl.DataFrame) -> tuple[pl.DataFrame, list[tuple[str, pl.DataFrame]]]:
        """The rows that pass the conditions on strings, and the others by reason."""
        left, rejects = rows, []
        for reason, fails in _on_strings(self.cfg):
            # a null is no failure, save where the condition says so itself
            failed = left.select(fails.fill_null(False)).to_series()
            if lost := int(failed.sum()):
                self.dropped[reason] += lost
                rejects.append((reason, left.filter(failed)))
                left = left.filter(~failed)
        return left, rejects

    def reasons(self, rows: pl.DataFrame) -> pl.Series:
        """Why each row fails the conditions on numbers, null where it passes. Counts nothing."""
        reasons = np.full(rows.height, None, object)
        columns = {name: _floats(rows[name]) for name in _NUMBERS}
        for reason, fails in reversed(_on_numbers(self.cfg)):  # the first one is written last
            reasons[fails(columns)] = reason
        return pl.Series("reason", reasons, pl.String)

    def _there(self) -> list[str]:
        """Columns to judge; the url where a file has none of them, for something to count."""
        return [name for name in _judged(self.cfg) if name in self.mapped.columns] or ["url"]

    def _judge(self, rows: int, columns: Mapping[str, pl.Series]) -> pl.Series:
        numbers = dict.fromkeys(_NUMBERS, _UNKNOWN) | {
            name: _floats(column) for name, column in columns.items() if name in _NUMBERS
        }
        if self.cfg.score == "column":
            self.scores += _histogram(numbers["aesthetic"])
        alive, places = np.ones(rows, bool), None
        left = rows
        self.seen += rows
        for reason, fails in _on_numbers(self.cfg):
            failed = fails(numbers)
            if not failed.any():
                continue
            if len(failed) != left:  # an absent column, which fails for all
                failed = np.broadcast_to(failed, left)
            lost = int(np.count_nonzero(failed))
            self.dropped[reason] += lost
            left -= lost
            kept = np.flatnonzero(~failed)
            places = kept if places is None else places[kept]
            # the conditions that follow are asked of the rows that are left
            numbers = {n: v if v is _UNKNOWN else v[kept] for n, v in numbers.items()}
        if places is not None:
            alive[:] = False
            alive[places] = True
        return pl.Series(alive)


def _judged(cfg: FilterConfig) -> list[str]:
    """The columns that some condition on numbers asks for; the others are not decoded."""
    asked = {
        "aesthetic": cfg.score == "column",
        "similarity": cfg.min_similarity > 0,
        "width": cfg.min_side > 0 or cfg.max_aspect > 0,
        "height": cfg.min_side > 0 or cfg.max_aspect > 0,
    }
    return [name for name in _NUMBERS if asked.get(name, True)]


def _on_numbers(cfg: FilterConfig) -> list[tuple[str, Fails]]:
    """(reason, which rows fail), in the order in which they are asked. NaN fails no comparison, and
    an absent column is one NaN for all rows.
    """

    def aspect(columns: Columns) -> np.ndarray:
        width, height = columns["width"], columns["height"]
        return np.maximum(width, height) > cfg.max_aspect * np.minimum(width, height)

    def small(columns: Columns) -> np.ndarray:  # a row of unknown size cannot promise one
        return ~(np.minimum(columns["width"], columns["height"]) >= cfg.min_side)

    scored, similar = cfg.score == "column", cfg.min_similarity > 0
    asked: list[tuple[bool, str, Fails]] = [
        (scored, "no_score", lambda c: np.isnan(c["aesthetic"])),
        (scored, "low_aesthetic", lambda c: c["aesthetic"] <= cfg.min_aesthetic),
        (True, "unsafe", lambda c: c["punsafe"] >= cfg.max_punsafe),
        (True, "watermark", lambda c: c["pwatermark"] >= cfg.max_pwatermark),
        (similar, "low_similarity", lambda c: c["similarity"] < cfg.min_similarity),
        (cfg.min_side > 0, "small", small),
        (cfg.max_aspect > 0, "aspect", aspect),
    ]
    return [(reason, fails) for wanted, reason, fails in asked if wanted]


def _on_strings(cfg: FilterConfig) -> list[tuple[str, pl.Expr]]:
    url = pl.col("url").str.strip_chars()
    failing = [("no_url", url.is_null() | (url.str.len_bytes() == 0))]
    if cfg.languages:
        listed = [language.lower() for language in cfg.languages]
        failing.append(("language", ~pl.col("language").str.to_lowercase().is_in(listed)))
    length = pl.col("alt_text").str.len_chars().fill_null(0)
    if cfg.min_caption > 0:
        failing.append(("caption_length", length < cfg.min_caption))
    if cfg.max_caption > 0:
        failing.append(("caption_length", length > cfg.max_caption))
    return failing


def _floats(column: pl.Series) -> np.ndarray:
    """As floats, null as NaN."""
    values = column.to_numpy()
    return values if values.dtype.kind == "f" else values.astype(np.float64)


def _histogram(scores: np.ndarray) -> np.ndarray:
    if not len(scores):
        return np.zeros(_BINS, np.int64)
    lowest, highest = scores.min(), scores.max()
    if not (lowest >= 0 and highest < SCORE_EDGES[-1]):  # or a NaN among them, which is no score
        scores = np.clip(scores[~np.isnan(scores)], 0.0, SCORE_EDGES[-1] - 0.01)
    return np.bincount((scores * _PER_POINT).astype(np.uint8), minlength=_BINS)
