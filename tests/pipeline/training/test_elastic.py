"""How many workers train, and when they leave: without a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline.config import TrainConfig
from pipeline.errors import StoreHiccup, UserError
from pipeline.progress import Progress
from pipeline.training import elastic, trainer
from pipeline.training.elastic import Sizes
from pipeline.training.run import Run
from pipeline.training.stage import World
from tests.pipeline.training.test_run import EXPORT, config


def sizes(monkeypatch: pytest.MonkeyPatch, gpus: int = 0, **settings: Any) -> Sizes:
    there = {"GPU": gpus, "CPU": 64}
    monkeypatch.setattr(elastic, "room", lambda kind: there[kind])
    return Sizes.of(TrainConfig(lanes=12, **settings))


def test_sizes_divide_the_lanes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sizes(monkeypatch, 8) == Sizes((6,), "GPU")
    assert sizes(monkeypatch, 8, workers=4) == Sizes((4,), "GPU")
    assert sizes(monkeypatch, 8, use_gpu=False).kind == "CPU"
    assert sizes(monkeypatch, 0, workers=6, min_workers=2) == Sizes((2, 3, 4, 6), "CPU")
    assert sizes(monkeypatch, 5, min_workers=5).allowed == (6, 12)  # as many as come
    with pytest.raises(UserError, match="5 workers do not divide 12 lanes"):
        sizes(monkeypatch, workers=5)
    with pytest.raises(UserError, match="no number of workers from 13 to 12 divides 12 lanes"):
        sizes(monkeypatch, min_workers=13)


def test_the_largest_that_fits_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    found = sizes(monkeypatch, 5, workers=6, min_workers=2)
    assert found.fitting() == 4 and found.more(4) == 2 and found.more(6) == 0
    assert sizes(monkeypatch, 1, workers=6, min_workers=2).fitting() == 0


def test_it_is_waited_for_on_a_cluster_only(monkeypatch: pytest.MonkeyPatch) -> None:
    rooms = iter([0, 0, 1, 1, 3])
    found = Sizes((2, 3), "GPU")
    monkeypatch.setattr(elastic, "room", lambda kind: next(rooms))
    monkeypatch.setattr(elastic, "_LOOK_S", 0.01)
    asked: list[tuple[str, int]] = []

    class Asked:
        def __init__(self, *what: Any) -> None:
            asked.append(what)

        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(elastic, "_asked", Asked)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert found.wait(TrainConfig()) == 3 and asked == [("GPU", 2)]
    monkeypatch.setattr(elastic, "room", lambda kind: 1)
    with pytest.raises(UserError, match=r"2 GPU workers at least, .* room for 1, after 0 minutes"):
        found.wait(TrainConfig(wait_minutes=0))
    monkeypatch.delenv("RAY_ADDRESS")
    with pytest.raises(UserError, match="room for 1; lower workers"):
        found.wait(TrainConfig())


def test_who_leaves_has_saved_and_goes_on_bit_for_bit(
    root: Path, tiny_models: Path, tmp_path: Path
) -> None:
    """Left at the second and at the fifth log, and never after a stage's last step."""
    cfg = config(root, tiny_models, checkpoint_steps=100, log_steps=1)
    cfg.semantic.steps = cfg.multi_scale.steps = 4
    asked = 0

    def leaving() -> bool:
        nonlocal asked
        asked += 1
        return asked in (2, 4, 5)

    run = Run(cfg)
    run.take_over()
    assert run.work(World(), leaving) is None and run.position() == (0, 2)
    assert not run.done(run.stages[0])
    # at the stage's last step there is nothing to leave; the next stage is left at its first
    assert run.work(World(), leaving) is None and run.position() == (1, 1)
    assert run.work(World(), leaving) is not None and run.finished
    ours = load_file(root / EXPORT)

    other = tmp_path / "undisturbed"
    (other / "features").mkdir(parents=True)
    for path in (root / "features").iterdir():
        (other / "features" / path.name).write_bytes(path.read_bytes())
    calm = config(other, tiny_models, checkpoint_steps=100, log_steps=1)
    calm.semantic.steps = calm.multi_scale.steps = 4
    again = Run(calm)
    again.take_over()
    again.work(World())
    theirs = load_file(other / EXPORT)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_smaller_size_is_tried_where_others_hold_the_room(
    root: Path, tiny_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No room for six or four workers, then none at all; tries are for what fails otherwise."""
    from ray.train import ControllerError
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

    monkeypatch.setattr(elastic, "room", lambda kind: {"GPU": 0, "CPU": 64}[kind])
    cfg = config(root, tiny_models, lanes=12, global_batch=12, workers=6, min_workers=3)
    asked: list[int] = []

    def attempt(run: Run, sizes: Sizes, size: int, progress: Any) -> Any:
        asked.append(size)
        if size > 3 or len(asked) > 5:
            raise ControllerError(WorkerGroupStartupTimeoutError(num_workers=size))
        if len(asked) == 3:
            raise StoreHiccup("the store is out of reach")
        return None  # left: for one that is larger

    monkeypatch.setattr(trainer, "_attempt", attempt)
    with pytest.raises(UserError, match="no room for 3 CPU workers for 10 minutes"):
        trainer.fit(Run(cfg), Progress())
    assert asked == [6, 4, 3, 3, 4, 3]


def test_three_failures_without_progress_end_it(
    root: Path, tiny_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(elastic, "room", lambda kind: {"GPU": 0, "CPU": 64}[kind])
    run, steps = Run(config(root, tiny_models)), iter([0, 0, 0, 8, 8, 8, 8])
    monkeypatch.setattr(Run, "position", lambda self: (0, next(steps)))
    failed = 0

    def attempt(*_: Any) -> Any:
        nonlocal failed
        failed += 1
        raise RuntimeError("a worker died")

    monkeypatch.setattr(trainer, "_attempt", attempt)
    with pytest.raises(RuntimeError, match="a worker died"):
        trainer.fit(run, Progress())
    assert failed == 6  # two, then one that got on, then three
