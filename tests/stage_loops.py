"""A stage's loop on the tiny models as a run makes it, not begun: for tests of its step alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.config import ModelsConfig, OptimConfig, TrainConfig
from pipeline.training.loop import StageLoop
from pipeline.training.run import Run
from pipeline.training.stage import World


def small_config(root: Path, folder: Path, **fields: Any) -> TrainConfig:
    """Settings of one short stage of all scales."""
    given: dict[str, Any] = {
        "models": ModelsConfig(base=str(folder / "sd"), vision=str(folder / "clip")),
        "global_batch": 4,
        "lanes": 2,
        "heads": 2,
        "head_dim": 8,
        "semantic": OptimConfig(steps=0),
        "multi_scale": OptimConfig(steps=8, lr=1e-3),
        "checkpoint_steps": 100,
        "log_steps": 4,
        "validate_steps": 0,
    }
    return TrainConfig(root=str(root), **{**given, **fields})


def stage_loop(cfg: TrainConfig) -> StageLoop:
    """The loop of the run's one stage."""
    made: list[StageLoop] = []
    run = Run(cfg)
    run.take_over()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StageLoop, "run", lambda loop: made.append(loop) or {})
        patch.setattr(Run, "_export", lambda self: None)
        run.work(World())
    (run.storage.sub(f"train/{made[0].stage.name}")).delete("done.json")
    return made[0]


def interrupt(loop: StageLoop, step: int) -> None:
    """The loop is interrupted, as by Ctrl-C, when it begins this step."""
    take = loop._take

    def interrupted(inputs: Any) -> None:
        if loop.step == step:
            raise KeyboardInterrupt
        take(inputs)

    loop._take = interrupted  # type: ignore[method-assign]
