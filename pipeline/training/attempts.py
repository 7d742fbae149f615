"""What each attempt at a stage was: where it began and came to, on what, how long it took.

A run that was never disturbed has one attempt per stage. `train/<stage>/attempts/<number>.json`
is written anew as the attempt goes on, so that one that was killed is told of too.
"""

from __future__ import annotations

import importlib.metadata
import platform
import time
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import torch

import pipeline
from pipeline.config import TrainConfig
from pipeline.storage import Storage
from pipeline.training.stage import World

_PACKAGES = ("torch", "ray", "diffusers", "transformers", "pyarrow", "numpy")


def about(cfg: TrainConfig, world: World) -> dict[str, Any]:
    """What an attempt runs with: workers, device, versions, all settings."""
    gpu = world.device.type == "cuda"
    versions = {"ssr-on-ray": pipeline.__version__, "python": platform.python_version()}
    versions |= {name: importlib.metadata.version(name) for name in _PACKAGES}
    if torch.version.cuda:
        versions["cuda"] = torch.version.cuda
    return {
        "workers": world.size,
        "kind": world.device.type,
        "device": torch.cuda.get_device_name(world.device) if gpu else f"{platform.machine()} CPU",
        "versions": versions,
        "settings": asdict(cfg),
    }


class Attempt:
    """The attempt that goes on; rank 0 alone has one.

    Args:
        storage: the run's root.
        stage: name of the stage.
        start: step that it goes on from.
        what: see `about`.
    """

    def __init__(self, storage: Storage, stage: str, start: int, what: dict[str, Any]) -> None:
        self.storage, self.folder = storage, f"train/{stage}/attempts"
        taken = [path.rpartition("/")[2].partition(".")[0] for path in storage.list(self.folder)]
        self.number = 1 + max((int(name) for name in taken if name.isdigit()), default=0)
        self._began = time.monotonic()
        started = datetime.now(UTC).isoformat(timespec="seconds")
        self._what = {"started": started, "start": start, **what}

    def save(self, step: int) -> None:
        """It is there at `step`. Raises UserError when the store refuses."""
        seconds = round(time.monotonic() - self._began, 1)
        told = {**self._what, "step": step, "seconds": seconds}
        self.storage.write_json(f"{self.folder}/{self.number:04d}.json", told)
