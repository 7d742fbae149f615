"""VAE and CLIP inside a training step: what curation runs once, an online loop runs every time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pipeline.shards import clip_column
from pipeline.training.inputs import Inputs
from pipeline.training.vision import OnlineVision


class Encoders:
    """The frozen encoders, on one device.

    Args:
        vae, vision: AutoencoderKL and CLIPVisionModel, float32.
        image_processor: CLIP's.
        half: compute under autocast: the VAE in bfloat16, CLIP in float16.
    """

    def __init__(self, vae: Any, vision: Any, image_processor: Any, half: bool = False) -> None:
        self.vae, self.half = vae.requires_grad_(False).eval(), half
        self.image_processor = image_processor
        self.vision = OnlineVision(vision, image_processor, half)

    @torch.no_grad()
    def __call__(
        self, inputs: Inputs, image: Tensor, clip: Tensor, depths: Sequence[int]
    ) -> Inputs:
        """`inputs` with the features of pictures that are on the device.

        image: (B, 3, s, s) in [-1, 1] for the VAE; clip: uint8 (B, S, S, 3).
        """
        with torch.autocast(image.device.type, torch.bfloat16, enabled=self.half):
            posterior = self.vae.encode(image).latent_dist
        states = self.vision(clip, depths)
        return replace(
            inputs,
            latent_mean=posterior.mean,
            latent_logvar=posterior.logvar,
            features={clip_column(depth): value for depth, value in states.items()},
        )
