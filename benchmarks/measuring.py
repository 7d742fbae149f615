"""What the benchmarks share: rounds that alternate, and CPU time of a process tree."""

from __future__ import annotations

import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch


def cpu_seconds(process: psutil.Process | None = None) -> float:
    """Of a process (none = this one), those it waited for, and all that live below it."""
    own = os.times()
    total = 0.0 if process else time.process_time() + own.children_user + own.children_system
    parent = process or psutil.Process()
    for each in [*([process] if process else []), *parent.children(recursive=True)]:
        try:
            times = each.cpu_times()
        except psutil.Error:
            continue
        total += times.user + times.system + times.children_user + times.children_system
    return total


Runs = dict[str, list[tuple[float, float]]]


def alternate(
    methods: dict[str, Callable[[], Any]],
    rounds: int,
    processes: Mapping[str, psutil.Process] | None = None,
) -> Runs:
    """(wall, CPU) seconds of every method in every round; one more round warms up. `processes`
    names those that do a method's work, where this one does not.
    """
    runs: Runs = {name: [] for name in methods}
    rng = random.Random(0)
    for done in range(rounds + 1):
        for name in rng.sample(list(methods), len(methods)):
            process = processes[name] if processes else None
            cpu, wall = cpu_seconds(process), time.perf_counter()
            methods[name]()
            if done:
                runs[name].append((time.perf_counter() - wall, cpu_seconds(process) - cpu))
        print(f"round {done} of {rounds}", file=sys.stderr, flush=True)
    return runs


def medians(runs: list[tuple[float, float]]) -> tuple[float, float]:
    wall, cpu = (statistics.median(column) for column in zip(*runs, strict=True))
    return wall, max(cpu, 1e-6)


def processor(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
