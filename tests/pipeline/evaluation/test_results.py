"""The file of scores: what goes in comes out, and what did not come from here is one line."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import UserError
from pipeline.evaluation import markdown
from pipeline.evaluation.bootstrap import Interval
from pipeline.evaluation.results import COLUMNS, Measure, MethodInfo, Results
from pipeline.storage import Storage

PATH = "evaluation/mini/scores.parquet"
MEASURES = (
    Measure("selected", "all three", "higher", 2),
    Measure("distance", "distance to A", "lower", 0),
    Measure("clip_t", "CLIP-T", "higher", 3, backbone="clip-tiny (0123)"),
)


def made(
    methods: Sequence[str] = ("text-only", "ssr-text"),
    references: int = 10,
    seed: int = 0,
    better: float = 0.0,
    first: int = 0,
) -> Results:
    """Scores of two pictures a reference; the second method's are `better` by so much."""
    rng = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    for place, method in enumerate(methods):
        for i in range(first, first + references):
            for subject in "ab":
                rows.append({
                    "method": method, "key": f"bench-{i:03d}-{subject}",
                    "reference": f"bench-{i:03d}", "prompt": "a cup on grass", "seed": i,
                    "asked": subject.upper(), "selected": bool(rng.random() < 0.5),
                    "distance": None if rng.random() < 0.3 else 40 + 5 * rng.normal(),
                    "clip_t": 0.3 + 0.05 * rng.normal() + better * place,
                })  # fmt: skip
    told = {m: MethodInfo(f"Method {m}", True, {"scale": 1.0}) for m in methods}
    return Results.of(rows, {"name": "mini", "side": 32}, MEASURES, told)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    results, storage = made(), Storage(tmp_path)
    results.write(storage, PATH)
    again = Results.read(storage, PATH)
    assert again.rows.equals(results.rows)
    assert again.rows.schema.names == [*COLUMNS.names, "selected", "distance", "clip_t"]
    assert (again.bench, again.measures, again.methods) == (
        results.bench, results.measures, results.methods,
    )  # fmt: skip
    plain = pq.read_table(tmp_path / PATH).to_pandas()  # anybody's Parquet
    assert plain["selected"].isin([0.0, 1.0]).all() and plain["distance"].isna().any()


def test_an_object_store_holds_them_as_well(bucket: str) -> None:
    made().write(Storage(bucket), PATH)
    assert Results.read(Storage(bucket), PATH).rows.equals(made().rows)


def test_means_are_over_the_pictures_that_were_measured() -> None:
    results = made()
    rows = [r for r in results.rows.to_pylist() if r["method"] == "ssr-text"]
    distances = [r["distance"] for r in rows if r["distance"] is not None]
    found = results.means("ssr-text", resamples=500)
    assert list(found) == ["selected", "distance", "clip_t"]
    assert found["distance"].mean == pytest.approx(np.mean(distances))
    assert (found["distance"].samples, found["clip_t"].samples) == (len(distances), 20)
    assert found["clip_t"].clusters == 10
    assert found["clip_t"].low < found["clip_t"].mean < found["clip_t"].high
    spread = results.means_over_seeds(["text-only", "ssr-text"], 500)["clip_t"]
    means = [results.means(m, 100)["clip_t"].mean for m in results.methods]
    assert (spread.seeds, spread.least, spread.most) == (2, min(means), max(means))
    with pytest.raises(UserError, match="no method 'ssr'"):
        results.means("ssr")


def test_nan_is_not_measured() -> None:
    rows = made().rows.to_pylist()
    for row in rows[:3]:
        row["clip_t"] = float("nan")
    results = replace_rows(made(), rows)
    assert results.rows["clip_t"].null_count == 3
    assert results.means("text-only", 100)["clip_t"].samples == 17


def test_markdown_has_figures_to_the_right_and_an_interval_a_cell() -> None:
    header = ["10 held-out | references", *map(markdown.heading, MEASURES)]
    lines = markdown.table(header, [["text_only", "0.9", "150", "–"]]).splitlines()
    assert lines == [
        "| 10 held-out \\| references | all three ↑ | distance to A ↓ | CLIP-T ↑ |",
        "| --- | ---: | ---: | ---: |",
        "| text\\_only | 0.9 | 150 | – |",
    ]
    measure = MEASURES[0]
    assert markdown.cell(measure, Interval(0.9, 0.85, 0.9399, 9, 5)) == "0.90 [0.85, 0.94]"
    assert markdown.cell(measure, Interval(0.9, None, None, 9, 1)) == "0.90"
    assert markdown.cell(measure, Interval(None, None, None, 0, 0)) == "–"
    assert markdown.number(-0.0001, 2, signed=True) == "+0.00"
    assert markdown.number(-1.25, 1) == "−1.2"
    assert markdown.text("[a](x) <b>\n# *c*") == "\\[a\\](x) \\<b\\> \\# \\*c\\*"


# --- what is refused --------------------------------------------------------------------


def replace_rows(results: Results, rows: list[dict[str, Any]]) -> Results:
    return Results.of(rows, results.bench, results.measures, results.methods)


def with_row(change: dict[str, Any]) -> Results:
    rows = made().rows.to_pylist()
    rows[1] |= change
    return replace_rows(made(), rows)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: with_row({"key": "bench-000-a"}), "a picture is there twice"),
        (lambda: with_row({"method": "other"}), "nothing is told of method 'other'"),
        (lambda: with_row({"clip_t": float("inf")}), "column clip_t holds an infinite value"),
        (lambda: with_row({"reference": None}), "column reference lacks values"),
        (lambda: replace(made(), measures=MEASURES[:2]), "unknown column 'clip_t'"),
        (lambda: replace(made(), measures=(*MEASURES, Measure("x", "X", "lower"))), "lacks column"),
        (lambda: replace(made(), measures=MEASURES[::-1]), "in another order"),
        (lambda: made(methods=["../up"]), "'../up' cannot name a method"),
    ],
)
def test_parts_that_do_not_fit_are_refused(make: Callable[[], Results], said: str) -> None:
    with pytest.raises(UserError, match=said):
        make()


def told(**change: Any) -> dict[bytes, bytes]:
    """The metadata of `made`, with parts of it changed."""
    parts = {
        "bench": {},
        "measures": [
            {"name": m.name, "title": m.title, "better": m.better, "digits": 2} for m in MEASURES
        ],
        "methods": {
            m: {"title": m, "native": True, "settings": {}} for m in ("text-only", "ssr-text")
        },
    }
    return {b"ssr": json.dumps(parts | change).encode()}


def measure(**change: Any) -> dict[str, Any]:
    return {"name": "selected", "title": "x", "better": "lower", "digits": 2} | change


def tables() -> dict[str, tuple[pa.Table, dict[bytes, bytes] | None, str]]:
    rows = made().rows
    floats = rows.set_column(4, "seed", rows["seed"].cast(pa.float64()))
    nested = rows.set_column(8, "clip_t", pa.array([[1.0]] * len(rows)))
    return {
        "no metadata": (rows, None, "no metadata `ssr`"),
        "not JSON": (rows, {b"ssr": b"{"}, "no readable Parquet file of results"),
        "deep JSON": (rows, {b"ssr": b"[" * 200_000}, "no readable Parquet file of results"),
        "a list": (rows, {b"ssr": b"[]"}, "no JSON object"),
        "no measures": (rows, told(measures=None), "has no measures"),
        "measures are names": (rows, told(measures=["clip_t"]), "is no JSON object"),
        "better is odd": (rows, told(measures=[measure(better="more")]), "better 'more'"),
        "better is a list": (rows, told(measures=[measure(better=[])]), "better []"),
        "digits": (rows, told(measures=[measure(digits=10**9)]), "digits 1000000000"),
        "title": (rows, told(measures=[measure(title="a\nb")]), "title 'a\\nb'"),
        "name": (rows, told(measures=[measure(name="a|b")]), "cannot name a measure"),
        "own name": (rows, told(measures=[measure(name="seed")]), "cannot name a measure"),
        "methods": (rows, told(methods={"text-only": {"title": "x"}}), "has native None"),
        "seeds are floats": (floats, told(), "column seed is double, not int64"),
        "nested": (nested, told(), "column clip_t is list<"),
        "lacking": (rows.drop_columns("prompt"), told(), "lacks column prompt"),
        "too much": (rows.append_column("x", rows["seed"]), told(), "unknown column 'x'"),
    }


@pytest.mark.parametrize("case", tables())
def test_a_file_that_is_not_ours_is_one_line(case: str, tmp_path: Path) -> None:
    rows, metadata, said = tables()[case]
    (tmp_path / PATH).parent.mkdir(parents=True)
    pq.write_table(rows.replace_schema_metadata(metadata), tmp_path / PATH)
    line = refusal(tmp_path)
    assert said in line


def refusal(root: Path) -> str:
    with pytest.raises(UserError) as refused:
        Results.read(Storage(root), PATH)
    line = str(refused.value)
    assert str(root / PATH) in line and "\n" not in line and len(line) < 500
    return line


def test_sizes_beyond_reason_are_refused_before_they_are_read(tmp_path: Path) -> None:
    (tmp_path / PATH).parent.mkdir(parents=True)
    rows = made().rows
    many = pa.table({name: pa.nulls(3_000_000, rows[name].type) for name in rows.column_names})
    pq.write_table(many.replace_schema_metadata(told()), tmp_path / PATH, compression="zstd")
    assert (tmp_path / PATH).stat().st_size < 1_000_000
    assert "3,000,000 rows of 9 columns" in refusal(tmp_path)

    # a file of kilobytes whose text would take 400 MB: one long prompt, which every row names
    index = pa.array(np.zeros(4000, np.int32))
    keys = pa.array([f"k{i}" for i in range(4000)])
    columns = {name: pa.nulls(4000, rows[name].type) for name in rows.column_names}
    columns |= {"method": pa.array(["ssr-text"] * 4000), "key": keys, "reference": keys}
    columns["prompt"] = pa.DictionaryArray.from_arrays(index, pa.array(["x" * 100_000]))
    columns["seed"] = pa.array(np.arange(4000))
    pq.write_table(pa.table(columns).replace_schema_metadata(told()), tmp_path / PATH)
    assert (tmp_path / PATH).stat().st_size < 1_000_000
    assert "column prompt unpacks to 400,000,000 bytes" in refusal(tmp_path)


def test_damaged_and_missing_files_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no .*run python jobs/evaluate\.py"):
        Results.read(Storage(tmp_path), PATH)
    made().write(Storage(tmp_path), PATH)
    whole = (tmp_path / PATH).read_bytes()
    for data in (b"", b"PAR1", b"no Parquet at all", whole[:-20], whole[: len(whole) // 2]):
        (tmp_path / PATH).write_bytes(data)
        assert "no readable Parquet file of results" in refusal(tmp_path)
    rng = np.random.default_rng(0)
    for _ in range(100):  # anywhere: read as it stands, or refused, and nothing else
        broken = bytearray(whole)
        for at in rng.integers(0, len(whole), 5):
            broken[at] = rng.integers(256)
        (tmp_path / PATH).write_bytes(broken)
        try:
            Results.read(Storage(tmp_path), PATH)
        except UserError as error:
            assert "\n" not in str(error)
