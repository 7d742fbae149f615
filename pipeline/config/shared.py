"""Settings that several jobs have."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from pipeline.errors import UserError

Precision: TypeAlias = Literal["float32", "float16", "bfloat16"]
"""Of models that draw."""

MAX_PIXELS = 50_000_000
"""Of a picture that is decoded, whoever brought it: few bytes may unpack to any number."""


def absolute(path: str) -> str:
    """As a worker with another working directory reads it too; s3:// and gs:// stay as they are."""
    return path if "://" in path else str(Path(path).expanduser().absolute())


def at_least(settings: object, section: str, **least: float) -> None:
    """Raise UserError for a setting below its least value; for `__post_init__`."""
    for name, lowest in least.items():
        value = getattr(settings, name)
        if value < lowest:
            raise UserError(f"{section}.{name} is {value}; it must be at least {lowest}")


@dataclass
class ModelsConfig:
    """Which pretrained models the run stands on: hub ids, or folders of the same layout."""

    base: str = "miniworld:sd"
    """Stable Diffusion in diffusers' layout: hub id, folder, or miniworld:sd (shipped)."""
    vision: str = "miniworld:clip"
    """CLIP whose vision tower gives the multi-scale features: hub id, folder, or miniworld:clip."""
    captioner: str = "miniworld:blip2"
    """BLIP-2 that re-captions: hub id, folder, or miniworld:blip2."""
    revision: str | None = None
    """Hub revision (branch, tag or commit) for all three; none = the default branch."""


@dataclass
class RayConfig:
    """How the job reaches Ray."""

    address: str | None = None
    """Ray address; none = $RAY_ADDRESS if set, else a private local cluster."""
    num_cpus: int | None = None
    """Logical CPUs of the local cluster; none = all cores (at least 4 logical, see cluster.py)."""
    object_store_mib: int = 256
    """Object store of the local cluster, MiB."""
