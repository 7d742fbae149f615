"""An SSR-Encoder and a ControlNet that nobody trained: weights random and seeded, layouts real."""

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


def save_controlnet(folder: Path, parts: ModelsConfig) -> str:
    """One of the base model; its way out is random, where a new one's is zero. Returns its path."""
    import torch
    from diffusers import ControlNetModel

    torch.manual_seed(6)
    net = ControlNetModel.from_unet(
        models.load_unet(parts.base), conditioning_embedding_out_channels=(8, 8, 8)
    )
    with torch.no_grad():
        for block in [*net.controlnet_down_blocks, net.controlnet_mid_block]:
            block.weight.normal_(std=0.2)
        net.controlnet_cond_embedding.conv_out.weight.normal_(std=0.2)
    net.save_pretrained(folder)
    return str(folder)
