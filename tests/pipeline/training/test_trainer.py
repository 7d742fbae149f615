"""The driver's side: what it shows of a run that goes on elsewhere."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.progress import Progress
from pipeline.storage import Storage
from pipeline.training.record import Recorder
from pipeline.training.trainer import _Watch


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that the test moves."""
    moment = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: moment[0])
    return moment


def told(storage: Storage, step: int, start: int = 0, run: str = "ours", **figures: Any) -> None:
    recorder = Recorder(storage, "semantic", start, run)
    recorder.progress(step=step, steps=100, **figures)
    recorder.close()


def test_a_job_log_has_a_line_every_so_often(
    tmp_path: Path, now: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    storage = Storage(tmp_path)
    with Progress(terminal=False) as progress:
        run: Any = SimpleNamespace(storage=storage, token="ours")
        watch = _Watch(run, progress)
        watch.look()
        told(storage, 50, run="another")
        watch.look()
        assert capsys.readouterr().out == ""
        told(storage, 0)
        watch.look()
        for step in range(1, 101):
            now[0] += 1
            told(storage, step, loss=1 / step, samples_per_s=64.0, data_wait=0.02)
            watch.look()
        lines = capsys.readouterr().out.splitlines()
        assert 15 <= len(lines) <= 21, "every five seconds of a hundred"
        assert lines[0] == (
            "semantic: 5/100 in 0:05, ETA 1:35, 1/s, loss 0.2 samples/s 64 data wait 2.0%"
        )
        assert lines[-1].startswith("semantic: 100/100 in 1:40, 1/s, loss 0.01 ")


def test_a_restart_goes_on_from_its_checkpoint(
    tmp_path: Path, now: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    storage = Storage(tmp_path)
    with Progress(terminal=False) as progress:
        run: Any = SimpleNamespace(storage=storage, token="ours")
        watch = _Watch(run, progress)
        told(storage, 0)
        watch.look()
        now[0] += 10
        told(storage, 40, loss=0.5, validation_loss=0.75)
        watch.look()
        told(storage, 30, start=30)
        watch.look()
        for _ in range(30):
            now[0] += 1
            watch.look()
        lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("semantic: 40/100 in 0:10, ETA 0:15, 4/s, loss 0.5 held out 0.75")
    assert lines[1] == "semantic: 30 of 100 are there already"
    assert lines[2] == "semantic: 30/100 in 0:25, nothing new for 0:25" and len(lines) == 3


def test_a_terminal_has_one_bar_for_a_stage(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    with Progress(terminal=True) as progress:
        run: Any = SimpleNamespace(storage=storage, token="ours")
        watch = _Watch(run, progress)
        for start, step in ((0, 0), (0, 40), (30, 30), (30, 60)):
            told(storage, step, start, samples_per_s=64.0)
            watch.look()
        assert progress._bars is not None
        (bar,) = progress._bars.tasks
        assert bar.completed == 60 and "samples/s 64" in bar.fields["figures"]
        assert "ETA" in bar.fields["figures"]


class Told:
    """The metrics as they were set last, by stage."""

    def __init__(self) -> None:
        self.said: dict[str, dict[str, Any]] = {}

    def publish(self, stage: str, figures: dict[str, Any]) -> None:
        self.said[stage] = dict(figures)


def test_what_stands_still_and_what_is_unsaved_is_told(tmp_path: Path, now: list[float]) -> None:
    storage = Storage(tmp_path)
    with Progress(terminal=False) as progress:
        run: Any = SimpleNamespace(storage=storage, token="ours")
        watch = _Watch(run, progress)
        watch.metrics = metrics = Told()  # type: ignore[assignment]

        def look(after: float, stage: str) -> dict[str, Any]:
            now[0] += after
            watch.look()
            return metrics.said[stage]

        assert look(0, "starting") == {"stalled": 0}
        assert look(30, "starting") == {"stalled": 30}, "workers load, or there is no room"
        told(storage, 0, checkpoint=0)
        look(1, "semantic")
        told(storage, 10, checkpoint=0, loss=0.5)
        said = look(60, "semantic")
        assert (said["stalled"], said["unsaved"], said["loss"]) == (0, 60, 0.5)
        assert look(60, "semantic")["stalled"] == 60
        told(storage, 20, checkpoint=20)
        said = look(60, "semantic")
        assert (said["stalled"], said["unsaved"]) == (0, 0)
        (tmp_path / "train/progress.json").write_text("{")  # a store that cannot be read
        said = look(60, "semantic")
        assert (said["stalled"], said["unsaved"], said["step"]) == (60, 60, 20)
