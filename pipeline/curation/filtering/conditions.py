"""Which rows of metadata pass, and under which condition the others are counted.

Two steps, for speed: numbers are judged on every row, while Parquet is being decoded, so that the
strings of a row that fails are never read; strings are judged on the few rows that are left.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import polars as pl

from pipeline.config import FilterConfig
from pipeline.curation.filtering.schemas import Mapped

SCORE_EDGES = [float(edge) for edge in np.arange(0.0, 10.5, 0.5)]
"""Bins of the histogram of aesthetic scores; what is outside counts in the first or last."""
_BINS = len(SCORE_EDGES) - 1
_PER_POINT = 2.0
_UNKNOWN = np.full(1, np.nan, np.float32)
_NUMBERS = ("aesthetic", "punsafe", "pwatermark", "similarity", "width", "height")


class Judge:
    """Counts the rows that it drops, each under the first condition that does:

    no_score, low_aesthetic (these with scores of a column), unsafe, watermark, low_similarity,
    small, aspect; then, of the rows left, no_url, language, caption_length.
    """

    def __init__(self, cfg: FilterConfig, mapped: Mapped) -> None:
        self.cfg, self.mapped = cfg, mapped
        self.seen = 0
        self.dropped: Counter[str] = Counter()
        self.scores = np.zeros(_BINS, np.int64)

    def numbers(self) -> pl.Expr:
        """Boolean: the row passes every condition on numbers. Counts as it is evaluated, which
        polars does once for each row, a row group at a time.
        """
        there = [name for name in _judged(self.cfg) if name in self.mapped.columns]
        there = there or ["url"]  # something to count, where a file has no number at all

        def judge(columns: Sequence[pl.Series]) -> pl.Series:
            return self._judge(len(columns[0]), dict(zip(there, columns, strict=True)))

        columns = [self.mapped.column(name) for name in there]
        return pl.map_batches(columns, judge, return_dtype=pl.Boolean, is_elementwise=True)

    def strings(self, rows: pl.DataFrame) -> tuple[pl.DataFrame, list[tuple[str, pl.DataFrame]]]:
        """The rows that pass the conditions on strings, and the others by reason."""
        left, rejects = rows, []
        for reason, fails in _on_strings(self.cfg):
            # a null is no failure, save where the condition says so itself
            failed = left.select(fails.fill_null(False)).to_series()
            self.dropped[reason] += int(failed.sum())
            rejects.append((reason, left.filter(failed)))
            left = left.filter(~failed)
        return left, rejects

    def reasons(self, rows: pl.DataFrame) -> pl.Series:
        """Why each row fails the conditions on numbers, null where it passes. Counts nothing."""
        reasons = np.full(rows.height, None, object)
        for reason, failed in _on_numbers(self.cfg, {name: rows[name] for name in _NUMBERS}):
            reasons[failed & (reasons == None)] = reason  # noqa: E711 (elementwise)
        return pl.Series("reason", reasons, pl.String)

    def _judge(self, rows: int, columns: Mapping[str, pl.Series]) -> pl.Series:
        alive, left = np.ones(rows, bool), rows
        self.seen += rows
        for reason, failed in _on_numbers(self.cfg, columns):
            alive &= ~failed
            still = int(np.count_nonzero(alive))
            self.dropped[reason] += left - still
            left = still
        if self.cfg.score == "column":
            self.scores += _histogram(_floats(columns["aesthetic"]))
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


def _on_numbers(
    cfg: FilterConfig, columns: Mapping[str, pl.Series]
) -> list[tuple[str, np.ndarray]]:
    """(reason, rows that fail), in the order in which they are asked. NaN fails no comparison, and
    an absent column is one NaN for all rows.
    """
    score, punsafe, pwatermark, similarity, width, height = (
        _floats(columns[name]) if name in columns else _UNKNOWN for name in _NUMBERS
    )
    failing: list[tuple[str, np.ndarray]] = []
    if cfg.score == "column":
        failing += [("no_score", np.isnan(score)), ("low_aesthetic", score <= cfg.min_aesthetic)]
    failing += [
        ("unsafe", punsafe >= cfg.max_punsafe),
        ("watermark", pwatermark >= cfg.max_pwatermark),
    ]
    if cfg.min_similarity > 0:
        failing.append(("low_similarity", similarity < cfg.min_similarity))
    if cfg.min_side > 0:  # a row of unknown size cannot promise one
        failing.append(("small", ~(np.minimum(width, height) >= cfg.min_side)))
    if cfg.max_aspect > 0:
        longer, shorter = np.maximum(width, height), np.minimum(width, height)
        failing.append(("aspect", longer > cfg.max_aspect * shorter))
    return failing


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
    known = scores[~np.isnan(scores)] if np.isnan(scores).any() else scores
    bins = (np.clip(known, 0.0, SCORE_EDGES[-1] - 0.01) * _PER_POINT).astype(np.uint8)
    return np.bincount(bins, minlength=_BINS)
