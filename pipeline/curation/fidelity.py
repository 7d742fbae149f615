"""What a lossy codec costs, measured on every row while it is written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch

from pipeline.shards import decode_states

Figures = dict[str, dict[str, float]]
"""Depth (as JSON names it) -> relative_rms, worst_cosine, and mean_square of the states."""


def row_errors(
    states: Mapping[int, torch.Tensor], columns: Mapping[str, torch.Tensor]
) -> dict[int, torch.Tensor]:
    """Per depth and row (B, 3) float32: mean square of the error and of the states, and the worst
    cosine between a token and what is read back. Stays on the states' device.
    """
    errors = {}
    for depth, back in decode_states(columns, states).items():
        true, back = states[depth].float(), back.float()
        cosine = torch.cosine_similarity(true, back, dim=-1)
        # a token of zeros is stored exactly, and has no direction
        cosine = torch.where(true.abs().amax(-1) > 0, cosine, 1.0)
        squares = [(back - true).square().mean((1, 2)), true.square().mean((1, 2))]
        errors[depth] = torch.stack([*squares, cosine.amin(-1)], dim=1)
    return errors


class Fidelity:
    """Sums `row_errors` over the rows of a unit."""

    def __init__(self) -> None:
        self.rows = 0
        self._sums: dict[int, np.ndarray] = {}
        self._worst: dict[int, float] = {}

    def add(self, errors: Mapping[int, np.ndarray]) -> None:
        """Count rows in: (rows, 3) of each depth."""
        for depth, values in errors.items():
            if len(values):
                total = values[:, :2].astype(np.float64).sum(0)
                self._sums[depth] = self._sums.get(depth, np.zeros(2)) + total
                self._worst[depth] = min(self._worst.get(depth, 1.0), float(values[:, 2].min()))
        self.rows += len(next(iter(errors.values()), ()))

    def figures(self) -> Figures:
        """Four digits: a batch of another size changes the last bits of a sum."""
        return {
            str(depth): {
                "relative_rms": _short(_relative(error, signal)),
                "worst_cosine": round(self._worst[depth], 6),
                "mean_square": _short(signal / self.rows),
            }
            for depth, (error, signal) in self._sums.items()
        }


def combined(parts: Iterable[tuple[int, Figures]]) -> Figures:
    """The figures of several units together, from (rows, figures) of each; without mean_square."""
    sums: dict[str, np.ndarray] = {}
    worst: dict[str, float] = {}
    for rows, figures in parts:
        for depth, own in figures.items():
            signal = rows * own["mean_square"]
            both = np.array([own["relative_rms"] ** 2 * signal, signal])
            sums[depth] = sums.get(depth, np.zeros(2)) + both
            worst[depth] = min(worst.get(depth, 1.0), own["worst_cosine"])
    return {
        depth: {
            "relative_rms": _short(_relative(error, signal)),
            "worst_cosine": worst[depth],
        }
        for depth, (error, signal) in sums.items()
    }


def _relative(error: float, signal: float) -> float:
    return float(np.sqrt(error / signal)) if signal else 0.0


def _short(value: float) -> float:
    return float(f"{value:.4g}")
