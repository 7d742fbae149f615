"""One training loop for all mini models: seeded by step, checkpointed, resumable, EMA, progress."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import nn

StepFn = Callable[[int, np.random.Generator], Mapping[str, torch.Tensor]]


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up, then a cosine to a hundredth of the peak at the last step."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


def fit(
    name: str,
    module: nn.Module,
    step_fn: StepFn,
    *,
    steps: int,
    peak: float,
    work: Path,
    warmup: int = 100,
    weight_decay: float = 0.01,
    ema_decay: float = 0.0,
    seed: int = 0,
    save_every: int = 250,
    say: Callable[[str], None] = print,
) -> nn.Module:
    """Train `module` in place and return it, with its EMA weights where `ema_decay` is set.

    `step_fn(step, rng)` returns {"loss": scalar, ...}; everything random in it comes from `rng`
    (seeded by (seed, step)) and torch's global generator (seeded alike), so a run that is
    stopped goes on from `work/<name>.pt` as if it never had been.
    """
    checkpoint = work / f"{name}.pt"
    work.mkdir(parents=True, exist_ok=True)
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=peak, weight_decay=weight_decay, betas=(0.9, 0.98), fused=True
    )
    average = {k: v.detach().clone() for k, v in module.state_dict().items()}
    start, spent = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True, map_location=parameters[0].device)
        module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        average, start, spent = state["average"], state["step"], state["seconds"]
        say(f"{name}: goes on at step {start}/{steps}")

    began = time.perf_counter()

    def save(step: int) -> None:
        partial = checkpoint.with_suffix(".partial")
        torch.save(
            {
                "module": module.state_dict(),
                "optimizer": optimizer.state_dict(),
                "average": average,
                "step": step,
                "seconds": spent + time.perf_counter() - began,
            },
            partial,
        )
        partial.replace(checkpoint)

    module.train()
    sums: dict[str, float] = {}
    counted = 0
    for step in range(start, steps):
        torch.manual_seed(seed * 1_000_003 + step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak, warmup)
        values = step_fn(step, np.random.default_rng([seed, step]))
        values["loss"].backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if ema_decay:
            decay = min(ema_decay, (step + 1) / (step + 10))
            with torch.no_grad():
                for key, value in module.state_dict().items():
                    if value.dtype.is_floating_point:
                        average[key].lerp_(value, 1 - decay)
                    else:
                        average[key].copy_(value)
        for key, value in values.items():
            sums[key] = sums.get(key, 0.0) + float(value.detach())
        counted += 1
        if (step + 1) % 50 == 0 or step + 1 == steps:
            rate = (step + 1 - start) / (time.perf_counter() - began)
            figures = "  ".join(f"{k} {v / counted:.4f}" for k, v in sums.items())
            left = (steps - step - 1) / rate
            say(
                f"{name}: step {step + 1}/{steps}  {figures}  {rate:.2f} steps/s  {left:.0f} s left"
            )
            sums, counted = {}, 0
        if (step + 1) % save_every == 0 or step + 1 == steps:
            save(step + 1)
    if ema_decay:
        module.load_state_dict(average)
    return module.eval()


def seconds_spent(name: str, work: Path) -> int:
    """Wall seconds that the steps of `fit(name, ...)` took, over all its runs."""
    return round(torch.load(work / f"{name}.pt", weights_only=True)["seconds"])
