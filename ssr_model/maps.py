"""Where the aligner looks: attention maps as tensors and as pictures (Fig. 5 of the paper)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ssr_model.images import Picture, as_rgb

_HEAT = np.array([(12, 12, 40), (120, 20, 110), (230, 80, 40), (255, 200, 60), (255, 255, 225)])


@dataclass(eq=False)
class AttentionMap:
    """Where the words of one query look in one image."""

    query: str
    """The text that was asked for."""
    words: list[str]
    """Its tokens; start, end and padding are left out."""
    per_word: Tensor
    """(W, rows, columns) float32 on the CPU: attention on the patches, averaged over heads. What is
    missing to one went to the CLS token."""
    seen: Image.Image
    """The part of the image that CLIP saw, and that the patches cover."""

    @property
    def mean(self) -> Tensor:
        """The query's map, (rows, columns): the mean over its words."""
        return self.per_word.mean(dim=0)

    def overlay(self, word: int | None = None) -> Image.Image:
        """The map over what CLIP saw of the image; `word` picks one of `words`, None = all."""
        return overlay(self.seen, self.mean if word is None else self.per_word[word])


def overlay(image: Picture, attention: Tensor | NDArray[np.floating]) -> Image.Image:
    """The picture in dim grey with an attention map, which covers it, glowing over it.

    attention: (rows, columns), any scale: zero stays dim grey and the map's own maximum is the
    brightest. A map finer than the picture enlarges the picture; a coarser one is shown patch by
    patch, as the encoder sees.
    """
    heat = torch.as_tensor(attention).detach().float().cpu().numpy()
    if heat.ndim != 2 or heat.size == 0:
        raise ValueError(f"an attention map has two dimensions, this one {heat.shape}.")
    picture = as_rgb(image)
    heat = np.clip(np.nan_to_num(heat), 0.0, None)
    heat = heat / max(float(heat.max()), 1e-12)
    size = (max(picture.width, heat.shape[1]), max(picture.height, heat.shape[0]))
    grey = picture.convert("L").resize(size, Image.Resampling.NEAREST)
    glow = Image.fromarray(heat).resize(size, Image.Resampling.NEAREST)
    weight = np.asarray(glow, np.float32)[..., None]
    stops = np.linspace(0.0, 1.0, len(_HEAT))
    colour = np.stack([np.interp(weight[..., 0], stops, _HEAT[:, c]) for c in range(3)], axis=-1)
    base = np.asarray(grey, np.float32)[..., None] * 0.45 + 10.0
    mixed = base * (1.0 - 0.8 * weight) + colour * 0.8 * weight
    return Image.fromarray(np.clip(mixed, 0, 255).astype(np.uint8))
