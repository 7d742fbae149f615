"""The arms of ablations: what each is trained with, and what the paper claims of the difference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.evaluation.methods.ssr import By

ARMS_FOLDER = "arms"


@dataclass(frozen=True)
class Arm:
    """What one row of the table is trained with, besides the preset's settings."""

    title: str
    train: Mapping[str, Any] | None = field(default_factory=dict)
    """Settings of jobs/train.py; None = nothing is trained."""
    by: By = "text"
    """How it is told which subject is meant."""
    int8: bool = False
    """Whether it is trained on features stored as int8."""


_NO_SELECTION = {"drop_query": 1.0, "tau": 0.0, "queries": 1, "mask_cls": True}
ARMS: dict[str, Arm] = {
    "text-only": Arm("Text only", None),
    "full": Arm("Full"),
    "no-multi-scale": Arm("Without multi-scale", {"single_scale": True}),
    "no-reg": Arm("Without L_reg", {"tau": 0.0}),
    "whole-image": Arm("Whole image, no selection", _NO_SELECTION, by="nothing"),
    "paper": Arm(
        "Variant paper",
        {"heads": 1, "head_dim": 96, "value_projection": "direct", "token_norm": False},
    ),
    # its L_reg is a sum over the three scales, not their mean
    "released": Arm(
        "Variant released",
        {"variant": "released", "heads": 8, "head_dim": 12, "start_token": True, "tau": 1 / 3},
    ),
    "caption-query": Arm("Query: the caption", {"query": "caption"}),
    "one-subject": Arm("One subject of an image at a time", {"queries": 1}),
    "drop-subject": Arm("Subject dropped (0.1)", {"drop_subject": 0.05, "drop_both": 0.05}),
    "random-layers": Arm("Random K_S, V_S", {"init_layers": "random"}),
    "int8": Arm("Features as int8", int8=True),
    "reg-0.1": Arm("tau 0.1", {"tau": 0.1}),
    "reg-0.01": Arm("tau 0.01 (the paper's)", {"tau": 0.01}),
}
"""By the names that settings know them by. `single_scale` spends the whole budget on stage 1."""


@dataclass(frozen=True)
class Trial:
    """One arm with one seed."""

    arm: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.arm}-s{self.seed}"

    @property
    def trained(self) -> bool:
        return ARMS[self.arm].train is not None


@dataclass(frozen=True)
class Claim:
    """That one arm is better than another in these measures."""

    said: str
    better: str
    worse: str
    measures: Sequence[str]


CLAIMS = (
    Claim(
        "multi-scale raises subject detail",
        "full", "no-multi-scale", ("dino_m", "distance_target", "texture"),
    ),
    Claim(
        "L_reg raises exclusivity",
        "full", "no-reg", ("clip_es", "other_absent", "distance_other", "peak_other"),
    ),
    Claim("L_reg raises text alignment", "full", "no-reg", ("clip_t", "target_present")),
    Claim(
        "selection beats conditioning on the whole image",
        "full", "whole-image", ("selected", "nearer", "clip_es", "dino_m"),
    ),
)  # fmt: skip
"""The paper's, in the measures that can show them (arXiv 2312.16272, sections 3.2, 3.3, 4.4)."""
