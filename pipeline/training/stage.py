"""What a stage of training is, who trains it, and what stays frozen meanwhile."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.config import OptimConfig
from pipeline.training.vision import OnlineVision

_FOR_EVER = timedelta(days=7)


@dataclass(frozen=True)
class World:
    """Which worker this is. With more than one, torch.distributed is initialised already."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over the workers, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def from_first(self, value: Any) -> Any:
        """Rank 0's value, on every worker."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def first_alone(self, name: str, work: Callable[[], None]) -> None:
        """Rank 0 works; the others wait until it is through, however long that takes. They wait at
        no collective, whose time is limited. `name` is of this one occasion.
        """
        if self.size == 1:
            return work()
        store = dist.distributed_c10d._get_default_store()  # type: ignore[no-untyped-call]
        if self.rank:
            store.wait([name], _FOR_EVER)
            return
        try:
            work()
        finally:
            store.set(name, "done")

    def gather(self, value: Any) -> list[Any]:
        """Every worker's value, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values


STAGES = {1: "semantic", 2: "multi_scale"}
"""The paper's two stages: of the last scale, and of all."""


@dataclass(frozen=True)
class Stage:
    """One training stage: which scales, for how long, and its place in the run."""

    name: str
    number: int
    depths: tuple[int, ...]
    optim: OptimConfig


@dataclass
class Frozen:
    """What is not trained: the base model's U-Net, text encoder, tokenizer and noise schedule, and
    CLIP's vision tower where training runs it.
    """

    unet: nn.Module
    text_encoder: nn.Module
    tokenizer: Any
    scheduler: Any
    """A diffusers scheduler with `add_noise`, `get_velocity` and the base model's config."""
    scaling_factor: float
    """Of the VAE: latents as the U-Net knows them = scaling_factor * sample."""
    vision: OnlineVision | None = None
    """For shards of pixels; the others hold what it would compute."""
    load_vae: Callable[[], Any] | None = None
    """Loads the VAE, which only samples need."""

    def to(self, device: torch.device) -> Frozen:
        """Move the models; convolutions are a quarter faster in channels_last, on CPUs too."""
        self.unet.to(device, memory_format=torch.channels_last).requires_grad_(False).eval()  # type: ignore[call-overload]
        self.text_encoder.to(device).requires_grad_(False).eval()
        if self.vision is not None:
            self.vision.to(device)
        return self


def learning_rate(optim: OptimConfig, step: int) -> float:
    """Learning rate of the step that makes `step` + 1 steps done."""
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    if optim.schedule == "constant":
        return optim.lr
    length = max(1, optim.steps - optim.warmup_steps)
    return optim.lr * 0.5 * (1 + math.cos(math.pi * (step - optim.warmup_steps) / length))
