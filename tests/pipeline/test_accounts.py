"""Totals over commit markers, malformed ones included; they do not grow with the units."""

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from pipeline.accounts import Account
from pipeline.storage import Storage
from pipeline.units import Ledger, Marker, Tally
from tests.made import write_run


def marker(
    unit: str = "train-00000", second: int = 0, stage: str = "images", **extra: Any
) -> Marker:
    return Marker(
        unit=unit,
        stage=stage,
        fingerprint="f" * 16,
        settings={"size": 512},
        tally=Tally(10, 6, {"too_small": 1}, {"http_404": 2, "timeout": 1}, extra),
        bytes=1000,
        sha256="0" * 64,
        seconds=2.0,
        finished=f"2026-01-01T{second // 3600:02d}:{second // 60 % 60:02d}:{second % 60:02d}+00:00",
    )


def test_rows_and_reasons_add_up() -> None:
    account = Account.of([marker(), marker("test-00000", 30)])
    assert (account.units, account.rows_in, account.kept, account.bytes) == (2, 20, 12, 2000)
    assert account.dropped == {"too_small": 2} and account.failed == {"http_404": 4, "timeout": 2}
    assert account.splits == {"train": 6, "test": 6}
    assert account.rows_per_second() == 5.0
    entry = account.to_json()
    assert entry["first"] == "2026-01-01T00:00:00+00:00"
    assert entry["last"] == "2026-01-01T00:00:30+00:00"
    assert entry["transient"] is None, "no marker tells them apart"


def test_what_markers_say_beyond_rows_is_added_too() -> None:
    extra = {
        "transient": {"timeout": 1},
        "sizes": {"edges": [0, 256, 512], "rows": [3, 4]},
        "hosts": {"a.example": [5, 4], "b.example": [5, 0]},
        "subjects": {"a cup": 3},
    }
    entry = Account.of([marker(**extra), marker("train-00001", **extra)]).to_json()
    assert entry["transient"] == {"timeout": 2}
    assert entry["sizes"] == {"edges": [0, 256, 512], "rows": [6, 8]}
    assert entry["hosts"] == {"a.example": [10, 8], "b.example": [10, 0]}
    assert entry["subjects"] == {"a cup": 6}


@pytest.mark.parametrize("extra", [
    {"sizes": {"edges": [0, 1], "rows": "x"}}, {"sizes": 3}, {"hosts": [1]}, {"hosts": {"a": 3}},
    {"transient": None}, {"subjects": {"a": "b"}}, {"scores": {}}, {"schemas": {"a": 1}},
])  # fmt: skip
def test_a_malformed_extra_is_left_out(extra: dict[str, Any]) -> None:
    account = Account.of([marker(**extra)])
    assert account.rows_in == 10 and not account.hosts and not account.histograms
    json.dumps(account.to_json())


def test_histograms_of_other_edges_are_not_mixed() -> None:
    one = {"sizes": {"edges": [0, 1, 2], "rows": [1, 1]}}
    other = {"sizes": {"edges": [0, 5, 9], "rows": [7, 7]}}
    assert Account.of([marker(**one), marker("b-1", **other)]).histograms["sizes"]["rows"] == [1, 1]


def test_the_timeline_holds_every_row_and_its_pause() -> None:
    seconds = [*range(0, 600, 10), *range(3000, 3600, 10)]
    account = Account.of(marker(f"train-{n:05d}", second) for n, second in enumerate(seconds))
    line = account.timeline()
    step = (line[1][0] - line[0][0]) * 3600
    assert sum(rate * step for _, rate in line) == pytest.approx(10 * len(seconds))
    assert any(rate == 0 for _, rate in line) and len(line) <= 121


def test_an_entry_does_not_grow_with_the_units() -> None:
    account = Account.of(
        marker(
            f"train-{n:05d}", n, hosts={f"h{n}-{k}.example": [2, 1] for k in range(20)},
            subjects={f"thing {n} {k}": 1 for k in range(20)},
        )
        for n in range(3000)
    )  # fmt: skip
    assert len(account.hosts) <= 40_000 and len(account.subjects) <= 40_000
    assert len(json.dumps(account.to_json())) < 20_000


def test_markers_are_read_anew_and_of_some_units_only(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    for n in range(3):
        Ledger(storage, "images").commit(f"train-{n:05d}", marker(f"train-{n:05d}"))
    assert Account.read(storage, "images").units == 3
    assert Account.read(storage, "images", {"train-00001"}).units == 1
    assert Account.read(storage, "captions").units == 0


def test_reading_them_takes_little_memory(tmp_path: Path) -> None:
    write_run(tmp_path, 2500, done=[2500, 0, 0])
    ledger = Ledger(Storage(tmp_path), "images")
    size = sum(path.stat().st_size for path in tmp_path.glob("images/_done/*.json"))
    tracemalloc.start()
    assert Account.of(ledger.each()).units == 2500
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.5 * size, f"{peak / 1e6:.1f} MB for {size / 1e6:.1f} MB of markers"


def test_markers_share_their_settings(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    for n in range(3):
        Ledger(storage, "images").commit(f"train-{n:05d}", marker(f"train-{n:05d}"))
    settings = {id(found.settings) for found in Ledger(storage, "images").done().values()}
    assert len(settings) == 1
