"""Figures of a stretch of steps: summed on the device, and over the workers as they leave it."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.training.stage import World

MEASURED = ("loss", "ldm", "reg", "grad_norm")
"""What every step tells, in this order."""
BINS = 10
"""Equal parts of the diffusion's timesteps, whose L_LDM is told apart: at high noise a prediction
is easy, and its loss hides what the others learn."""


def by_timestep(losses: Tensor, timesteps: Tensor, total: int) -> Tensor:
    """Sums of `losses` (B,) float and numbers of rows by part of the timesteps, (2, BINS) float32.

    timesteps: (B,) int64 in [0, total), on the same device.
    """
    part = timesteps[:, None] * BINS // total == torch.arange(BINS, device=losses.device)
    rows = part.float()
    # not a product: 0 * inf would spoil the parts that have nothing to do with it
    return torch.stack([torch.where(part, losses[:, None].float(), 0.0).sum(0), rows.sum(0)])


def bin_names(total: int) -> list[str]:
    """The parts by their first and last timesteps: t000-099, t100-199, ..."""
    starts = [-(-part * total // BINS) for part in range(BINS + 1)]
    width = len(str(total - 1))
    return [f"t{first:0{width}d}-{after - 1:0{width}d}" for first, after in pairwise(starts)]


def bin_means(sums: list[float], rows: list[float], total: int, prefix: str) -> dict[str, float]:
    """Mean L_LDM by part, under `<prefix>_<part>`, to six digits; parts without a row are left
    out.
    """
    found = zip(bin_names(total), sums, rows, strict=True)
    return {f"{prefix}_{name}": float(f"{value / n:.6g}") for name, value, n in found if n}


class Means(NamedTuple):
    """Of a stretch of steps, over all workers."""

    figures: dict[str, float]
    """Means of the steps that were taken: MEASURED, and `ldm_<part>` by timestep. {} if none."""
    skipped: int
    """Steps that were not taken."""
    also: float = 0.0
    """The sum of what the workers gave besides."""


class Sums:
    """Adds up what steps tell; nothing waits for the device until `means`.

    Args:
        timesteps: number of diffusion timesteps of the base model.
        device: where the steps are taken.
    """

    def __init__(self, timesteps: int, device: torch.device) -> None:
        self.timesteps = timesteps
        self._sums = torch.zeros(len(MEASURED) + 2 + 2 * BINS, device=device)

    def add(self, good: Tensor, figures: Tensor, bins: Tensor) -> None:
        """One step.

        good: scalar bool, whether it was taken; figures: (4,) as in MEASURED; bins: (2, BINS).
        """
        counted = torch.cat([figures, figures.new_ones(1), bins.flatten()])
        self._sums[:-1] += torch.where(good, counted, 0.0)
        self._sums[-1] += ~good

    def means(self, world: World, also: float = 0.0) -> Means:
        """Means over the workers since the last call. All of them call it; `also` is a number of
        each that travels along.
        """
        told = torch.cat([self._sums, self._sums.new_tensor([also])])
        *values, skipped, also = world.sum(told).tolist()
        self._sums.zero_()
        measured, (taken, *bins) = values[: len(MEASURED)], values[len(MEASURED) :]
        left = int(skipped / world.size)
        if not taken:
            return Means({}, left, also)
        figures = {name: value / taken for name, value in zip(MEASURED, measured, strict=True)}
        parts = bin_means(bins[:BINS], bins[BINS:], self.timesteps, "ldm")
        return Means({**figures, **parts}, left, also)
