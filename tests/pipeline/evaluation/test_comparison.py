"""Is the new one better? Paired, by reference, and refused where pictures are no pairs."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline.config import CompareConfig
from pipeline.errors import UserError
from pipeline.evaluation.comparison import compare, compare_arms, compare_methods, verdict
from pipeline.evaluation.results import Measure, MethodInfo, Results
from pipeline.storage import Storage
from tests.pipeline.evaluation.test_results import MEASURES, PATH, made


def shifted(results: Results, name: str, by: float) -> Results:
    """The same pictures, with a measure higher by so much."""
    place = results.rows.schema.get_field_index(name)
    values = pa.array([None if v is None else v + by for v in results.rows[name].to_pylist()])
    return replace(results, rows=results.rows.set_column(place, name, values))


def with_all(results: Results, name: str, value: Any) -> Results:
    place = results.rows.schema.get_field_index(name)
    kind = results.rows.schema.field(name)
    values = pa.array([value] * len(results.rows), kind.type)
    return replace(results, rows=results.rows.set_column(place, kind, values))


def test_a_run_against_itself_is_undecided() -> None:
    results = made()
    found = compare_methods(results, results, "ssr-text", "ssr-text")
    assert (found.pairs, found.unpaired_a, found.unpaired_b) == (20, 0, 0)
    for of in found.differences:
        assert (of.difference, of.low, of.high, of.better_share) == (0, 0, 0, 0.5)
        assert of.mean_a == of.mean_b and of.verdict == "undecided"


def test_rounding_of_other_batches_and_threads_is_no_difference() -> None:
    results = made()
    found = compare_methods(results, shifted(results, "clip_t", 1e-4), "ssr-text", "ssr-text")
    of = found.differences[2]
    assert (of.difference, of.better_share, of.verdict) == (0, 0.5, "undecided")


@pytest.mark.parametrize(
    ("name", "by", "said", "share"),
    [
        ("clip_t", 0.01, "better", 1),
        ("clip_t", -0.01, "worse", 0),
        ("distance", 5.0, "worse", 0),
        ("distance", -5.0, "better", 1),
    ],
)
def test_a_shift_is_found_whole(name: str, by: float, said: str, share: float) -> None:
    results = made()
    found = compare_methods(results, shifted(results, name, by), "ssr-text", "ssr-text")
    for of in found.differences:
        if of.measure == name:
            assert (of.difference, of.low, of.high) == pytest.approx((by, by, by))
            assert (of.verdict, of.better_share) == (said, share)
        else:
            assert of.difference == 0 and of.verdict == "undecided"


def test_only_pairs_measured_on_both_sides_count() -> None:
    results = made()
    other = made(seed=1)
    found = compare_methods(results, other, "ssr-text", "ssr-text").differences[1]
    rows = [
        {r["key"]: r["distance"] for r in of.of_method("ssr-text").to_pylist()}
        for of in (results, other)
    ]
    both = [k for k in rows[0] if None not in (rows[0][k], rows[1][k])]
    assert 0 < found.pairs == len(both) < 20
    assert found.mean_a == pytest.approx(np.mean([rows[0][k] for k in both]))
    assert found.difference == pytest.approx(found.mean_b - found.mean_a)


def test_pairing_finds_what_two_means_would_not() -> None:
    """Requests differ by far more than the methods; the pairs do not."""
    rng = np.random.default_rng(0)
    base = made(references=40)
    hard = np.repeat(rng.normal(0, 1, 40), 2)
    place = base.rows.schema.get_field_index("clip_t")

    def scored(better: float) -> Results:
        values = np.tile(hard, 2) + 0.05 * rng.normal(size=160) + better
        return replace(base, rows=base.rows.set_column(place, "clip_t", pa.array(values)))

    a, b = scored(0.0), scored(0.05)
    found = compare_methods(a, b, "ssr-text", "ssr-text").differences[2]
    assert found.verdict == "better" and found.better_share > 0.99
    alone = [of.means("ssr-text")["clip_t"] for of in (a, b)]
    assert alone[0].high > alone[1].low  # their intervals overlap


def test_order_of_rows_does_not_matter() -> None:
    a, b = made(), made(seed=1)
    order = np.random.default_rng(1).permutation(len(b.rows))
    shuffled = replace(b, rows=b.rows.take(order))
    assert compare_methods(a, b, "ssr-text", "ssr-text") == compare_methods(
        a, shuffled, "ssr-text", "ssr-text"
    )


def test_what_only_one_drew_is_told() -> None:
    found = compare_methods(made(), made(references=8, first=6), "text-only", "ssr-text", 200)
    assert (found.pairs, found.unpaired_a, found.unpaired_b) == (8, 12, 8)
    assert found.differences[0].references == 4


def test_one_reference_decides_nothing() -> None:
    one = made(references=1)
    for of in compare_methods(one, shifted(one, "clip_t", 1.0), *["ssr-text"] * 2).differences:
        assert of.low is None and of.verdict == "undecided"


def test_verdicts_go_by_the_measures_direction() -> None:
    higher, lower = MEASURES[0], MEASURES[1]
    assert [verdict(higher, *b) for b in ((0.1, 0.2), (-0.2, -0.1), (-0.1, 0.1), (0, 0.1))] == [
        "better", "worse", "undecided", "undecided",
    ]  # fmt: skip
    assert [verdict(lower, *b) for b in ((0.1, 0.2), (-0.2, -0.1))] == ["worse", "better"]


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (lambda: replace(made(), bench={"name": "mini", "side": 64}), "'side' is 32 in A, 64 in B"),
        (lambda: replace(made(), bench={"name": "mini"}), "'side' is 32 in A, None in B"),
        (lambda: made(first=50), "no picture in common"),
        (lambda: with_all(made(), "seed", 7), "'bench-000-a' has seed 0 in A, 7 in B"),
        (lambda: with_all(made(), "prompt", "a fish"),
         "prompt 'a cup on grass' in A, 'a fish' in B"),
        (
            lambda: replace(made(), measures=(*MEASURES[:2], Measure("clip_t", "CLIP-T", "lower",
                            3, MEASURES[2].backbone))),
            "CLIP-T is better when higher in A, when lower in B",
        ),
    ],
)  # fmt: skip
def test_what_is_no_pair_is_refused(other: Callable[[], Results], said: str) -> None:
    with pytest.raises(UserError, match=said) as refused:
        compare_methods(made(), other(), "ssr-text", "ssr-text", 200)
    assert "\n" not in str(refused.value)


def test_scores_of_other_backbones_are_not_compared(tmp_path: Path) -> None:
    a, other = made(), Measure("clip_t", "CLIP-T", "higher", 3, "clip-large (4567)")
    b = replace(made(), measures=(*MEASURES[:2], other))
    found = compare_methods(a, b, "ssr-text", "ssr-text", 200)
    assert [of.measure for of in found.differences] == ["selected", "distance"]
    a.write(Storage(tmp_path / "a"), PATH)
    b.write(Storage(tmp_path / "b"), PATH)
    text = compare(CompareConfig(root=str(tmp_path / "a"), other=str(tmp_path / "b")))
    assert (
        "Not compared: CLIP-T looks with clip-tiny (0123) in A, with clip-large (4567) in B" in text
    )


# --- arms of several seeds --------------------------------------------------------------


def arms(effects: list[float]) -> Results:
    """A full arm and one without something, of a training seed for each effect."""
    rng = np.random.default_rng(2)
    rows: list[dict[str, Any]] = []
    for i, effect in enumerate(effects):
        base = made(references=30, seed=3).of_method("ssr-text").to_pylist()
        for row in base:
            noise = 0.01 * rng.normal()
            rows.append(row | {"method": f"without-{i}"})
            rows.append(row | {"method": f"full-{i}", "clip_t": row["clip_t"] + effect + noise})
    told = {row["method"]: MethodInfo(row["method"], True, {}) for row in rows}
    return Results.of(rows, {}, MEASURES, told)


@pytest.mark.parametrize(
    ("effects", "said"),
    [
        ([0.20, 0.22, 0.18], "better"),
        ([-0.20, -0.22, -0.18], "worse"),
        ([0.02, 0.20, 0.05], "undecided"),  # all above 0, as three of four times by chance
        ([0.20], "undecided"),
    ],
)
def test_arms_take_seeds_that_agree_by_more_than_chance(effects: list[float], said: str) -> None:
    seeds = range(len(effects))
    found = compare_arms(
        arms(effects), [f"without-{i}" for i in seeds], [f"full-{i}" for i in seeds], 1000
    )
    spread, verdict_of_b = found["clip_t"]
    assert spread.mean == pytest.approx(np.mean(effects), abs=0.003)
    assert verdict_of_b == said and found["selected"][1] == "undecided"
    with pytest.raises(UserError, match="arms of 2 and 1 training seeds"):
        compare_arms(arms(effects), ["without-0", "full-0"], ["full-0"])


# --- the command ------------------------------------------------------------------------


def test_the_command_writes_a_table_and_the_figures(tmp_path: Path) -> None:
    made().write(Storage(tmp_path / "old"), PATH)
    shifted(made(), "clip_t", 0.02).write(Storage(tmp_path / "new"), PATH)
    cfg = CompareConfig(root=str(tmp_path / "old"), other=str(tmp_path / "new"), resamples=500)
    said = compare(cfg)
    written = sorted((tmp_path / "old").rglob("comparison.*"))
    assert [path.name for path in written] == ["comparison.json", "comparison.md"]
    assert written[0].parent.parent == tmp_path / "old/evaluation/mini/comparisons"
    assert written[0].parent.name.startswith("new-")
    text = written[1].read_text()
    assert said.startswith(text) and str(written[1]) in said
    assert "### Method ssr-text" in text and "### Method text-only" in text
    line = next(line for line in text.splitlines() if line.startswith("| CLIP-T ↑"))
    assert "| +0.0200 [+0.0200, +0.0200] | 100.0 % | 20 | 10 | better |" in line
    assert "Of fewer than 20 references (here " in text  # ten are few
    told = json.loads(written[0].read_text())
    assert [c["method_b"] for c in told["comparisons"]] == ["text-only", "ssr-text"]
    assert told["comparisons"][0]["differences"][2]["verdict"] == "better"
    assert compare(cfg) == said and sorted((tmp_path / "old").rglob("comparison.*")) == written


def test_methods_of_one_run_can_be_compared(tmp_path: Path) -> None:
    made(references=40, better=0.2).write(Storage(tmp_path), PATH)
    out = str(tmp_path / "here")
    said = compare(CompareConfig(root=str(tmp_path), methods=["text-only:ssr-text"], out=out))
    assert "### A: Method text-only; B: Method ssr-text" in said
    assert "Of fewer than" not in said
    assert (tmp_path / "here/comparison.md").exists()
    assert not (tmp_path / "evaluation/mini/comparisons").exists()


def test_what_neither_has_is_no_line_and_no_verdict(tmp_path: Path) -> None:
    for name in "ab":
        with_all(made(), "clip_t", None).write(Storage(tmp_path / name), PATH)
    said = compare(CompareConfig(root=str(tmp_path / "a"), other=str(tmp_path / "b")))
    assert "CLIP-T" not in said and said.count(" | undecided |") == 2 * (len(MEASURES) - 1)
    assert f"there are {2 * (len(MEASURES) - 1)} here" in said


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"other": None}, "A and B are one run; name another with --other"),
        ({"other": None, "methods": ["ssr-text"]}, "A and B are one run"),
        ({"methods": ["ssr-text:"]}, "'ssr-text:' is no pair of methods"),
        ({"methods": ["ssr-txt"]}, "A has no method 'ssr-txt'; it has: text-only, ssr-text"),
        ({"methods": ["ssr-text:old"]}, "B has no method 'old'"),
        ({"bench": "../mini"}, "is no folder under evaluation/"),
        ({"bench": "dreambench"}, "there is no .*dreambench/scores.parquet"),
        ({"resamples": 5}, "compare.resamples is 5; it must be at least 100"),
    ],
)
def test_what_cannot_be_compared_is_one_line(
    change: dict[str, Any], said: str, tmp_path: Path
) -> None:
    for name in "ab":
        made().write(Storage(tmp_path / name), PATH)
    settings = {"root": str(tmp_path / "a"), "other": str(tmp_path / "b")} | change
    with pytest.raises(UserError, match=said) as refused:
        compare(CompareConfig(**settings))
    assert "\n" not in str(refused.value)


def test_runs_without_a_common_method_are_refused(tmp_path: Path) -> None:
    for name in "ab":
        made(methods=[f"ssr-{name}"]).write(Storage(tmp_path / name), PATH)
    with pytest.raises(UserError, match="no method is in both: A has ssr-a, B has ssr-b"):
        compare(CompareConfig(root=str(tmp_path / "a"), other=str(tmp_path / "b")))
