"""A segmenter for real pictures: CLIPSeg (arXiv 2112.10003), which finds what a text names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ssr_model.metrics.backbones import FrozenModel, check_square
from ssr_model.text import check_tokenizer, token_ids

TEXT = "a {name}"
"""What it is asked for: the form of its authors' examples, and of a bench's phrases."""
THRESHOLD = 0.5
"""Probability from which a pixel is the subject: more likely it than not, as it was trained (by
cross-entropy against 0 and 1). Tuned to nothing: a lower one finds subjects where there are none,
which DINO-M would then compare."""


class ClipSegSegmenter(FrozenModel):
    """A CLIPSeg as a `Segmenter`: a pixel is a subject where its probability for the text, resized
    to the picture, reaches THRESHOLD. Each class is looked for alone, so masks may overlap.
    """

    kind = "clipseg"

    def __init__(
        self,
        model: Any,
        image_processor: Any,
        tokenizer: Any,
        name: str,
        sha256: str,
        batch_size: int = 32,
    ) -> None:
        super().__init__(model, image_processor, name, sha256, batch_size)
        # its positions are interpolated: the published one was trained at 224 and looks at 352
        check_square(image_processor, model.config.vision_config, any_size=True)
        check_tokenizer(tokenizer, model.config.text_config)
        self.tokenizer = tokenizer

    def describe(self) -> dict[str, Any]:
        """What shapes its masks, as JSON: for results and for fingerprints of settings."""
        return {**super().describe(), "text": TEXT, "threshold": THRESHOLD}

    def __call__(
        self, images: Sequence[Image.Image], names: Sequence[Sequence[str]]
    ) -> list[list[NDArray[np.bool_] | None]]:
        """For each image a mask, bool (h, w), for each of its names; None = no pixel is one."""
        pairs = [(image, name) for image, own in zip(images, names, strict=True) for name in own]
        maps = self._probabilities([image for image, _ in pairs], [name for _, name in pairs])
        found = iter([_mask(seen, image) for seen, (image, _) in zip(maps, pairs, strict=True)])
        return [[next(found) for _ in own] for own in names]

    @torch.no_grad()
    def _probabilities(self, images: Sequence[Image.Image], names: Sequence[str]) -> list[Tensor]:
        """For each image (S, S) float32 in [0, 1], on the CPU: how likely each place is its name's.

        Each is its own, but for rounding: batches decide nothing.
        """
        maps: list[Tensor] = []
        for pixels in self._batches(images):
            texts = [TEXT.format(name=n) for n in names[len(maps) : len(maps) + len(pixels)]]
            ids = token_ids(self.tokenizer, texts).to(self.model.device)
            logits = self.model(input_ids=ids, pixel_values=pixels).logits.float().cpu()
            if logits.isnan().any():
                raise ValueError(
                    f"{self.name} gives NaN: its weights are damaged, or overflow in this dtype; "
                    "try float32."
                )
            maps += logits.sigmoid().unbind()
        return maps


def _mask(seen: Tensor, image: Image.Image) -> NDArray[np.bool_] | None:
    size = (image.height, image.width)
    full = F.interpolate(seen[None, None], size=size, mode="bilinear", align_corners=False)[0, 0]
    inside = full.numpy() >= THRESHOLD
    return inside if inside.any() else None
