"""Stages that each take the only GPU: one after the other, and not for ever waiting."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.cluster import _start
from pipeline.config import StageResources
from pipeline.errors import UserError
from pipeline.progress import Progress
from pipeline.runner import StageSpec, run_stages, waves
from pipeline.storage import Storage
from pipeline.units import Ledger, Tally

UNITS = [f"train-{index:05d}" for index in range(3)]
pytestmark = [pytest.mark.system, pytest.mark.timeout(600)]


@pytest.fixture(scope="module", autouse=True)
def one_gpu() -> Iterator[None]:
    """A cluster that says it has one, which is all that Ray asks."""
    import ray

    options = {"address": "local", "num_cpus": 4, "num_gpus": 1, "include_dashboard": False}
    _start(ray, {**options, "object_store_memory": 100 * 2**20}, tries=3)
    yield
    ray.shutdown()


def spec(name: str, source: str | None, gpus: float, fails: str = "") -> StageSpec:
    class Copy:
        def __init__(self) -> None:
            self.name, self.source, self.settings = name, source, {}

        def __call__(self, unit: str, storage: Storage, sink: BinaryIO) -> Tally:
            if fails and unit.endswith(fails):
                raise ValueError("a broken file")
            if self.source is not None:
                assert storage.exists(f"{self.source}/{unit}.parquet")
            pq.write_table(pa.table({"number": [1]}), sink)
            return Tally(1, 1)

    return StageSpec(name, Copy, StageResources(cpus=0 if gpus else 1, gpus=gpus))


def stages(gpus: float, fails: str = "") -> list[StageSpec]:
    return [
        spec("images", None, 0),
        spec("captions", "images", gpus, fails),
        spec("features", "captions", gpus),
    ]


def names(found: Iterable[list[StageSpec]]) -> list[list[str]]:
    return [[spec.name for spec in wave] for wave in found]


def test_stages_overlap_where_there_is_room(capsys: pytest.CaptureFixture[str]) -> None:
    assert names(waves(stages(gpus=0.5), 0.0)) == [["images", "captions", "features"]]
    assert capsys.readouterr().out == ""
    assert names(waves(stages(gpus=1), 0.0)) == [["images", "captions"], ["features"]]
    assert "at once: images+captions now, features later" in capsys.readouterr().out


def test_room_is_waited_for_once_and_asked_for_before_each_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[int, float]] = []
    gpus = [0]

    def together(workers: Sequence[StageResources], patience_s: float = 0.0) -> bool:
        asked.append((len(workers), patience_s))
        return sum(worker.gpus for worker in workers) <= gpus[0]

    monkeypatch.setattr("pipeline.runner.together", together)
    turns = waves([*stages(gpus=1), spec("scores", "images", 1)], 600.0)
    assert [each.name for each in next(turns)] == ["images"]
    assert asked == [(4, 600), (2, 0)]
    gpus[0] = 2  # the nodes have come meanwhile
    assert [each.name for each in next(turns)] == ["captions", "features"]
    assert asked[2:] == [(3, 0), (2, 0)]
    assert [each.name for each in next(turns)] == ["scores"]
    assert asked[4:] == [] and list(turns) == []
    gpus[0] = 0
    turns = waves(stages(gpus=1), 600.0)
    next(turns)
    gpus[0] = 2
    assert names(list(turns)) == [["captions", "features"]]


def test_they_take_turns_where_there_is_not(tmp_path: Path) -> None:
    """Captions and features would each hold the GPU that the other waits for."""
    storage = Storage(tmp_path)
    with Progress(terminal=False) as progress:
        run_stages(stages(gpus=1), UNITS, storage, progress)
    assert set(Ledger(storage, "features").done()) == set(UNITS)
    assert sorted(path.stem for path in (tmp_path / "features").glob("*.parquet")) == UNITS


def test_a_unit_that_fails_before_the_turn_costs_itself_alone(tmp_path: Path) -> None:
    with (
        Progress(terminal=False) as progress,
        pytest.raises(UserError, match=r"1 of 3 units failed \(captions/train-00001\)"),
    ):
        run_stages(stages(gpus=1, fails="1"), UNITS, Storage(tmp_path), progress)
    made = sorted(path.stem for path in (tmp_path / "features").glob("*.parquet"))
    assert made == [UNITS[0], UNITS[2]]
