"""Multi-scale features of a CLIP vision tower: the z_k of the paper."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def clip_crop(image_processor: Any, image: Image.Image) -> np.ndarray:
    """What a CLIP sees of an RGB image: uint8 (S, S, 3), resized and cropped by its own image
    processor, not yet rescaled and normalised.
    """
    seen = image_processor(
        images=[image], do_rescale=False, do_normalize=False, return_tensors="np"
    )["pixel_values"][0]
    return np.ascontiguousarray(np.moveaxis(seen, 0, -1))


def clip_input(image_processor: Any, pixels: Tensor) -> Tensor:
    """The rest of the image processor's work, on the pixels' device: uint8 (B, S, S, 3) as
    `clip_crop` gives them -> float32 (B, 3, S, S), a vision model's `pixel_values`.
    """
    values = pixels.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    if image_processor.do_rescale:
        values = values.mul_(image_processor.rescale_factor)
    if image_processor.do_normalize:
        mean, deviation = (
            _by_channel(tuple(figures), pixels.device)
            for figures in (image_processor.image_mean, image_processor.image_std)
        )
        values = values.sub_(mean).div_(deviation)
    return values


@functools.lru_cache(maxsize=64)  # sent to a device once: the host waits for it
def _by_channel(figures: tuple[float, ...], device: torch.device) -> Tensor:
    """(1, channels, 1, 1)."""
    return torch.tensor(figures, device=device).view(1, -1, 1, 1)


def vision_features(
    vision_model: Any, pixel_values: Tensor, depths: Sequence[int]
) -> dict[int, Tensor]:
    """Hidden states of the vision tower at several depths, without the post-LayerNorm.

    vision_model: `CLIPVisionModel`, or the `vision_model` of a `CLIPModel`.
    pixel_values: (B, channels, side, side) as the model's image processor makes them.
    depths: indices into `hidden_states`; 0 is the patch embedding, the number of layers the last.
    Returns {depth: (B, N_i, vision width)}, CLS token first, in the model's dtype. No gradient
    flows to the tower.
    """
    config = vision_model.config
    config = getattr(config, "vision_config", config)
    expected = (config.num_channels, config.image_size, config.image_size)
    if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != expected:
        raise ValueError(
            f"pixel_values must be (batch, {', '.join(map(str, expected))}) for this vision model, "
            f"not {tuple(pixel_values.shape)}."
        )
    beyond = [depth for depth in depths if not 0 <= depth <= config.num_hidden_layers]
    if beyond:
        raise ValueError(
            f"depth {beyond[0]} is not among the vision model's {config.num_hidden_layers} layers."
        )
    with torch.no_grad():
        states = vision_model(pixel_values, output_hidden_states=True).hidden_states
    return {depth: states[depth] for depth in depths}


def patch_grid(vision_config: Any) -> tuple[int, int]:
    """Rows and columns of patches: the vision tower sees 1 + rows * columns tokens, CLS first."""
    side = vision_config.image_size // vision_config.patch_size
    return side, side
