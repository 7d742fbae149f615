"""Drawings that are the same everywhere, with the exact mask of what is on them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Box = tuple[int, int, int, int]


def drawing(
    ground: str,
    figure: str,
    box: Box = (12, 8, 27, 29),
    size: tuple[int, int] = (48, 40),
    spots: str = "black",
) -> tuple[Image.Image, NDArray[np.bool_]]:
    """A spotted rectangle on a striped ground, and its mask; `box` holds its first and last pixel,
    size is (width, height).
    """
    image = Image.new("RGB", size, ground)
    pen = ImageDraw.Draw(image)
    for x in range(0, size[0], 6):
        pen.line([(x, 0), (x, size[1])], fill="white")
    left, top, right, bottom = box
    pen.rectangle(box, fill=figure)
    for step in range(2, min(right - left, bottom - top) - 2, 5):
        pen.rectangle([left + step, top + step, left + step + 2, top + step + 2], fill=spots)
    mask = np.zeros((size[1], size[0]), bool)
    mask[top : bottom + 1, left : right + 1] = True
    return image, mask
