"""The hidden states that the encoder looks at: decoded from shards, or computed from pixels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.shards import CLIP_PIXELS, decode_states
from ssr_model.vision import clip_input, vision_features


class OnlineVision:
    """CLIP's frozen vision tower, for shards that hold its input (codec pixels).

    Args:
        tower: CLIPVisionModel, float32.
        image_processor: the CLIP's; it knows how pixels are normalised.
        half: compute in float16 under autocast, which is what the codec float16 stores; bfloat16
            has fewer digits than the states have.
    """

    def __init__(self, tower: nn.Module, image_processor: Any, half: bool = False) -> None:
        self.tower = tower.requires_grad_(False).eval()
        self.image_processor, self.half = image_processor, half

    def to(self, device: torch.device) -> OnlineVision:
        self.tower.to(device)
        return self

    def __call__(self, pixels: Tensor, depths: Sequence[int]) -> dict[int, Tensor]:
        """uint8 (B, S, S, 3) -> {depth: (B, N_i, d)}, without gradients."""
        with torch.no_grad(), torch.autocast(pixels.device.type, torch.float16, enabled=self.half):
            return vision_features(self.tower, clip_input(self.image_processor, pixels), depths)


def hidden_states(
    stored: Mapping[str, Tensor], depths: Sequence[int], vision: OnlineVision | None
) -> dict[int, Tensor]:
    """{depth: (B, N_i, d)} of a shard's vision columns on their device, whatever its codec.

    `vision` is needed for pixels alone.
    """
    if CLIP_PIXELS not in stored:
        return decode_states(stored, depths)
    if vision is None:
        raise ValueError("the shards hold pixels; the vision tower is needed to train from them")
    return vision(stored[CLIP_PIXELS], depths)
