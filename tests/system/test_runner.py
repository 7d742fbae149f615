"""The runner on a real Ray cluster: stages overlap, resume, and fail in one line."""

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.cluster import connect
from pipeline.config import RayConfig, StageResources
from pipeline.errors import StoreHiccup, UserError
from pipeline.progress import Progress
from pipeline.runner import StageSpec, run_stages, shares
from pipeline.storage import Storage
from pipeline.tasks import spread
from pipeline.units import Ledger, Marker, Tally

pytestmark = [pytest.mark.system, pytest.mark.timeout(900)]
UNITS = [f"train-{index:05d}" for index in range(6)]


@pytest.fixture(scope="module", autouse=True)
def cluster(bucket: str) -> Iterator[None]:
    """A cluster whose workers see the bucket: its environment is there before they start."""
    with connect(RayConfig(object_store_mib=100)):
        yield


def stage(name: str, source: str | None, fault: str = "", limit: int = 10) -> Any:
    """A stage, defined inside a function so that it travels to the workers by value."""

    class Numbers:
        def __init__(self) -> None:
            self.name, self.source, self.settings = name, source, {"limit": limit}
            self.opened = False

        def open(self) -> None:
            assert not self.opened
            self.opened = True

        def __call__(self, unit: str, storage: Storage, sink: BinaryIO) -> Tally:
            assert self.opened
            if fault == "slow":
                time.sleep(0.2)
            first = unit.endswith("1") and not storage.exists(f"tried/{unit}")
            if fault == "die" and first:
                storage.write_bytes(f"tried/{unit}", b"once")
                os._exit(1)
            if fault == "always die" and unit.endswith("1"):
                os._exit(1)
            if fault == "raise" and unit.endswith(("1", "2")):
                raise ValueError("a broken\nfile")
            if fault == "store" and unit.endswith(("1", "2")):
                raise StoreHiccup("cannot read s3://b/x: the store answers SlowDown")
            if fault == "user" and unit.endswith("1"):
                raise UserError("the weights are missing; name a folder")
            numbers = list(range(limit))
            if source is not None:
                with storage.open_input(f"{source}/{unit}.parquet") as file:
                    numbers = pq.read_table(file)["n"].to_pylist()
            pq.write_table(pa.table({"n": numbers}), sink)
            return Tally(len(numbers), len(numbers))

    return Numbers()


def row(fault: str = "", limit: int = 10) -> list[StageSpec]:
    return [
        StageSpec("a", partial(stage, "a", None, fault, limit), StageResources(max_workers=2)),
        StageSpec("b", partial(stage, "b", "a")),
    ]


def files(units: list[str]) -> list[str]:
    paths = [f"{name}/{unit}.parquet" for name in "ab" for unit in units]
    return sorted(paths + [f"{name}/_done/{unit}.json" for name in "ab" for unit in units])


def run(storage: Storage, specs: list[StageSpec], **options: Any) -> dict[str, dict[str, Marker]]:
    """Run, and what every stage has then."""
    with Progress(terminal=False) as progress:
        run_stages(specs, UNITS, storage, progress, **options)
    return {spec.name: Ledger(storage, spec.name).done() for spec in specs}


def test_a_run_and_the_run_after_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    storage = Storage(tmp_path)
    markers = run(storage, row())
    assert {name: sorted(made) for name, made in markers.items()} == {"a": UNITS, "b": UNITS}
    assert storage.list() == files(UNITS)
    assert "b: 6/6" in capsys.readouterr().out
    before = {path: storage.read_bytes(path) for path in storage.list()}
    assert run(storage, row()) == markers
    assert {path: storage.read_bytes(path) for path in storage.list()} == before
    assert "b: 6 of 6 are there already" in capsys.readouterr().out


def test_only_what_is_missing_is_made(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    run(storage, row())
    storage.delete(f"b/_done/{UNITS[3]}.json")
    before = {path: storage.read_bytes(path) for path in storage.list()}
    run(storage, row())
    assert storage.list() == files(UNITS)
    assert {path: storage.read_bytes(path) for path in before} == before


def test_what_was_made_from_a_unit_without_its_marker_is_made_anew(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    run(storage, row())
    paths = {unit: tmp_path / f"b/_done/{unit}.json" for unit in UNITS}
    before = {unit: path.stat().st_mtime_ns for unit, path in paths.items()}
    storage.delete(f"a/_done/{UNITS[3]}.json")
    run(storage, row())
    again = [unit for unit, path in paths.items() if path.stat().st_mtime_ns != before[unit]]
    assert again == [UNITS[3]]


def test_a_root_on_s3(bucket: str) -> None:
    storage = Storage(f"{bucket}/run")
    markers = run(storage, row())
    assert storage.list() == files(UNITS)
    assert run(storage, row()) == markers


def test_a_changed_setting_stops_the_run_unless_redone(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    run(storage, row())
    with pytest.raises(UserError, match=r"limit \(was 10, now 12\)"):
        run(storage, row(limit=12))
    before = {path: storage.read_bytes(path) for path in storage.list()}
    with pytest.raises(UserError, match="--redo b"):  # a refused redo throws nothing away
        run(storage, row(limit=12), redo=["a"])
    assert {path: storage.read_bytes(path) for path in storage.list()} == before
    markers = run(storage, row(limit=12), redo=["a", "b"])
    assert {marker.tally.kept for made in markers.values() for marker in made.values()} == {12}


def test_a_marker_of_other_settings_stops_the_run_while_it_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that was not among those that are checked at the beginning."""
    monkeypatch.setattr("pipeline.watch._STEADY_S", 0.01)
    storage = Storage(tmp_path)
    run(storage, row())
    monkeypatch.setattr("pipeline.units._CHECKED", 3)
    ledger = Ledger(storage, "a")
    marker = ledger.done()[UNITS[1]]
    ledger.commit(UNITS[1], replace(marker, fingerprint="other", settings={"limit": 12}))
    units = [*UNITS, *(f"train-{index:05d}" for index in range(6, 46))]
    with (
        Progress(terminal=False) as progress,
        pytest.raises(UserError, match=r"limit \(was 12, now 10\)"),
    ):
        run_stages(row("slow"), units, storage, progress)
    assert len(storage.list("b/_done")) < len(units), "it did not wait for the rest"


def test_a_fault_costs_its_unit_only(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    with pytest.raises(UserError, match="2 of 6 units failed") as caught:
        run(storage, row("raise"))
    assert "ValueError: a broken file" in str(caught.value)
    assert storage.list() == files([UNITS[0], *UNITS[3:]])
    run(storage, row())
    assert storage.list() == files(UNITS)


def test_a_task_of_many_units(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Units that share a task fail, kill their worker, and stop the run, each as if it were alone;
    what is through before a worker dies is not made again.
    """

    def together(units: Sequence[str], workers: int) -> Iterator[list[str]]:
        yield list(units)

    monkeypatch.setattr("pipeline.runner.shares", together)
    storage = Storage(tmp_path / "raise")
    with pytest.raises(UserError, match=r"2 of 6 units failed \(a/train-00001, a/train-00002\)"):
        run(storage, row("raise"))
    assert storage.list() == files([UNITS[0], *UNITS[3:]])
    storage = Storage(tmp_path / "die")
    with pytest.raises(UserError, match=r"1 of 6 units failed \(a/train-00001\).* died 5 times"):
        run(storage, row("always die"))
    assert storage.list() == files([UNITS[0], *UNITS[2:]])
    storage = Storage(tmp_path / "user")
    with pytest.raises(UserError, match=r"^the weights are missing; name a folder$"):
        run(storage, row("user"))
    assert storage.list() == ["a/_done/train-00000.json", "a/train-00000.parquet"]


@pytest.mark.parametrize(("count", "workers"), [(7500, 4096), (20_000, 1), (1_000_000, 64)])
def test_units_are_shared_out(count: int, workers: int) -> None:
    units = [str(n) for n in range(count)]
    sizes = [len(some) for some in shares(units, workers)]
    assert [unit for some in shares(units, workers) for unit in some] == units
    if count <= 20_000:
        assert set(sizes) == {1}
    else:
        assert len(sizes) < 25_000 and max(sizes) == 50
        assert set(sizes[: 2 * workers]) == set(sizes[-2 * workers :]) == {1}
        # what two tasks of a worker hold is never more than its part of what is left
        left = count
        for size in sizes:
            assert size == 1 or 2 * workers * size <= left
            left -= size


def test_a_store_out_of_reach_costs_its_units_only(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    storage = Storage(tmp_path)
    with pytest.raises(UserError, match=r"2 of 6 units failed .*answers SlowDown"):
        run(storage, row("store"))
    assert storage.list() == files([UNITS[0], *UNITS[3:]])
    run(storage, row())
    assert storage.list() == files(UNITS)
    # as a traceback would name it; those of tests before may still come
    assert "StoreHiccup" not in capfd.readouterr().err


def test_what_the_user_can_mend_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^the weights are missing; name a folder$"):
        run(Storage(tmp_path), row("user"))


def test_a_worker_that_dies_is_replaced(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    run(storage, row("die"))
    assert storage.list("tried") == [f"tried/{UNITS[1]}"]
    assert storage.list("a") + storage.list("b") == files(UNITS)


def test_a_unit_that_kills_every_worker_costs_itself_only(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    said = r"1 of 6 units failed \(a/train-00001\).* its worker died 5 times"
    with pytest.raises(UserError, match=said):
        run(storage, row("always die"))
    assert storage.list() == files([UNITS[0], *UNITS[2:]])
    run(storage, row())
    assert storage.list() == files(UNITS)


def work(root: str, fault: str = "") -> Any:
    """A task for `spread`, by value."""

    def task(number: int) -> int:
        storage = Storage(root)
        if number == 3 and fault == "die" and not storage.exists("tried"):
            storage.write_bytes("tried", b"once")
            os._exit(1)
        if number == 3 and fault == "always die":
            os._exit(1)
        if number == 3 and fault == "user":
            raise UserError("part 3 is broken; replace it")
        if number == 3 and fault == "store":
            raise StoreHiccup("the store is out of reach")
        storage.write_bytes(f"done/{number}", b"x")
        return number * number

    return task


def spread_over(root: Path, fault: str = "", items: int = 8) -> list[int]:
    with Progress(terminal=False) as progress:
        return spread(work(str(root), fault), list(range(items)), "squares", progress=progress)


def test_spread_gives_results_in_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert spread_over(tmp_path) == [n * n for n in range(8)]
    assert "squares: 8/8" in capsys.readouterr().out
    assert spread_over(tmp_path, items=0) == []


def test_a_task_that_dies_is_run_again(tmp_path: Path) -> None:
    assert spread_over(tmp_path, "die") == [n * n for n in range(8)]
    assert (tmp_path / "tried").exists()


def test_a_task_that_always_dies_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a task of squares died again and again"):
        spread_over(tmp_path, "always die")


def test_a_task_that_the_user_can_mend_ends_the_rest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^part 3 is broken; replace it$"):
        spread_over(tmp_path, "user")


def test_a_store_out_of_reach_ends_when_the_others_are_through(tmp_path: Path) -> None:
    with pytest.raises(StoreHiccup, match="out of reach"):
        spread_over(tmp_path, "store")
    done = {int(path.name) for path in (tmp_path / "done").iterdir()}
    assert done == set(range(8)) - {3}
