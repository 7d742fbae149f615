"""An SSR-Encoder with random weights on the tiny models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ssr_model import SSRAdapter, SSRConfig, SSREncoder
from ssr_model.frozen import load_text, load_vision

# Every part that there is, whatever the variant; tests of the variants choose themselves.
PARTS = {"value_projection": "factored", "token_norm": True}


@pytest.fixture(autouse=True)
def seeded() -> None:
    """What a test draws is the same, whichever ran before it."""
    torch.manual_seed(0)


@dataclass
class Kit:
    """One tiny pipeline, one SSR-Encoder for it, and a picture of random pixels."""

    folder: Path
    pipe: Any
    ssr: SSREncoder
    image: np.ndarray
    mask: np.ndarray

    def latents(self, prompt: str | list[str] = "a red fish", seed: int = 0, **kwargs: Any) -> Any:
        """Latents of a short text-to-image run; the noise depends on the seed alone."""
        return self.pipe(
            prompt,
            num_inference_steps=3,
            output_type="latent",
            generator=torch.Generator().manual_seed(seed),
            **kwargs,
        ).images


def tiny_adapter(config: SSRConfig, unet: Any = None, seed: int = 0) -> SSRAdapter:
    """An adapter with strong random weights, so that a missing subject shows."""
    torch.manual_seed(seed)
    adapter = SSRAdapter(config)
    if unet is not None:
        adapter.init_from_unet(unet)
    with torch.no_grad():
        for parameter in adapter.encoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return adapter


def make_ssr(
    tiny_models: Path,
    unet: Any,
    variant: str = "paper",
    base: Path | None = None,
    **fields: Any,
) -> SSREncoder:
    base = base or tiny_models / "sd"
    vision, processor = load_vision(str(tiny_models / "clip"))
    queries = load_text(str(base))
    config = SSRConfig.from_models(
        vision.config,
        [encoder.config for encoder in queries.encoders],
        unet,
        variant=variant,  # type: ignore[arg-type]
        **{"scales": 3, "heads": 4, "head_dim": 8, **PARTS, **fields},
    )
    metadata = {"base_model": str(base), "vision_model": str(tiny_models / "clip")}
    adapter = tiny_adapter(config, unet)
    return SSREncoder(adapter, vision, processor, queries, metadata)


@pytest.fixture
def build_ssr(tiny_models: Path) -> Callable[..., SSREncoder]:
    """`build_ssr(unet, variant, **config fields)`: a random SSR-Encoder for that U-Net."""
    return partial(make_ssr, tiny_models)


@pytest.fixture
def kit(tiny_models: Path) -> Kit:
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(tiny_models / "sd")
    pipe.set_progress_bar_config(disable=True)
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    mask = np.zeros((32, 32), bool)
    mask[4:20, 8:20] = True
    return Kit(tiny_models, pipe, make_ssr(tiny_models, pipe.unet), image, mask)
