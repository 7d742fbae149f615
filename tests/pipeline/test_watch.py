"""What a run shows while it goes on comes from the markers that appear."""

import itertools
import time
from collections import Counter
from pathlib import Path

import pytest

from pipeline.progress import Progress
from pipeline.storage import Storage
from pipeline.units import Ledger, Marker
from pipeline.watch import Watch, top
from tests.made import write_run


def test_markers_become_progress(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = write_run(tmp_path, 20, done=[5, 0, 0])
    ledgers = [Ledger(Storage(tmp_path), stage) for stage in ("images", "captions")]
    for ledger in ledgers:
        ledger.done()
    with Progress(every_s=0, terminal=False) as progress:
        watch = Watch(ledgers, names, progress)
        assert capsys.readouterr().out == "images: 5 of 20 are there already\n"
        write_run(tmp_path, 20, done=[12, 3, 0])
        watch.look()
        said = capsys.readouterr().out.splitlines()
        assert said[0].startswith("images: 12/20 in 0:0")
        assert "rows 1,200 kept 780 failed http_404 240, timeout 120" in said[0]
        assert said[1].startswith("captions: 3/20 in 0:0") and "failed" not in said[1]
        watch.look()
    assert watch.accounts["images"].units == 12


class Slow(Ledger):
    """A listing of many units."""

    def done(self) -> dict[str, Marker]:
        time.sleep(0.5)
        return super().done()


class Told:
    """When metrics were set."""

    def __init__(self) -> None:
        self.moments: list[float] = []

    def publish(self, *_: object) -> None:
        self.moments.append(time.monotonic())


def test_metrics_are_set_at_a_steady_pace_however_slow_the_listing(tmp_path: Path) -> None:
    """Ray forgets a gauge that is not set again for two of its intervals."""
    names = write_run(tmp_path, 4)
    watch = Watch([Slow(Storage(tmp_path), "images")], names, Progress(terminal=False))
    with watch:
        watch._metrics = told = Told()  # type: ignore[assignment]
        time.sleep(5.5)
    pauses = [after - before for before, after in itertools.pairwise(told.moments)]
    assert len(pauses) >= 4 and max(pauses) < 2.5, pauses


def test_units_of_others_are_not_counted(tmp_path: Path) -> None:
    names = write_run(tmp_path, 20)
    ledger = Ledger(Storage(tmp_path), "images")
    with Progress(terminal=False) as progress:
        watch = Watch([ledger], names[:4], progress)
        watch.look()
    assert watch.accounts["images"].units == 4


def test_the_top_causes_and_how_many_more() -> None:
    causes = Counter({"http_404": 1203, "dns": 310, "timeout": 9, "tls": 1})
    assert top(causes, 2) == "http_404 1,203, dns 310 and 2 more"
    assert top(causes, 4).endswith("timeout 9, tls 1")
