"""Which models drew a picture: their names and the hashes of their weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pipeline import models
from pipeline.generation.sampler import model_identity

if TYPE_CHECKING:
    from pipeline.config.shared import ModelsConfig


class NamedModels(Protocol):
    """Settings that name them."""

    models: ModelsConfig
    controlnet: str | None


def identities(cfg: NamedModels, folder: str) -> dict[str, Any]:
    """JSON-able, for a picture's metadata: `model`, the sha256 of the SSR-Encoder in `folder`, and
    {name, sha256} of `base`, `vision` and, where there is one, `controlnet`.

    A folder is named by its last part: pictures travel, and paths are nobody's business.
    """
    parts = cfg.models
    found: dict[str, Any] = {
        "model": model_identity(folder),
        "base": _of(parts.base, "unet", parts.revision),
        "vision": _of(parts.vision, "", parts.revision),
    }
    if cfg.controlnet is not None:
        found["controlnet"] = _of(cfg.controlnet, "", None)
    return found


def _of(name: str, subfolder: str, revision: str | None) -> dict[str, str]:
    folder = Path(name).expanduser()
    named = {"name": folder.resolve().name} if folder.is_dir() else {}
    return {**models.identity(name, subfolder, revision), **named}
