"""Intervals: exact where they can be worked out, and right as often as they say where not."""

import itertools

import numpy as np
import pytest

from pipeline.evaluation.bootstrap import intervals, over_seeds, resampled_means

NAN = np.nan


def clustered(
    rng: np.random.Generator, clusters: int, each: int, between: float, within: float
) -> tuple[np.ndarray, np.ndarray]:
    """Values of true mean 0, and their clusters."""
    common = np.repeat(rng.normal(0, between, clusters), each)
    return common[:, None] + rng.normal(0, within, (clusters * each, 1)), np.repeat(
        np.arange(clusters), each
    )


def covers(low: float | None, high: float | None, truth: float = 0.0) -> bool:
    assert low is not None and high is not None
    return low <= truth <= high


def test_two_clusters_worked_out() -> None:
    """Means of all four drawings: 1, 2.5 (twice) and 3: with two and one pictures, weighted."""
    values, clusters = [[1.0], [3.0], [3.0]], ["a", "b", "b"]
    drawn = resampled_means(values, clusters, 4000, seed=0)[:, 0]
    assert set(np.round(drawn, 12)) == {1.0, round(7 / 3, 12), 3.0}
    share = [np.isclose(drawn, mean).mean() for mean in (1, 7 / 3, 3)]
    np.testing.assert_allclose(share, [0.25, 0.5, 0.25], atol=0.03)
    [found] = intervals(values, clusters)
    assert (found.mean, found.low, found.high) == (pytest.approx(7 / 3), 1.0, 3.0)
    assert (found.samples, found.clusters) == (3, 2)


def test_small_case_against_every_resample() -> None:
    values = np.array([[0.0, 5.0], [1.0, 4.0], [4.0, 4.0], [2.0, 1.0], [9.0, 0.5]])
    clusters = np.array([0, 0, 1, 2, 3])
    parts = [values[clusters == c] for c in range(4)]
    every = [
        np.concatenate([parts[c] for c in chosen]).mean(0)
        for chosen in itertools.product(range(4), repeat=4)
    ]
    drawn = resampled_means(values, clusters, 50_000, seed=1)
    np.testing.assert_allclose(drawn.mean(0), np.mean(every, 0), rtol=0.01)
    np.testing.assert_allclose(drawn.std(0), np.std(every, 0), rtol=0.02)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    right = 0
    for trial in range(300):
        [found] = intervals(*clustered(rng, 60, 4, 1.0, 0.5), resamples=1000, seed=trial)
        right += covers(found.low, found.high)
    assert 0.90 <= right / 300 <= 0.99


def test_drawing_single_pictures_would_be_too_sure() -> None:
    rng = np.random.default_rng(1)
    right, ratio = 0, []
    for trial in range(100):
        values, clusters = clustered(rng, 40, 8, 1.0, 0.3)
        [naive] = intervals(values, np.arange(len(values)), resamples=500, seed=trial)
        [found] = intervals(values, clusters, resamples=500, seed=trial)
        right += covers(naive.low, naive.high)
        ratio.append((found.high - found.low) / (naive.high - naive.low))
    assert right < 80
    assert np.mean(ratio) == pytest.approx(np.sqrt(8 * 1 / 1.09), rel=0.1)  # the design effect


def test_order_of_rows_and_names_of_clusters_do_not_matter() -> None:
    rng = np.random.default_rng(2)
    values, clusters = clustered(rng, 12, 3, 1.0, 1.0)
    names = np.array([f"reference-{c:02d}" for c in clusters])
    [found] = intervals(values, clusters, 500)
    shuffled = rng.permutation(len(values))
    for other in (intervals(values, names, 500), intervals(values[shuffled], names[shuffled], 500)):
        assert other[0].low == pytest.approx(found.low, abs=1e-12)
        assert other[0].high == pytest.approx(found.high, abs=1e-12)
        assert other[0].mean == pytest.approx(found.mean, abs=1e-12)
    assert intervals(values, clusters, 500, seed=1) != intervals(values, clusters, 500)
    assert intervals(values, clusters, 500) == [found]


def test_measures_do_not_touch_one_another() -> None:
    rng = np.random.default_rng(3)
    values, clusters = rng.normal(size=(40, 3)), np.arange(40) // 4
    values[rng.random(values.shape) < 0.3] = NAN
    together = intervals(values, clusters, 300)
    for i, among in enumerate(together):
        [alone] = intervals(values[:, [i]], clusters, 300)
        assert (alone.low, alone.high) == pytest.approx((among.low, among.high), abs=1e-12)
        assert (alone.mean, alone.samples) == (among.mean, among.samples)


def test_what_was_not_measured_is_left_out() -> None:
    values = np.array([[1.0], [NAN], [3.0], [NAN], [NAN], [8.0]])
    [found] = intervals(values, [0, 0, 1, 2, 2, 3])
    assert (found.mean, found.samples, found.clusters) == (4.0, 3, 3)
    # of four clusters one has no value: a resample of it alone has no mean, and counts nowhere
    drawn = resampled_means(values, [0, 0, 1, 2, 2, 3], 20_000, seed=0)
    assert np.isnan(drawn).mean() == pytest.approx(0.25**4, abs=0.002)
    assert 1.0 <= found.low < found.high <= 8.0


@pytest.mark.parametrize("clusters", [["a", "a", "b"], ["a", "a", "a"]])
def test_one_cluster_has_no_interval(clusters: list[str]) -> None:
    [found] = intervals([[1.0], [2.0], [NAN]], clusters, 100)
    assert (found.mean, found.low, found.high) == (1.5, None, None)
    assert (found.samples, found.clusters) == (2, 1)


def test_nothing_measured_has_no_mean() -> None:
    for values, clusters in (([[NAN], [NAN]], [0, 1]), (np.zeros((0, 1)), [])):
        [found] = intervals(values, clusters, 100)
        assert (found.mean, found.low, found.high) == (None, None, None)
        assert (found.samples, found.clusters) == (0, 0)
    [spread] = over_seeds([([[NAN]], [0])], 100)
    assert (spread.mean, spread.low, spread.deviation, spread.margin) == (None,) * 4


def test_values_of_other_clusters_are_refused() -> None:
    with pytest.raises(ValueError, match="samples, measures"):
        intervals([[1.0], [2.0]], [0])


# --- training seeds ---------------------------------------------------------------------


def test_spread_over_seeds_is_that_of_their_means() -> None:
    clusters = [0, 0, 1, 1]
    runs = [([[v], [v], [v + 1], [v + 1]], clusters) for v in (1.0, 2.0, 6.0)]
    [found] = over_seeds(runs, 20_000)
    assert (found.mean, found.least, found.most) == (3.5, 1.5, 6.5)
    assert found.deviation == pytest.approx(np.std([1, 2, 6], ddof=1))
    assert found.margin == pytest.approx(4.303 * np.std([1, 2, 6], ddof=1) / np.sqrt(3))
    assert (found.seeds, found.clusters) == (3, 2)
    # sums of a mean of three drawn seeds (27 drawings) and of two drawn references (0, 0.5 or 1):
    # 1 comes with 1/108, and 4/3 with 3/108 more; from above 7 with 1/108, and 6.5 with 2/108 more
    assert found.low == pytest.approx(4 / 3) and found.high == pytest.approx(6.5)


def test_one_seed_is_the_interval_of_its_model() -> None:
    values, clusters = clustered(np.random.default_rng(4), 20, 3, 1.0, 1.0)
    [alone], [found] = intervals(values, clusters), over_seeds([(values, clusters)])
    assert found.low == pytest.approx(alone.low, abs=0.03)
    assert found.high == pytest.approx(alone.high, abs=0.03)
    assert (found.deviation, found.margin) == (None, None)


def test_seeds_that_agree_do_not_make_references_more() -> None:
    """Three equal runs know no more than one: their references are the same ones."""
    run = clustered(np.random.default_rng(5), 30, 2, 1.0, 0.2)
    [one], [three] = over_seeds([run]), over_seeds([run] * 3)
    assert three.high - three.low == pytest.approx(one.high - one.low, rel=0.05)


@pytest.mark.parametrize(
    ("seeds", "of_seeds", "lowest", "highest"),
    [
        (3, 0.02, 0.89, 0.99),  # references decide: as good as any
        (3, 2.0, 0.60, 0.80),  # seeds decide: what the docstring warns of
        (12, 2.0, 0.86, 0.98),  # many seeds
    ],
)
def test_coverage_over_seeds(seeds: int, of_seeds: float, lowest: float, highest: float) -> None:
    rng = np.random.default_rng(6)
    clusters = np.repeat(np.arange(40), 2)
    right = with_margin = 0
    for trial in range(300):
        common = np.repeat(rng.normal(0, 1, 40), 2)[:, None]
        runs = [
            (common + rng.normal(0, of_seeds) + rng.normal(0, 0.3, (80, 1)), clusters)
            for _ in range(seeds)
        ]
        [found] = over_seeds(runs, 300, seed=trial)
        right += covers(found.low, found.high)
        with_margin += abs(found.mean) <= found.margin
    assert lowest <= right / 300 <= highest
    if of_seeds > 1:
        assert 0.90 <= with_margin / 300 <= 0.99


def test_a_seed_without_a_value_is_left_out() -> None:
    runs = [([[1.0], [2.0]], [0, 1]), ([[NAN], [NAN]], [0, 1]), ([[3.0], [4.0]], [0, 1])]
    [found] = over_seeds(runs, 500)
    assert (found.mean, found.seeds, found.clusters) == (2.5, 2, 2)
    assert found.low is not None and 1.0 <= found.low < found.high <= 4.0
