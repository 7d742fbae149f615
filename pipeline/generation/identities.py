"""What pictures are drawn with, by name and hash: it goes into each of them."""

from __future__ import annotations

from typing import Any, Protocol

from pipeline import models
from pipeline.config.shared import ModelsConfig
from pipeline.generation.sampler import model_identity


class WithModels(Protocol):
    """Settings that name the base model and the vision tower."""

    models: ModelsConfig


def identities(cfg: WithModels, folder: str) -> dict[str, Any]:
    """Of the SSR-Encoder in `folder` (or of that hub id) its hash, of the models under it names and
    hashes.
    """
    return {
        "model": model_identity(folder),
        "base": models.identity(cfg.models.base, "unet", cfg.models.revision),
        "vision": models.identity(cfg.models.vision, "", cfg.models.revision),
    }
