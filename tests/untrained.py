"""An SSR-Encoder that nobody trained: its weights random and seeded, its layout real."""

from __future__ import annotations

from pathlib import Path

from pipeline import models
from pipeline.config import ModelsConfig


def tiny_parts(tiny_models: Path) -> ModelsConfig:
    """The base and vision models of conftest's tiny_models."""
    return ModelsConfig(base=str(tiny_models / "sd"), vision=str(tiny_models / "clip"))


def save_encoder(folder: Path, parts: ModelsConfig, scales: int = 3) -> None:
    """One that fits the base and vision models of `parts`, as training leaves it."""
    import torch

    from ssr_model import weights
    from ssr_model.config import SSRConfig
    from ssr_model.encoder import SSRAdapter

    unet, vision = models.load_unet(parts.base), models.load_vision(parts.vision)
    text = models.load_text_encoder(parts.base)
    torch.manual_seed(0)
    adapter = SSRAdapter(SSRConfig.from_models(vision.config, text.config, unet, scales=scales))
    adapter.init_from_unet(unet)
    weights.save_adapter(folder, adapter)
