"""What the benchmarks share: rounds that alternate, and CPU time of a process tree."""

from __future__ import annotations

import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch


def cpu_seconds() -> float:
    """Of this process, those it waited for, and all that live below it."""
    own = os.times()
    total = time.process_time() + own.children_user + own.children_system
    for child in psutil.Process().children(recursive=True):
        try:
            times = child.cpu_times()
        except psutil.Error:
            continue
        total += times.user + times.system + times.children_user + times.children_system
    return total


Runs = dict[str, list[tuple[float, float]]]


def alternate(methods: dict[str, Callable[[], Any]], rounds: int) -> Runs:
    """(wall, CPU) seconds of every method in every round; one more round warms up."""
    runs: Runs = {name: [] for name in methods}
    rng = random.Random(0)
    for done in range(rounds + 1):
        for name in rng.sample(list(methods), len(methods)):
            cpu, wall = cpu_seconds(), time.perf_counter()
            methods[name]()
            if done:
                runs[name].append((time.perf_counter() - wall, cpu_seconds() - cpu))
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
