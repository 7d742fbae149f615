"""The mini world's judge as a segmenter, for metrics that look for subjects in what was drawn."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from pipeline import models
from pipeline.errors import UserError
from pipeline.miniworld import world
from pipeline.miniworld.judge import PRESENT_PIXELS, Judge

JUDGE = "miniworld:judge"
SIDE = 32
"""Side of the pictures that the judge was trained on, pixels."""


class JudgeSegmenter:
    """The judge as a `Segmenter`: a subject is where the class map names its class, and it is there
    where it has PRESENT_PIXELS.
    """

    def __init__(self, judge: Judge, name: str, sha256: str) -> None:
        """sha256: of its files; name: what results call it."""
        self.judge, self.name, self.sha256 = judge, name, sha256

    @classmethod
    def load(cls, name: str = JUDGE) -> Self:
        """The shipped one. Raises UserError for an unknown name."""
        return cls(Judge.load(models.resolve(name)), **models.identity(name))

    def describe(self) -> dict[str, Any]:
        """What shapes its masks, as JSON: for results and for fingerprints of settings."""
        return {
            "name": self.name,
            "kind": "judge",
            "sha256": self.sha256,
            "present_pixels": PRESENT_PIXELS,
        }

    def __call__(
        self, images: Sequence[Image.Image], names: Sequence[Sequence[str]]
    ) -> list[list[NDArray[np.bool_] | None]]:
        """For each image a mask, bool (32, 32), for each of its names; None = not there.

        Raises UserError for pictures of another size, and for classes of another world.
        """
        for image, own in zip(images, names, strict=True):
            _check(image, own)
        if not images:
            return []
        pixels = np.stack([np.asarray(image.convert("RGB")) for image in images])
        values = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255.0
        labels = self.judge.segment(values.to(next(self.judge.parameters()).device)).cpu().numpy()
        return [
            [_present(seen == 1 + world.CLASSES.index(name)) for name in own]
            for seen, own in zip(labels, names, strict=True)
        ]


def _present(inside: NDArray[np.bool_]) -> NDArray[np.bool_] | None:
    return inside if inside.sum() >= PRESENT_PIXELS else None


def _check(image: Image.Image, names: Sequence[str]) -> None:
    if image.size != (SIDE, SIDE):
        raise UserError(
            f"{JUDGE}: the judge knows pictures of {SIDE} x {SIDE}, and this one is "
            f"{image.width} x {image.height}; name a CLIPSeg as look.segmenter for such pictures"
        )
    check_classes(names)


def check_classes(names: Iterable[str]) -> None:
    """Refuse classes of another world."""
    strange = [name for name in names if name not in world.CLASSES]
    if strange:
        raise UserError(
            f"{JUDGE}: the judge does not know {strange[0]!r}, only the mini world's classes "
            f"({', '.join(world.CLASSES)}); name a CLIPSeg as look.segmenter for others"
        )
