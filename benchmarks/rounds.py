"""Rivals side by side: run in turn, in an order that changes every round; medians and ratios.

Not a benchmark itself: the others import it.
"""

from __future__ import annotations

import contextlib
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import psutil


@dataclass
class Run:
    """One run of one contestant: what it did, and what that took."""

    amount: float
    wall_s: float
    cpu_s: float


def machine() -> str:
    """Date and processor, for the line above a table."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{datetime.now(UTC):%Y-%m-%d}, {name}, {psutil.cpu_count()} cores"


def cpu_seconds(without: psutil.Process | None = None) -> float:
    """CPU seconds so far of this process and all below it, those that ended and were waited for
    included; a process `without` (a server) is left out with its own.
    """
    left_out = set()
    if without is not None:
        left_out = {without.pid, *(child.pid for child in without.children(recursive=True))}
    total = 0.0
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        if process.pid not in left_out:
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                total += times.user + times.system + times.children_user + times.children_system
    return total


def alternate(
    contestants: Mapping[str, Callable[[], float]],
    rounds: int,
    cpu: Callable[[], float] = cpu_seconds,
) -> dict[str, list[Run]]:
    """Run every contestant once a round, after a first round that is not counted. A contestant
    returns how much it did (rows, images, bytes).
    """
    runs: dict[str, list[Run]] = {name: [] for name in contestants}
    rng = random.Random(0)
    for number in range(rounds + 1):
        for name in rng.sample(list(contestants), len(contestants)):
            before, started = cpu(), time.perf_counter()
            amount = contestants[name]()
            wall = time.perf_counter() - started
            if number:
                runs[name].append(Run(amount, wall, cpu() - before))
        print(f"round {number} of {rounds}", file=sys.stderr, flush=True)
    return runs


def table(runs: Mapping[str, list[Run]], title: str, unit: str, scale: float = 1.0) -> str:
    """Markdown: medians, and each contestant's rate as a share of the first one's, round by round.

    Rates are in `unit`, amount divided by `scale`.
    """
    lines = [
        f"| {title} | wall, s | CPU, s | {unit}/s | {unit}/CPU s "
        "| rate / first, wall | rate / first, CPU |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    first = next(iter(runs.values()))
    for name, own in runs.items():
        wall = _spread(
            [r.amount / r.wall_s / (f.amount / f.wall_s) for r, f in zip(own, first, strict=True)]
        )
        cpu = _spread(
            [r.amount / r.cpu_s / (f.amount / f.cpu_s) for r, f in zip(own, first, strict=True)]
        )
        took = _median(r.wall_s for r in own), _median(r.cpu_s for r in own)
        lines.append(
            f"| {name} | {took[0]:.2f} | {took[1]:.2f} "
            f"| {_median(r.amount / r.wall_s / scale for r in own):.3g} "
            f"| {_median(r.amount / r.cpu_s / scale for r in own):.3g} | {wall} | {cpu} |"
        )
    return "\n".join(lines)


def _median(values: object) -> float:
    return statistics.median(values)  # type: ignore[call-overload, no-any-return]


def _spread(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
