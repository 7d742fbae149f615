"""jobs/train.py on tiny models, in a process of its own."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

REPOSITORY = Path(__file__).resolve().parents[2]
STEPS, EVERY = 40, 4  # long enough to be killed in between


def command(root: Path | str, folder: Path, workers: int, **settings: Any) -> list[str]:
    given: dict[str, Any] = {
        "root": root,
        "models.base": folder / "sd",
        "models.vision": folder / "clip",
        "workers": workers,
        "global_batch": 8,
        "lanes": 4,
        "heads": 2,
        "head_dim": 8,
        "queries": 2,
        "start_token": "false",
        "drop_article": 0.5,
        "semantic.steps": STEPS,
        "multi_scale.steps": STEPS,
        "checkpoint_steps": EVERY,
        "log_steps": EVERY,
        "validate_steps": STEPS // 2,
        "validate_rows": 8,
        **settings,
    }
    words = [word for key, value in given.items() for word in (f"--{key}", str(value))]
    return [sys.executable, "jobs/train.py", *words]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}


def trained(root: Path) -> dict[str, torch.Tensor]:
    return load_file(root / "model" / "model.safetensors")


def checkpoints(root: Path, stage: str) -> list[str]:
    return sorted(p.parent.name for p in (root / "train" / stage).rglob("checkpoint.json"))
