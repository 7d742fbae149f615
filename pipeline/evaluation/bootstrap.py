"""How sure a mean over pictures is: percentile bootstrap, references drawn whole.

Pictures of one reference are alike: they share its subjects, and often its noise. Drawing single
pictures would take them for independent and find intervals that are too narrow, so references
("clusters") are drawn with replacement, each with all its pictures (Davison and Hinkley, Bootstrap
Methods and their Application, 1997, section 3.8). A value that is NaN was not measured, and counts
nowhere.

What percentile intervals cannot do: of few clusters they are too narrow, for values that are about
normal by nearly a fifth at ten clusters, a tenth at twenty, a twentieth at forty.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

RESAMPLES = 10_000
LEVEL = 0.95
"""Share of such intervals that hold the true mean, where clusters are many."""
FEW_CLUSTERS = 20
"""With fewer, intervals are too narrow by a tenth and more."""
_BLOCK = 1 << 17
"""Draws held at once: 1 MiB of them, and as much of weights."""
_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""Student's t at 97.5 %, of 1, 2, ... degrees of freedom; of more the last, which is wider."""


@dataclass(frozen=True)
class Interval:
    """A mean over samples, and where the true one lies with 95 %."""

    mean: float | None
    """None = no sample has a value."""
    low: float | None
    high: float | None
    """None = fewer than two clusters have a value, which tell nothing of how clusters differ."""
    samples: int
    """Samples with a value."""
    clusters: int
    """Clusters with a value."""


@dataclass(frozen=True)
class Spread:
    """A mean over training seeds of one arm: how it differs between them, and an interval."""

    mean: float | None
    """Mean over seeds of each seed's mean over its samples; None = nothing was measured."""
    low: float | None
    high: float | None
    """See `over_seeds` for what they hold; None = fewer than two clusters have a value."""
    deviation: float | None
    """Sample standard deviation over seeds (n - 1); None = fewer than two seeds have a value."""
    least: float | None
    most: float | None
    """The lowest and the highest seed's mean."""

    seeds: int
    """Seeds with a value."""
    clusters: int
    """Clusters with a value in any seed."""

    @property
    def margin(self) -> float | None:
        """Half of Student's 95 % interval over seeds, on these references: at three seeds 2.5
        deviations. None = fewer than two seeds have a value.
        """
        if self.deviation is None:
            return None
        quantile = _STUDENT[min(self.seeds - 1, len(_STUDENT)) - 1]
        return quantile * self.deviation / float(np.sqrt(self.seeds))


def intervals(
    values: ArrayLike, clusters: ArrayLike, resamples: int = RESAMPLES, seed: int = 0
) -> list[Interval]:
    """Mean and interval of each measure.

    values: (samples, measures), NaN = not measured; clusters: (samples,) names, in any order. The
    same draws serve all measures. Memory does not grow with `resamples` but for one float64 each
    and measure.
    """
    return summarise(values, clusters, resampled_means(values, clusters, resamples, seed))


def summarise(values: ArrayLike, clusters: ArrayLike, drawn: Floats) -> list[Interval]:
    """Mean and interval of each measure from its resamples, which `resampled_means` drew."""
    array, names = _checked(values, clusters)
    return [_interval(array[:, i], names, drawn[:, i]) for i in range(array.shape[1])]


def resampled_means(values: ArrayLike, clusters: ArrayLike, resamples: int, seed: int) -> Floats:
    """Means of each resample, (resamples, measures); NaN where it drew no sample with a value."""
    array, names = _checked(values, clusters)
    order, place = np.unique(names, return_inverse=True)
    cells = _Cells.of(array, place, len(order))
    blocks = [cells.means(weights) for weights in _weights(len(order), resamples, _generator(seed))]
    return np.concatenate(blocks) if blocks else np.full((resamples, array.shape[1]), np.nan)


def over_seeds(
    runs: Sequence[tuple[ArrayLike, ArrayLike]], resamples: int = RESAMPLES, seed: int = 0
) -> list[Spread]:
    """Mean, spread and interval of each measure over training seeds of one arm.

    runs: for each training seed its values (samples, measures) and clusters (samples,), as
    `intervals` takes them. In each resample seeds are drawn with replacement, and references: one
    drawing of references for all seeds, which were scored on the same ones (the pigeonhole
    bootstrap, Owen, Annals of Applied Statistics 1, 2007).

    What it can tell: how much references and the seeds at hand matter together. What it cannot,
    with few seeds: no resample reaches beyond the seeds that were trained. Where the seed decides
    and the references hardly matter, three seeds lie all on one side of the true mean one time in
    four, so that the interval holds it 75 % of the time at most, not 95 %; and a deviation of three
    values is itself uncertain by half. Read it beside `Spread.margin`, which does widen. With one
    seed it is the interval of that model, and says nothing of another training of it.
    """
    checked = [_checked(values, clusters) for values, clusters in runs]
    order, places = np.unique(np.concatenate([names for _, names in checked]), return_inverse=True)
    starts = np.cumsum([len(names) for _, names in checked])[:-1]
    parts = zip(checked, np.split(places, starts), strict=True)
    cells = [_Cells.of(array, place, len(order)) for (array, _), place in parts]
    means = np.stack([_means(array) for array, _ in checked])  # (seeds, measures)

    generator = _generator(seed)
    drawn = []
    for weights in _weights(len(order), resamples, generator):
        of_seeds = np.stack([cell.means(weights) for cell in cells], axis=1)
        chosen = generator.integers(0, len(cells), (len(weights), len(cells)))
        drawn.append(_mean(np.take_along_axis(of_seeds, chosen[:, :, None], axis=1), axis=1))
    resampled = np.concatenate(drawn)
    having = np.sum([cell.counts for cell in cells], axis=0) > 0  # (clusters, measures)
    return [
        _spread(means[:, i], int(having[:, i].sum()), resampled[:, i])
        for i in range(means.shape[1])
    ]


@dataclass(frozen=True)
class _Cells:
    """Samples added up by cluster: all that a mean over drawn clusters needs."""

    sums: Floats
    """(clusters, measures)"""
    counts: Floats
    """(clusters, measures): samples with a value."""

    @classmethod
    def of(cls, values: Floats, place: NDArray[np.intp], clusters: int) -> _Cells:
        known = ~np.isnan(values)
        filled = np.where(known, values, 0.0)

        def add(columns: Floats) -> Floats:
            added = [np.bincount(place, column, clusters) for column in columns.T]
            return np.stack(added, axis=1) if added else np.zeros((clusters, 0))

        return cls(add(filled), add(known.astype(np.float64)))

    def means(self, weights: Floats) -> Floats:
        """(resamples, clusters) -> (resamples, measures)."""
        return _divided(weights @ self.sums, weights @ self.counts)


def _weights(clusters: int, resamples: int, generator: np.random.Generator) -> Iterator[Floats]:
    """How often each resample draws each cluster, (some resamples, clusters) at a time."""
    if not clusters:
        return
    step = max(1, _BLOCK // clusters)
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        drawn = generator.integers(0, clusters, (rows, clusters))
        drawn += np.arange(rows)[:, None] * clusters
        counted = np.bincount(drawn.ravel(), minlength=rows * clusters)
        yield counted.reshape(rows, clusters).astype(np.float64)


def _interval(values: Floats, names: NDArray[Any], drawn: Floats) -> Interval:
    known = ~np.isnan(values)
    clusters = len(np.unique(names[known]))
    low, high = _bounds(drawn, clusters)
    mean = float(values[known].mean()) if known.any() else None
    return Interval(mean, low, high, int(known.sum()), clusters)


def _spread(means: Floats, clusters: int, drawn: Floats) -> Spread:
    known = means[~np.isnan(means)]
    if not len(known):
        return Spread(None, None, None, None, None, None, 0, 0)
    low, high = _bounds(drawn, clusters)
    deviation = float(known.std(ddof=1)) if len(known) > 1 else None
    least, most = float(known.min()), float(known.max())
    return Spread(float(known.mean()), low, high, deviation, least, most, len(known), clusters)


def _bounds(drawn: Floats, clusters: int) -> tuple[float | None, float | None]:
    known = drawn[~np.isnan(drawn)]
    if clusters < 2 or not len(known):
        return None, None
    low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _means(values: Floats) -> Floats:
    return _mean(values, axis=0)


def _mean(values: Floats, axis: int) -> Floats:
    """Means over an axis of what is not NaN; NaN where all is."""
    known = ~np.isnan(values)
    return _divided(np.where(known, values, 0.0).sum(axis), known.sum(axis).astype(np.float64))


def _divided(sums: Floats, counts: Floats) -> Floats:
    return np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0)


def _checked(values: ArrayLike, clusters: ArrayLike) -> tuple[Floats, NDArray[Any]]:
    array, names = np.asarray(values, np.float64), np.asarray(clusters)
    if array.ndim != 2 or names.shape != array.shape[:1]:
        raise ValueError(
            f"values {array.shape} are not (samples, measures) of {names.shape} clusters"
        )
    return array, names


def _generator(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)
