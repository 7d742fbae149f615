"""Units: resume, accounting, and what a kill between publish and commit leaves behind."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import UnitFault, UserError
from pipeline.storage import Storage
from pipeline.units import Ledger, Stage, Tally, chain, fingerprint, run_unit


class Count:
    """Reads its upstream's numbers (or makes ten) and keeps those below a limit."""

    def __init__(self, name: str = "low", source: str | None = "all", limit: int = 5) -> None:
        self.name, self.source = name, source
        self.settings: dict[str, Any] = {"keep": {"limit": limit}, "seed": 0}
        self.limit = limit
        self.calls = 0

    def __call__(self, unit: str, storage: Storage, sink: BinaryIO) -> Tally:
        self.calls += 1
        numbers = list(range(10))
        if self.source is not None:
            with storage.open_input(f"{self.source}/{unit}.parquet") as file:
                numbers = pq.read_table(file)["n"].to_pylist()
        kept = [number for number in numbers if number < self.limit]
        pq.write_table(pa.table({"n": kept}), sink)
        dropped = len(numbers) - len(kept)
        return Tally(len(numbers), len(kept), dropped={"high": dropped} if dropped else {})


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(tmp_path / "root")


def make(stage: Stage, storage: Storage, unit: str = "train-00000") -> Any:
    return run_unit(stage, unit, storage, fingerprint(stage, None))


def test_a_unit_is_made_once_and_its_marker_says_what_it_covers(storage: Storage) -> None:
    stage = Count("all", None, limit=100)
    marker = make(stage, storage)
    assert storage.list() == ["all/_done/train-00000.json", "all/train-00000.parquet"]
    assert marker.tally == Tally(10, 10)
    assert (marker.unit, marker.stage, marker.settings) == ("train-00000", "all", stage.settings)
    assert marker.bytes == storage.size("all/train-00000.parquet")
    assert make(stage, storage) == marker
    assert stage.calls == 1
    assert Ledger(storage, "all").done() == {"train-00000": marker}


def test_of_two_that_make_a_unit_the_first_to_commit_it_counts(storage: Storage) -> None:
    class Late(Count):
        """Another worker, with other luck on the web, is quicker."""

        def __call__(self, unit: str, storage: Storage, sink: BinaryIO) -> Tally:
            quick = Count("all", None)
            quick.settings = self.settings
            make(quick, storage)
            return super().__call__(unit, storage, sink)

    marker = make(Late("all", None, limit=7), storage)
    assert marker.tally.kept == 5
    assert marker == Ledger(storage, "all").get("train-00000")
    with storage.open_input("all/train-00000.parquet") as file:
        assert pq.ParquetFile(file).metadata.num_rows == 5
    assert storage.list() == ["all/_done/train-00000.json", "all/train-00000.parquet"]


def test_a_row_of_stages_accounts_for_every_row(storage: Storage) -> None:
    make(Count("all", None, limit=100), storage)
    marker = make(Count(), storage)
    assert marker.tally == Tally(10, 5, dropped={"high": 5})


def test_the_fingerprint_covers_settings_and_upstream() -> None:
    plain = fingerprint(Count(), None)
    assert plain == fingerprint(Count(), None)
    assert plain != fingerprint(Count(limit=6), None)
    assert plain != fingerprint(Count(), "another upstream")
    prints = chain([Count("all", None), Count()])
    assert prints["low"] == fingerprint(Count(), prints["all"])


def test_a_changed_setting_stops_and_is_named(storage: Storage) -> None:
    make(Count("all", None, limit=100), storage)
    changed = Count("all", None, limit=50)
    ledger = Ledger(storage, "all")
    with pytest.raises(UserError) as caught:
        ledger.check(fingerprint(changed, None), changed.settings)
    line = str(caught.value)
    assert "keep.limit (was 100, now 50)" in line
    assert "--redo all" in line
    assert "\n" not in line
    with pytest.raises(UserError, match=r"keep\.limit"):
        make(changed, storage)


def test_a_changed_upstream_is_named_as_such(storage: Storage) -> None:
    stage = Count("all", None, limit=100)
    make(stage, storage)
    with pytest.raises(UserError, match="what they were made from"):
        Ledger(storage, "all").check("another", stage.settings)


def test_redo_throws_only_stale_units_away(storage: Storage) -> None:
    old, new = Count("all", None, limit=100), Count("all", None, limit=50)
    make(old, storage, "train-00000")
    ledger = Ledger(storage, "all")
    storage.delete(ledger.path("train-00000"))
    make(new, storage, "train-00001")
    make(old, storage, "train-00000")
    mark = fingerprint(new, None)
    ledger.check(mark, new.settings, redo=True)
    assert ledger.stale
    assert list(ledger.done()) == ["train-00000", "train-00001"]  # asking changes nothing
    ledger.forget_others(mark)
    assert ledger.units == {"train-00001"} and not ledger.stale
    assert list(ledger.done()) == ["train-00001"]


@pytest.mark.parametrize(
    ("tally", "said"),
    [
        (Tally(10, 8), "rows were lost or made"),
        (Tally(10, 8, dropped={"high": 1}, failed={"broken": 2}), "rows were lost or made"),
        (Tally(8, 8), "tally's kept is 8"),  # the file holds ten
        (Tally(11, 10, failed={"gone": 1}), "tally's rows_in is 11"),  # the upstream holds ten
    ],
)
def test_a_wrong_tally_commits_nothing(storage: Storage, tally: Tally, said: str) -> None:
    class Wrong(Count):
        def __call__(self, unit: str, storage: Storage, sink: BinaryIO) -> Tally:
            super().__call__(unit, storage, sink)
            return tally

    make(Count("all", None, limit=100), storage)
    with pytest.raises(RuntimeError, match=said):
        make(Wrong(limit=100), storage)
    assert storage.list("low/_done") == []


def test_a_stage_that_raises_leaves_nothing(storage: Storage) -> None:
    class Broken(Count):
        def __call__(self, unit: str, storage: Storage, sink: BinaryIO) -> Tally:
            sink.write(b"half a file")
            raise OSError("the host went away")

    with pytest.raises(OSError, match="went away"):
        make(Broken("all", None), storage)
    assert storage.list() == []


def test_a_stage_may_write_its_files_itself(storage: Storage) -> None:
    class Filter(Count):
        def __call__(self, unit: str, storage: Storage, sink: BinaryIO) -> Tally:
            storage.write_bytes("units/train-00000.parquet", b"...")
            return Tally(10, 10, extra={"units": ["train-00000"]})

    marker = make(Filter("units", None), storage, "_all")
    assert marker.bytes == 0
    assert storage.list() == ["units/_done/_all.json", "units/train-00000.parquet"]
    found = Ledger(storage, "units").get("_all")
    assert found is not None
    assert found.tally.extra == {"units": ["train-00000"]}


def test_a_damaged_marker_is_one_line(storage: Storage) -> None:
    storage.write_bytes("all/_done/train-00000.json", b"{")
    with pytest.raises(UserError, match="no commit marker"):
        Ledger(storage, "all").done()
    storage.write_json("all/_done/train-00000.json", {"unit": "train-00000"})
    with pytest.raises(UserError, match="no commit marker"):
        Ledger(storage, "all").get("train-00000")


def test_a_ledger_gives_every_marker_once(storage: Storage) -> None:
    stage, ledger = Count("all", None, limit=100), Ledger(storage, "all")
    make(stage, storage, "train-00000")
    ledger.look()
    [first] = ledger.news()
    make(stage, storage, "train-00001")
    make(stage, storage, "test-00000")
    assert ledger.look(["train-", "other-"]) == {"train-00001"}
    assert ledger.unread == 1
    assert [marker.unit for marker in ledger.news()] == ["train-00001"]
    assert first == ledger.done()["train-00000"]
    storage.delete(ledger.path("train-00000"))
    assert ledger.look() == set() and ledger.units == {"test-00000", "train-00001"}
    assert [marker.unit for marker in ledger.news()] == ["test-00000"]
    assert list(ledger.news()) == []


def test_a_marker_counts_as_read_once_its_reader_asks_for_the_next(storage: Storage) -> None:
    """A reader that is stopped at a marker has it again."""
    ledger = Ledger(storage, "all")
    for n in range(3):
        make(Count("all", None, limit=100), storage, f"train-{n:05d}")
    ledger.look()
    for marker in ledger.news():
        if marker.unit == "train-00001":
            break
    assert ledger.unread == 2
    assert [marker.unit for marker in ledger.news()] == ["train-00001", "train-00002"]


def test_of_very_many_units_some_are_checked_and_the_others_when_they_are_read(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.units._CHECKED", 3)
    old, new = Count("all", None, limit=100), Count("all", None, limit=50)
    for n in range(7):
        make(old, storage, f"train-{n:05d}")
    ledger = Ledger(storage, "all")
    with pytest.raises(UserError, match="finished unit"):
        ledger.check(fingerprint(new, None), new.settings)
    ledger.check(fingerprint(old, None), old.settings)
    assert ledger.unread == 4
    storage.delete(ledger.path("train-00001"))
    make(new, storage, "train-00001")  # by a worker of another run
    read = ledger.news()
    assert next(read).unit == "train-00000"
    for _ in range(2):
        with pytest.raises(UserError, match=r"limit \(was 50, now 100\)"):
            list(ledger.news())
    with pytest.raises(UserError, match=r"changed: keep\.limit"):
        list(ledger.some(sorted(ledger.units), alike=True))


def test_kill_between_publish_and_commit(storage: Storage) -> None:
    """The output is there, the marker is not: the unit does not exist, and is made again."""
    code = (
        "import os, signal, sys\n"
        "from test_units import Count, make\n"
        "from pipeline.storage import Storage\n"
        "from pipeline.units import Ledger\n"
        "Ledger.commit = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "make(Count('all', None, limit=100), Storage(sys.argv[1]))\n"
    )
    here = Path(__file__)
    path = os.pathsep.join([str(here.parent), str(here.parents[2])])
    done = subprocess.run(
        [sys.executable, "-c", code, storage.root], env={**os.environ, "PYTHONPATH": path}
    )
    assert done.returncode == -signal.SIGKILL
    assert storage.list() == ["all/train-00000.parquet"]
    killed = storage.read_bytes("all/train-00000.parquet")
    assert Ledger(storage, "all").done() == {}
    make(Count("all", None, limit=100), storage)
    assert storage.list() == ["all/_done/train-00000.json", "all/train-00000.parquet"]
    assert storage.read_bytes("all/train-00000.parquet") == killed
    assert json.loads(storage.read_bytes("all/_done/train-00000.json"))["tally"]["kept"] == 10


def test_a_unit_whose_workers_die_is_given_up(storage: Storage) -> None:
    ledger, dead = Ledger(storage, "all"), []

    def die(replaced: bool) -> None:
        """A worker that dies in the unit: the block is begun, and never ended."""
        dead.append(ledger.deaths("train-00000", replaced))
        dead[-1].__enter__()

    die(replaced=False)  # the first one is not known to stand in for any
    for _ in range(4):
        die(replaced=True)
    with pytest.raises(UnitFault, match="its worker died 5 times"):
        die(replaced=True)
    die(replaced=True)  # and the next run begins to count anew
    assert storage.list() == ["all/_deaths/train-00000"]
    with ledger.deaths("train-00000", replaced=True):
        pass
    with pytest.raises(OSError, match="gone"), ledger.deaths("train-00001", replaced=True):
        raise OSError("gone")  # a fault is no death
    assert storage.list() == []
