"""What a run shows while it goes on comes from the markers that appear."""

import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

from pipeline.errors import StoreHiccup, UserError
from pipeline.progress import Progress
from pipeline.storage import Storage
from pipeline.units import Ledger
from pipeline.watch import Watch, _Stopped, top
from tests.made import write_markers, write_run


def test_markers_become_progress(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = write_run(tmp_path, 20, done=[5, 0, 0])
    ledgers = [Ledger(Storage(tmp_path), stage) for stage in ("images", "captions")]
    for ledger in ledgers:
        ledger.look()
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


class Counted(Storage):
    """What is listed."""

    asked: ClassVar[list[tuple[str, Any]]] = []

    def names(self, folder: str, begin: Sequence[str] | None = None) -> Iterator[str]:
        self.asked.append((folder.partition("/")[0], begin))
        return super().names(folder, begin)


def test_only_where_units_are_due_is_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A listing of a million names at every look would be all that the driver does."""
    names = write_run(tmp_path, 20_000, done=[0, 0, 0])
    write_markers(tmp_path, "images", [*names[:1500], names[2500], names[9999]])
    write_markers(tmp_path, "captions", names[:1000])
    ledgers = [Ledger(Counted(tmp_path), stage) for stage in ("images", "captions")]
    for ledger in ledgers:
        ledger.look()
    with Progress(every_s=0, terminal=False) as progress:
        watch = Watch(ledgers, names, progress)
        Counted.asked.clear()
        write_markers(tmp_path, "images", names[1500:1600])
        write_markers(tmp_path, "captions", names[1000:1010])
        watch.look()
        images = ["test-01", "train-00", "train-01", "train-02", "train-03", "train-07"]
        assert Counted.asked == [
            ("images", images),
            ("captions", ["test-01", "train-00", "train-07"]),
        ]
        assert watch.accounts["images"].units == 1602 and watch.accounts["captions"].units == 1010
        write_markers(tmp_path, "images", names[15_000:15_005])  # beyond what is looked for
        watch.look()
        assert watch.accounts["images"].units == 1602
        watch.look(whole=True)
        assert watch.accounts["images"].units == 1607
        assert Counted.asked[-1] == ("captions", None)
    said = capsys.readouterr().out
    assert "images: 1502 of 20000 are there already" in said and "images: 1607/20000" in said


class Minute:
    """A minute, of which nobody waits a moment."""

    now = 0.0

    def is_set(self) -> bool:
        return self.now >= 60

    def wait(self, seconds: float) -> bool:
        self.now += seconds
        return self.is_set()


class Slow(Ledger):
    """A listing of many units."""

    def __init__(self, storage: Storage, minute: Minute) -> None:
        super().__init__(storage, "images")
        self.minute, self.looks = minute, 0

    def look(self, begin: Sequence[str] | None = None) -> set[str]:
        self.minute.now += 0.5
        self.looks += 1
        return super().look(begin)


class Told:
    """When metrics were set."""

    def __init__(self) -> None:
        self.moments: list[float] = []

    def publish(self, *_: object) -> None:
        self.moments.append(time.monotonic())


def test_metrics_are_set_at_a_steady_pace_however_slow_the_listing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray forgets a gauge that is not set again for two of its intervals."""
    minute = Minute()
    monkeypatch.setattr(time, "monotonic", lambda: minute.now)
    names = write_run(tmp_path, 4)
    ledger = Slow(Storage(tmp_path), minute)
    watch = Watch([ledger], names, Progress(terminal=False))
    watch._metrics = told = Told()  # type: ignore[assignment]
    watch._stop = minute  # type: ignore[assignment]
    watch._run()
    pauses = [after - before for before, after in itertools.pairwise(told.moments)]
    assert told.moments[-1] > 58 and max(pauses) <= 1.5, pauses
    assert 8 <= ledger.looks <= 12, "more than a tenth of the time went into listing"


class Stalls:
    """How long each stage stalls, as it was told last."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.failed: dict[str, int] = {}

    def publish(self, stage: str, _: object, units: int, failed: int, stalled: float) -> None:
        self.seconds[stage], self.failed[stage] = stalled, failed


def test_a_stage_stalls_that_has_units_to_do_and_commits_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    names = write_run(tmp_path, 20, done=[5, 5, 5])
    ledgers = [Ledger(Storage(tmp_path), stage) for stage in ("images", "captions", "features")]
    for ledger in ledgers:
        ledger.done()
    watch = Watch(ledgers, names, Progress(terminal=False))
    watch._metrics = told = Stalls()  # type: ignore[assignment]
    watch.running = {"images", "captions", "features"}

    def after(seconds: float) -> dict[str, float]:
        now[0] += seconds
        watch.look()
        return told.seconds

    assert after(0) == {"images": 0, "captions": 0, "features": 0}
    assert after(100) == {"images": 100, "captions": 0, "features": 0}, "the others wait for it"
    write_run(tmp_path, 20, done=[6, 5, 5])
    assert after(10) == {"images": 0, "captions": 10, "features": 0}
    assert after(50) == {"images": 50, "captions": 60, "features": 0}
    write_run(tmp_path, 20, done=[19, 19, 6])
    assert after(10) == {"images": 0, "captions": 0, "features": 0}
    watch.failed["images"] += 1  # the last unit was given up: nothing is left to do
    assert after(70) == {"images": 0, "captions": 0, "features": 70}
    assert told.failed == {"images": 1, "captions": 0, "features": 0}
    write_run(tmp_path, 20, done=[20, 20, 20])
    assert after(70) == after(70) == {"images": 0, "captions": 0, "features": 0}, "all are through"


def test_a_stage_whose_turn_has_not_come_is_idle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    names = write_run(tmp_path, 20, done=[5, 5, 0])
    ledgers = [Ledger(Storage(tmp_path), stage) for stage in ("images", "captions", "features")]
    watch = Watch(ledgers, names, Progress(terminal=False))
    watch._metrics = told = Stalls()  # type: ignore[assignment]

    def after(seconds: float) -> dict[str, float]:
        now[0] += seconds
        watch.look()
        return told.seconds

    after(0)
    assert after(5000) == {"images": 0, "captions": 0, "features": 0}, "waiting for room"
    watch.running = {"images", "captions"}
    assert after(70) == {"images": 70, "captions": 0, "features": 0}
    watch.running = {"features"}
    assert after(30) == {"images": 0, "captions": 0, "features": 30}


def test_a_unit_at_which_reading_is_stopped_is_read_later(tmp_path: Path) -> None:
    names = write_run(tmp_path, 20, done=[10, 0, 0])
    ledger = Ledger(Storage(tmp_path), "images")
    ledger.look()
    watch = Watch([ledger], names, Progress(terminal=False))
    watch._stop.set()
    with pytest.raises(_Stopped):
        watch.look()
    watch._stop.clear()
    watch.look()
    assert watch.accounts["images"].units == 10


class Read(Storage):
    """How many files are read."""

    count: ClassVar[int] = 0

    def read_many(self, paths: list[str]) -> dict[str, bytes]:
        Read.count += len(paths)
        return super().read_many(paths)


def test_the_end_of_the_work_does_not_wait_for_what_was_there_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in a resumed run of a million units would read them all first."""
    monkeypatch.setattr("pipeline.watch._STEADY_S", 3600)
    names = write_run(tmp_path, 20, done=[10, 0, 0])
    ledgers = [Ledger(Read(tmp_path), stage) for stage in ("images", "captions")]
    ledgers[0].look()
    watch = Watch(ledgers, names, Progress(terminal=False))
    with watch:
        watch._metrics = Stalls()  # type: ignore[assignment]
        Read.count = 0
        write_markers(tmp_path, "captions", names[:3])
    assert Read.count == 3, "the last commits of a stage that is read through, and no more"
    assert watch.accounts["captions"].units == 3 and watch.accounts["images"].units == 0
    watch.look(whole=True)
    assert watch.accounts["images"].units == 10


def until(met: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not met() and time.monotonic() < deadline:
        time.sleep(0.01)


def test_a_marker_of_other_settings_is_a_fault_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that was not among those that are checked at the beginning."""
    monkeypatch.setattr("pipeline.watch._STEADY_S", 0.01)
    monkeypatch.setattr("pipeline.units._CHECKED", 4)
    names = write_run(tmp_path, 10)
    ledger = Ledger(Storage(tmp_path), "images")
    marker = ledger.get(names[0])
    assert marker is not None
    ledger.check(marker.fingerprint, marker.settings)
    other = sorted(names)[1]
    ledger.commit(other, replace(marker, unit=other, fingerprint="other", settings={"size": 1}))
    watch = Watch([ledger], names, Progress(terminal=False))
    watch.check()
    with watch:
        until(lambda: watch.fault is not None)
        with pytest.raises(UserError, match=r"other settings; changed: .*size \(was 1, now null\)"):
            watch.check()


class Busy(Ledger):
    """A store that answers at the second look only."""

    looks = 0

    def look(self, begin: Sequence[str] | None = None) -> set[str]:
        self.looks += 1
        if self.looks == 1:
            raise StoreHiccup("the store is out of reach")
        return super().look(begin)


def test_a_hiccup_of_the_store_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.watch._STEADY_S", 0.01)
    monkeypatch.setattr("pipeline.watch._HICCUP_S", 0.01)
    names = write_run(tmp_path, 10)
    ledger = Busy(Storage(tmp_path), "images")
    watch = Watch([ledger], names, Progress(terminal=False))
    with watch:
        until(lambda: watch.accounts["images"].units == 10)
        watch.check()
    assert watch.accounts["images"].units == 10


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
