"""Embeddings of one call: what several metrics or samples share is looked at once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import torch
from PIL import Image
from torch import Tensor

from ssr_model.images import Picture, as_rgb
from ssr_model.metrics.backbones import Backbone, ClipBackbone

T = TypeVar("T")


class Embeddings:
    """Every distinct picture (by its pixels) and text is embedded once by each backbone, as long as
    this object lives.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[int, Hashable], Tensor] = {}
        self._backbones: list[Backbone] = []  # kept alive: they are told apart by their ids

    def images(self, backbone: Backbone, pictures: Sequence[Picture]) -> Tensor:
        """As `Backbone.images`: (B, width)."""
        seen = [as_rgb(picture) for picture in pictures]
        return self._look(backbone, [_content(image) for image in seen], seen, backbone.images)

    def texts(self, clip: ClipBackbone, texts: Sequence[str]) -> Tensor:
        """As `ClipBackbone.texts`: (B, width)."""
        return self._look(clip, list(texts), list(texts), clip.texts)

    def _look(
        self,
        backbone: Backbone,
        keys: Sequence[Hashable],
        items: Sequence[T],
        embed: Callable[[Sequence[T]], Tensor],
    ) -> Tensor:
        self._backbones.append(backbone)
        names = [(id(backbone), key) for key in keys]
        new = {n: item for n, item in zip(names, items, strict=True) if n not in self._known}
        self._known |= zip(new, embed(list(new.values())), strict=True)
        rows = [self._known[name] for name in names]
        return torch.stack(rows) if rows else torch.zeros(0, backbone.width)


def _content(image: Image.Image) -> tuple[tuple[int, int], bytes]:
    return image.size, hashlib.blake2b(image.tobytes(), digest_size=16).digest()
