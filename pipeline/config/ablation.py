"""Settings of an ablation, a part of jobs/evaluate.py."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from pipeline.config.shared import at_least
from pipeline.errors import UserError


@dataclass
class AblationConfig:
    """Encoders that are trained to be compared: the same data, budget and seeds for each arm."""

    arms: list[str] = field(default_factory=list)
    """What is compared: text-only, full, no-multi-scale, no-reg, whole-image (Table 3 of the paper
    and its fair rival); paper, released, caption-query, one-subject, drop-subject, random-layers,
    int8 (our choices); reg-0.1, reg-0.01 (weights of L_reg). Empty = no ablation."""
    name: str = "ablation"
    """Its results go to root/evaluation/<name>. Ablations of one root share what they train."""
    seeds: int = 3
    """Trainings of each arm, seeds 0, 1, ..."""
    steps: int = 800
    """Optimizer steps of each training, three eighths of them on the last scale alone."""
    data: str = "runs/mini"
    """Curated root whose features all arms are trained on."""
    data_int8: str = "runs/mini-int8"
    """The same, curated with --features.codec int8: for the arm int8."""
    train_preset: str = "mini"
    """Preset whose settings of jobs/train.py every arm starts from."""
    cpus: float = 1.0
    """Cores of one training; as many run at once as there is room for."""
    gpus: float = 0.0
    """GPUs of one training."""

    def __post_init__(self) -> None:
        at_least(self, "ablation", seeds=1, steps=8, cpus=0.01, gpus=0)
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name):
            raise UserError(f"ablation.name: {self.name!r} cannot name a folder; choose another")
