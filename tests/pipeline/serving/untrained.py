"""An SSR-Encoder on the tiny models whose weights are random: nothing is learned, all runs."""

from __future__ import annotations

from pathlib import Path


def write_model(root: Path, tiny_models: Path) -> Path:
    """root/model, for tiny_models' sd and clip; gives the root back."""
    import torch

    from pipeline import models
    from ssr_model import weights
    from ssr_model.config import SSRConfig
    from ssr_model.encoder import SSRAdapter

    base, clip = str(tiny_models / "sd"), str(tiny_models / "clip")
    unet, vision = models.load_unet(base), models.load_vision(clip)
    text = models.load_text_encoder(base)
    config = SSRConfig.from_models(vision.config, text.config, unet, scales=3)
    torch.manual_seed(0)
    adapter = SSRAdapter(config)
    adapter.init_from_unet(unet)
    weights.save_adapter(root / "model", adapter)
    return root
