"""Dedup, shuffle and split range by range: the same rows as in one piece, whatever the pieces."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest

from pipeline.config import FilterConfig
from pipeline.curation.filtering import spill
from pipeline.curation.filtering.dealing import ranges_for
from pipeline.curation.filtering.metadata import UNIT, Filter
from pipeline.curation.filtering.scan import footers, parts_of
from pipeline.curation.urls import key_of, normal_url
from pipeline.errors import UserError
from pipeline.storage import Storage
from pipeline.units import Tally, fingerprint, run_unit

FILES, ROWS = 5, 700


@pytest.fixture(scope="module")
def metadata(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files in which urls and hashes repeat within and across them, in small row groups."""
    folder = tmp_path_factory.mktemp("metadata")
    rng = np.random.default_rng(0)
    for number in range(FILES):
        ids = rng.integers(0, 2500, ROWS)
        pl.DataFrame(
            {
                "url": [f"http://{'A' if i % 3 else 'a'}.org/{i}.jpg" for i in ids],
                "hash": [None if i % 11 == 0 else int(rng.integers(0, 3000)) for i in ids],
                "AESTHETIC_SCORE": rng.normal(6.5, 0.7, ROWS).astype(np.float32),
            }
        ).write_parquet(folder / f"{number}.parquet", row_group_size=64)
    return folder


def run(root: Path, inputs: str, cfg: FilterConfig, **sizes: Any) -> tuple[Tally, pl.DataFrame]:
    stage = Filter(cfg, [inputs], **sizes)
    tally = run_unit(stage, UNIT, Storage(root), fingerprint(stage, None)).tally
    units = [pl.read_parquet(root / f"units/{unit}.parquet") for unit in tally.extra["units"]]
    return tally, pl.concat(units)


def written_out(folder: Path, cfg: FilterConfig) -> dict[str, list[str]]:
    """The filter in plain Python, row by row: urls of each split, in order."""
    urls: dict[str, str] = {}
    hashes = set()
    for number in range(FILES):
        for row in pl.read_parquet(folder / f"{number}.parquet").iter_rows(named=True):
            if row["AESTHETIC_SCORE"] <= cfg.min_aesthetic:
                continue
            normal = normal_url(row["url"])
            if normal in urls:
                continue
            repeated = row["hash"] is not None and row["hash"] in hashes
            hashes.add(row["hash"])
            urls[normal] = "" if repeated else row["url"]  # the url is taken either way
    left = {key_of(normal): url for normal, url in urls.items() if url}

    def by(stream: int) -> Callable[[int], int]:
        return lambda key: int(spill.mixed(np.array([key], np.uint64), cfg.seed, stream)[0])

    order = sorted(left, key=by(1))[: cfg.max_rows]
    held_out = set(sorted(order, key=by(2))[: cfg.test_rows])
    return {
        "test": [left[key] for key in order if key in held_out],
        "train": [left[key] for key in order if key not in held_out],
    }


@pytest.mark.parametrize("max_rows", [None, 900, 128])
@pytest.mark.parametrize("range_rows", [10_000, 300])
def test_any_number_of_ranges_gives_the_rows_of_the_plain_rule(
    tmp_path: Path, metadata: Path, range_rows: int, max_rows: int | None
) -> None:
    cfg = FilterConfig(unit_rows=50, test_rows=60, max_rows=max_rows, seed=3)
    tally, rows = run(tmp_path, str(metadata), cfg, range_rows=range_rows, part_rows=500)
    expected = written_out(metadata, cfg)
    for split, urls in expected.items():
        assert rows.filter(split=split)["url"].to_list() == urls
    assert tally.rows_in == FILES * ROWS == tally.kept + sum(tally.dropped.values())
    for reason in ("duplicate_url", "duplicate_hash", *(["over_max_rows"] if max_rows else [])):
        assert tally.dropped[reason] > 0
    units = tally.extra["units"]
    assert len(set(units)) == len(units) and [u for u in units if u.startswith("test")] == units[:2]
    heights = [pl.read_parquet(tmp_path / f"units/{unit}.parquet").height for unit in units]
    assert max(heights) <= 50 and min(heights) > 0


def test_the_parts_of_the_scan_change_nothing(tmp_path: Path, metadata: Path) -> None:
    cfg = FilterConfig(unit_rows=50, test_rows=60)
    whole = run(tmp_path / "a", str(metadata), cfg)
    pieces = run(tmp_path / "b", str(metadata), cfg, part_rows=300)
    assert pieces[0] == whole[0] and pieces[1].equals(whole[1])
    # a remote file is read piece by piece, through a copy with holes
    memory = Storage("memory://bucket/dealing")
    for path in sorted(metadata.glob("*.parquet")):
        memory.write_bytes(path.name, path.read_bytes())
    remote = run(tmp_path / "c", "memory://bucket/dealing", cfg, part_rows=300)
    assert remote[0] == whole[0] and remote[1].equals(whole[1])


def test_bytes_do_not_depend_on_who_works(tmp_path: Path, metadata: Path) -> None:
    def backwards(function: Any, items: Sequence[Any], title: str, memory: int = 0) -> list[Any]:
        with ThreadPoolExecutor(3) as pool:
            futures = [pool.submit(function, item) for item in reversed(items)]
            return [future.result() for future in futures][::-1]

    cfg = FilterConfig(unit_rows=50, test_rows=60)
    made = {}
    for name, spread in (("a", {}), ("b", {"spread": backwards})):
        tally, _ = run(tmp_path / name, str(metadata), cfg, range_rows=300, part_rows=500, **spread)
        paths = [tmp_path / name / f"units/{unit}.parquet" for unit in tally.extra["units"]]
        made[name] = [path.read_bytes() for path in paths]
    assert made["a"] == made["b"]


def test_a_row_keeps_its_place_when_others_go(tmp_path: Path, metadata: Path) -> None:
    cfg = FilterConfig(unit_rows=50, test_rows=0)
    _, rows = run(tmp_path / "a", str(metadata), cfg)
    _, fewer = run(tmp_path / "b", str(metadata), replace(cfg, min_aesthetic=6.6))
    kept = set(fewer["key"])
    common = [key for key in rows["key"] if key in kept]
    assert common == [key for key in fewer["key"] if key in set(common)] and len(common) > 500


def test_what_was_scanned_is_not_scanned_again(tmp_path: Path, metadata: Path) -> None:
    cfg = FilterConfig(unit_rows=50, test_rows=60)

    class Killed(Exception):
        pass

    def breaks(function: Any, items: Sequence[Any], title: str, memory: int = 0) -> Any:
        for number, item in enumerate(items):
            if title == "scan" and number == 3:
                raise Killed
            yield function(item)

    with pytest.raises(Killed):
        run(tmp_path, str(metadata), cfg, spread=breaks, part_rows=200)
    markers = {path: path.stat().st_mtime_ns for path in tmp_path.glob("scan/_done/*.json")}
    assert len(markers) == 3 and not list(tmp_path.glob("units/*.parquet"))
    tally, rows = run(tmp_path, str(metadata), cfg, part_rows=200)
    assert {path: path.stat().st_mtime_ns for path in markers} == markers
    whole, whole_rows = run(tmp_path / "whole", str(metadata), cfg, part_rows=200)
    assert tally == whole and rows.equals(whole_rows)
    Filter(cfg, [str(metadata)]).clear(Storage(tmp_path))
    assert not (tmp_path / "scan").exists()


def test_parts_hold_every_row_once(metadata: Path) -> None:
    found = footers([str(path) for path in sorted(metadata.glob("*.parquet"))])
    for rows in (1, 64, 200, 1000, 10_000):
        parts = parts_of(found, rows)
        pieces = [piece for slices in parts.values() for piece in slices]
        for url, footer in found.items():
            mine = [piece for piece in pieces if piece.url == url]
            assert [piece.start for piece in mine] == list(np.cumsum([0, *[p.rows for p in mine]]))[
                :-1
            ]
            assert sum(piece.rows for piece in mine) == footer.num_rows
            groups = {group for piece in mine for group in range(*piece.groups)}
            assert groups == set(range(footer.num_row_groups))
        for slices in parts.values():
            assert sum(piece.rows for piece in slices) <= rows
    assert len(parts_of(found, 10_000)) == 1


def test_empty_files_hold_no_part_up(tmp_path: Path) -> None:
    schema = {"url": pl.String, "AESTHETIC_SCORE": pl.Float32}
    pl.DataFrame(schema=schema).write_parquet(tmp_path / "0.parquet")
    pq.write_table(pl.DataFrame(schema=schema).to_arrow(), tmp_path / "1.parquet")
    with pytest.raises(UserError, match=r"none of 0 metadata rows passes .*there are none"):
        run(tmp_path / "a", str(tmp_path / "*.parquet"), FilterConfig(test_rows=0))
    pl.DataFrame({"url": ["http://a"], "AESTHETIC_SCORE": [7.0]}).write_parquet(
        tmp_path / "2.parquet"
    )
    tally, _ = run(tmp_path / "b", str(tmp_path / "*.parquet"), FilterConfig(test_rows=0))
    assert (tally.rows_in, tally.kept) == (1, 1)


def test_where_the_files_lie_changes_nothing(tmp_path: Path, metadata: Path) -> None:
    cfg = FilterConfig(unit_rows=50, test_rows=60)
    there = {}
    for name, order in (("a", "zyxwv"), ("b", "vwxyz")):
        for number, folder in enumerate(order):
            (tmp_path / name / folder).mkdir(parents=True)
            shutil.copy(metadata / f"{number}.parquet", tmp_path / name / folder)
        stage = Filter(cfg, [str(tmp_path / name)], part_rows=700)
        there[name] = (
            fingerprint(stage, None),
            run(tmp_path / f"out-{name}", str(tmp_path / name), cfg, part_rows=700),
        )
    assert there["a"][0] == there["b"][0] and there["a"][1][1].equals(there["b"][1][1])
    frame = pl.read_parquet(metadata / "0.parquet")
    other = frame.with_columns(pl.col("AESTHETIC_SCORE").reverse())
    other.write_parquet(tmp_path / "b/v/0.parquet", row_group_size=64)  # same name, about the size
    assert fingerprint(Filter(cfg, [str(tmp_path / "b")]), None) != there["a"][0]


def test_rejects_of_other_settings_do_not_stay(tmp_path: Path, metadata: Path) -> None:
    cfg = FilterConfig(unit_rows=50, test_rows=60, write_rejects=True)
    run(tmp_path, str(metadata), cfg, part_rows=500)
    assert (tmp_path / "rejects/part-00006.parquet").exists()
    Storage(tmp_path).delete("units/_done/_all.json")
    run(tmp_path, str(metadata), replace(cfg, seed=1), part_rows=5000)
    names = sorted(path.name for path in (tmp_path / "rejects").iterdir())
    assert names == ["part-00000.parquet", "range-00000.parquet"]


def test_where_nothing_is_rejected_nothing_is_written(tmp_path: Path, metadata: Path) -> None:
    cfg = FilterConfig(unit_rows=50, test_rows=60, write_rejects=True)
    run(tmp_path / "a", str(metadata), cfg)
    passing = pl.read_parquet(tmp_path / "a/units/*.parquet").select("url", "aesthetic")
    passing.rename({"aesthetic": "AESTHETIC_SCORE"}).write_parquet(tmp_path / "all.parquet")
    tally, _ = run(tmp_path / "b", str(tmp_path / "all.parquet"), cfg)
    assert (tally.kept, tally.dropped) == (passing.height, {})
    assert not (tmp_path / "b/rejects").exists()


def test_a_spill_gives_back_its_ranges(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    numbers = np.sort(np.random.default_rng(1).integers(0, 2**64, 50_000, np.uint64))
    numbers[[0, -1]] = 0, 2**64 - 1
    frame = pl.DataFrame({"n": numbers, "text": [str(n) for n in numbers]})
    with storage.publish("a") as sink:
        spill.write(sink, frame, "n")
    for ranges in (1, 2, 64):
        read = [spill.read(storage, ["a"], "n", i, ranges, ["n", "text"]) for i in range(ranges)]
        assert pl.concat(read).equals(frame)
    assert [ranges_for(rows, 100) for rows in (0, 1, 100, 101, 200, 201, 900)] == [
        *(1, 1, 1, 2, 2, 4, 16)
    ]
