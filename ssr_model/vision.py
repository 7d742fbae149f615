"""Multi-scale features of a CLIP vision tower: the z_k of the paper."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


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
