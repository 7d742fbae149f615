"""The filter: any LAION-like schema, every row accounted for, the same units every time."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from pipeline.config import FilterConfig
from pipeline.curation.filtering.metadata import UNIT, Filter
from pipeline.errors import UserError
from pipeline.miniworld import links
from pipeline.storage import Storage
from pipeline.units import Tally, fingerprint, run_unit

COLUMNS = [
    *("key", "url", "alt_text", "aesthetic", "predictor", "width", "height"),
    *("similarity", "hash", "punsafe", "pwatermark", "language", "split"),
]


def rows(count: int, **columns: Any) -> dict[str, Any]:
    return {
        "url": [f"http://example.org/{number}.jpg" for number in range(count)],
        "AESTHETIC_SCORE": [6.5] * count,
        **columns,
    }


def run(
    root: Path, frame: dict[str, Any] | pl.DataFrame, **settings: Any
) -> tuple[Tally, pl.DataFrame]:
    (root / "in").mkdir(parents=True, exist_ok=True)
    pl.DataFrame(frame).write_parquet(root / "in" / "a.parquet")
    cfg = replace(FilterConfig(unit_rows=4, test_rows=0), **settings)
    stage = Filter(cfg, [str(root / "in")])
    tally = run_unit(stage, UNIT, Storage(root), fingerprint(stage, None)).tally
    units = [pl.read_parquet(root / f"units/{unit}.parquet") for unit in tally.extra["units"]]
    return tally, pl.concat(units)


def test_the_mini_world_is_filtered_and_every_row_accounted_for(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    links.write_metadata(storage, "web/metadata", "http://127.0.0.1:1", 1500, seed=0)
    cfg = FilterConfig(unit_rows=100, test_rows=120, min_side=20)
    stage = Filter(cfg, [storage.url("web/metadata")])
    marker = run_unit(stage, UNIT, storage, fingerprint(stage, None))
    tally = marker.tally
    assert tally.rows_in == 1500 == tally.kept + sum(tally.dropped.values())
    for reason in ("low_aesthetic", "no_score", "unsafe", "watermark", "small", "duplicate_url"):
        assert tally.dropped[reason] > 0
    units = tally.extra["units"]
    assert units[:2] == ["test-00000", "test-00001"] and units[2] == "train-00000"
    assert storage.list("units") == sorted(
        [f"units/{unit}.parquet" for unit in units] + ["units/_done/_all.json"]
    )
    frames = {unit: pl.read_parquet(tmp_path / f"units/{unit}.parquet") for unit in units}
    table = pl.concat(frames.values())
    assert table.columns == COLUMNS
    assert sum(frame.height for unit, frame in frames.items() if unit[:4] == "test") == 120
    for unit, frame in frames.items():
        assert frame["split"].unique().to_list() == [unit.partition("-")[0]]
        assert frame.height <= 100
    assert table["key"].n_unique() == table["url"].n_unique() == table.height == tally.kept
    assert table["key"].str.len_bytes().unique().to_list() == [16]
    assert table["aesthetic"].min() > 6 and table["predictor"].unique().to_list() == ["v2"]
    assert len(tally.extra["schemas"]) == 3
    assert sum(tally.extra["scores"]["rows"]) == 1500 - tally.dropped["no_score"]


def test_a_row_counts_under_the_first_reason_that_drops_it(tmp_path: Path) -> None:
    tally, kept = run(
        tmp_path,
        {
            "url": ["u:1", "u:2", "u:3", "u:4", "u:5", "u:6", "u:7", "u:8", None, " ", "u:9"],
            "AESTHETIC_SCORE": [None, float("nan"), 6.0, *[7.0] * 8],
            "punsafe": [0.9, 0.9, 0.9, 0.5, 0.1, 0.1, *[None] * 5],
            "pwatermark": [0.9, 0.9, 0.9, 0.9, 0.8, *[None] * 6],
            "similarity": [0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.2, *[None] * 4],
            "width": [1, 1, 1, 1, 1, 1, 600, 1300, 600, 600, 1200],
            "height": [1, 1, 1, 1, 1, 1, 511, 600, 600, 600, 600],
        },
        min_side=512,
        min_similarity=0.15,
        max_aspect=2.0,
    )
    assert tally.dropped == {
        **{"no_score": 2, "low_aesthetic": 1, "unsafe": 1, "watermark": 1, "low_similarity": 1},
        **{"small": 1, "aspect": 1, "no_url": 2},
    }
    assert kept["url"].to_list() == ["u:9"]


def test_conditions_on_words(tmp_path: Path) -> None:
    frame = rows(
        6,
        LANGUAGE=["en", "EN", "de", None, "en", "en"],
        TEXT=["a cat", "a dog", "ein Hund", "a fox", "owl", "a very long text"],
    )
    words = {"languages": ["en"], "min_caption": 4, "max_caption": 8}
    tally, kept = run(tmp_path, frame, **words)
    assert tally.dropped == {"language": 1, "caption_length": 2}
    assert sorted(kept["alt_text"]) == ["a cat", "a dog", "a fox"]


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"max_aspect": 0.5}, "max_aspect"),
        ({"min_caption": 9, "max_caption": 3}, "max_caption"),
        ({"score": "table"}, "score_inputs"),
        ({"score_inputs": ["x"]}, "score_inputs"),
    ],
)
def test_settings_that_contradict_each_other(settings: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=line):
        FilterConfig(**settings)


def test_columns_pass_through_on_request(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    extra = {"MD5": ["x", "y"], "faces": pl.Series([1, 2], dtype=pl.Int16)}
    pl.DataFrame(rows(2, **extra)).write_parquet(tmp_path / "in/0.parquet")
    urls = {"url": ["http://b.org/1"], "AESTHETIC_SCORE": [7.0]}
    pl.DataFrame({**urls, "faces": ["3"]}).write_parquet(tmp_path / "in/1.parquet")
    _, kept = run(tmp_path, urls, keep_columns=["md5", "faces"])  # and a third file, with neither
    assert kept.schema["md5"] == pl.String and kept.schema["faces"] == pl.String
    assert sorted(kept.select("md5", "faces").iter_rows(), key=str) == [
        *(("x", "1"), ("y", "2"), (None, "3"))
    ]
    nulls = {**urls, "faces": pl.Series([None], dtype=pl.Null)}
    pl.DataFrame(nulls).write_parquet(tmp_path / "in/0.parquet")
    pl.DataFrame({**urls, "faces": pl.Series([2**40])}).write_parquet(tmp_path / "in/1.parquet")
    units = tmp_path / "wide"
    stage = Filter(FilterConfig(keep_columns=["faces"], test_rows=0), [str(tmp_path / "in")])
    made = run_unit(stage, UNIT, Storage(units), "f").tally.extra["units"]
    assert pl.read_parquet(units / f"units/{made[0]}.parquet").schema["faces"] == pl.Int64
    cases = [
        (["no"], "no metadata file has; unused .*faces"),
        *((["key"], "'key'"), (["Reason"], "'Reason'"), (["source_key"], "'source_key'")),
    ]
    for names, line in cases:
        with pytest.raises(UserError, match=line):
            run(tmp_path / "b", rows(2, **extra), keep_columns=names)


def scores(root: Path, **columns: Any) -> list[str]:
    (root / "scores").mkdir(parents=True)
    frame = pl.DataFrame(columns)
    frame.head(3).write_parquet(root / "scores/0.parquet")
    frame.tail(-3).write_parquet(root / "scores/1.parquet")
    return [str(root / "scores")]


@pytest.mark.parametrize("by", ["hash", "key", "url"])
def test_scores_of_a_second_table(tmp_path: Path, by: str) -> None:
    frame = rows(6, hash=[-5, 4, 3, None, 1, 0], key=["a", "b", "c", None, "e", "f"])
    del frame["AESTHETIC_SCORE"]
    # the table: another order, a low score, a repeated identity (the first counts), one not found
    places = [2, 0, 4, 1, 2, 5]
    found = tmp_path / "found"
    table = scores(
        found,
        hash=[frame["hash"][i] for i in places],
        key=[frame["key"][i] for i in places],
        url=["HTTP" + frame["url"][i][4:] + "#part" for i in places],
        AESTHETIC_SCORE=[7.0, 8.0, 6.0, float("nan"), 9.0, 6.5],
    )
    tally, kept = run(tmp_path, frame, score="table", score_inputs=table, score_by=by)
    assert tally.dropped == {"no_joined_score": 3}
    got = {url[-5]: score for url, score in kept.select("url", "aesthetic").iter_rows()}
    assert got == {"0": 8.0, "2": 7.0, "5": 6.5}
    assert kept["predictor"].unique().to_list() == ["v2"]
    with pytest.raises(UserError, match="scores of predictor v2"):
        run(found, frame, score="table", score_inputs=table, score_by=by, predictor="v1")


def test_a_score_table_without_the_column_it_is_joined_by(tmp_path: Path) -> None:
    table = scores(tmp_path, AESTHETIC_SCORE=[7.0] * 6)
    with pytest.raises(UserError, match=r"no column hash to join scores by .*score_by"):
        run(tmp_path / "a", rows(3, hash=[1, 2, 3]), score="table", score_inputs=table)
    table = scores(tmp_path / "b", AESTHETIC_SCORE=[7.0] * 6, hash=[1] * 6)
    with pytest.raises(UserError, match="no column hash"):
        run(tmp_path / "b", rows(3), score="table", score_inputs=table)


def test_scores_that_are_computed_later(tmp_path: Path) -> None:
    frame = rows(3)
    del frame["AESTHETIC_SCORE"]
    tally, kept = run(tmp_path, frame, score="computed")
    assert tally.kept == 3 and kept["aesthetic"].to_list() == [None] * 3
    assert kept["predictor"].to_list() == [None] * 3


def test_rejects_are_written_on_request(tmp_path: Path) -> None:
    frame = rows(8, hash=[1, 1, 3, 4, 5, 6, 7, 8], punsafe=[0.0] * 6 + [0.9, 0.0])
    frame["url"][3] = frame["url"][2]
    frame["url"][7] = None
    tally, kept = run(tmp_path, frame, max_rows=3, write_rejects=True)
    rejects = pl.concat(
        [pl.read_parquet(path) for path in sorted((tmp_path / "rejects").glob("*.parquet"))]
    )
    assert dict(rejects["reason"].value_counts().iter_rows()) == tally.dropped
    assert tally.rows_in == 8 == rejects.height + kept.height
    assert rejects.filter(reason="unsafe")["url"].to_list() == [frame["url"][6]]
    plain, _ = run(tmp_path / "plain", frame, max_rows=3)
    assert plain.dropped == tally.dropped


def test_unknown_sizes_count_as_small_only_where_a_side_is_asked_for(tmp_path: Path) -> None:
    assert run(tmp_path / "a", rows(3))[0].kept == 3
    with pytest.raises(UserError, match=r"none of 3 metadata rows .*small 3"):
        run(tmp_path / "b", rows(3), min_side=64)


def test_duplicates_by_url_and_by_hash(tmp_path: Path) -> None:
    urls = [
        "http://A.org/x",
        "http://a.org/x#top",
        " http://a.org/x",
        "http://a.org/X",
        "http://b.org/",
    ]
    tally, kept = run(
        tmp_path,
        {"url": urls, "AESTHETIC_SCORE": [7.0] * 5, "hash": [1, 2, 3, None, 1]},
    )
    assert (tally.dropped["duplicate_url"], tally.dropped["duplicate_hash"]) == (2, 1)
    assert sorted(kept["url"]) == ["http://A.org/x", "http://a.org/X"]


def test_types_of_any_revision_are_cast(tmp_path: Path) -> None:
    frame = pl.DataFrame(
        {
            "URL": pl.Series(["http://a.org/1", "http://a.org/2"], dtype=pl.Categorical),
            "TEXT": ["one", None],
            "WIDTH": pl.Series([512.0, float("nan")]),
            "HEIGHT": pl.Series([512, None], dtype=pl.Int64),
            "hash": pl.Series([2**64 - 1, 5], dtype=pl.UInt64),
            "punsafe": pl.Series(["0.25", "n/a"]),
            "aesthetic_score": pl.Series([7.0, 8.0], dtype=pl.Float64),
        }
    )
    _, kept = run(tmp_path, frame)
    kept = kept.sort("url")
    assert kept["width"].to_list() == [512, None] and kept["hash"].to_list() == [-1, 5]
    assert kept["punsafe"].to_list() == [0.25, None] and kept["alt_text"].to_list() == ["one", None]
    assert kept.schema["aesthetic"] == pl.Float32 and kept.schema["width"] == pl.Int32


def test_scores_of_the_other_predictor_are_refused(tmp_path: Path) -> None:
    frame = rows(3, aesthetic=[9.0] * 3)
    del frame["AESTHETIC_SCORE"]
    with pytest.raises(UserError, match=r"column aesthetic holds scores of predictor v1, .* of v2"):
        run(tmp_path / "a", frame)
    tally, kept = run(tmp_path / "b", frame, predictor="v1")
    assert tally.kept == 3 and kept["predictor"].unique().to_list() == ["v1"]


def test_a_file_with_both_scores_is_read_under_the_name_asked_for(tmp_path: Path) -> None:
    frame = rows(2, aesthetic=[1.0, 9.0])
    assert run(tmp_path / "a", frame)[0].kept == 2
    assert run(tmp_path / "b", frame, predictor="v1")[0].kept == 1


@pytest.mark.parametrize(
    ("frame", "line"),
    [
        ({"url": ["u"]}, "no aesthetic score .*AESTHETIC|aesthetic_score"),
        ({"AESTHETIC_SCORE": [7.0]}, "no url column"),
    ],
)
def test_metadata_without_what_is_needed(tmp_path: Path, frame: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=line):
        run(tmp_path, frame)


def test_bad_inputs_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no Parquet file matches"):
        Filter(FilterConfig(inputs=[str(tmp_path / "nothing")]))
    with pytest.raises(UserError, match="--filter"):
        Filter(FilterConfig())
    (tmp_path / "a.parquet").write_bytes(b"no parquet at all")
    stage = Filter(FilterConfig(inputs=[str(tmp_path / "a.parquet")]))
    with pytest.raises(UserError, match="no readable Parquet"):
        stage(UNIT, Storage(tmp_path / "out"), io.BytesIO())


@pytest.mark.parametrize("remote", [False, True])
def test_a_damaged_page_is_one_line(tmp_path: Path, remote: bool) -> None:
    file = tmp_path / "a.parquet"
    pl.DataFrame(rows(5000)).write_parquet(file)
    data = bytearray(file.read_bytes())
    data[100 : len(data) // 2] = bytes(len(data) // 2 - 100)  # the footer stays whole
    file.write_bytes(bytes(data))
    url = str(file)
    if remote:
        Storage("memory://bucket/bad").write_bytes("a.parquet", bytes(data))
        url = "memory://bucket/bad/a.parquet"
    with pytest.raises(UserError, match=r"a\.parquet cannot be read to its end") as caught:
        Filter(FilterConfig(inputs=[url]))(UNIT, Storage(tmp_path / "out"), io.BytesIO())
    assert "\n" not in str(caught.value)


def test_the_same_input_and_seed_give_the_same_bytes(tmp_path: Path) -> None:
    frame = rows(50)
    units = {}
    for root, seed in (("a", 0), ("b", 0), ("c", 1)):
        tally, _ = run(tmp_path / root, frame, test_rows=8, seed=seed)
        units[root] = [
            (tmp_path / root / f"units/{u}.parquet").read_bytes() for u in tally.extra["units"]
        ]
    assert units["a"] == units["b"] != units["c"]


def test_shuffled_and_split_by_key_alone(tmp_path: Path) -> None:
    _, all_rows = run(tmp_path / "a", rows(100), test_rows=10)
    _, some = run(tmp_path / "b", rows(100), test_rows=10, max_rows=60)
    assert some.height == 60
    train = [url for url, split in all_rows.select("url", "split").iter_rows() if split == "train"]
    assert train != sorted(train)
    assert set(some["url"]) <= set(all_rows["url"])
    with pytest.raises(UserError, match="held out for the test split"):
        run(tmp_path / "c", rows(5), test_rows=5)


def test_a_changed_input_changes_the_fingerprint(tmp_path: Path) -> None:
    prints = set()
    for count in (10, 11):
        pl.DataFrame(rows(count)).write_parquet(tmp_path / "a.parquet")
        prints.add(fingerprint(Filter(FilterConfig(inputs=[str(tmp_path)])), None))
    assert len(prints) == 2


def test_remote_metadata_is_read_through_the_storage(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    pl.DataFrame(rows(6)).write_parquet(buffer)
    Storage("memory://bucket/meta").write_bytes("a.parquet", buffer.getvalue())
    stage = Filter(FilterConfig(test_rows=0), ["memory://bucket/meta/*.parquet"])
    assert run_unit(stage, UNIT, Storage(tmp_path), "f").tally.kept == 6
