"""What is measured on one picture drawn for subject A of a reference that also shows B.

- A present, B absent: the judge finds A's class, and does not find B's.
- palette distance: of every pixel that the judge gives to A's class, the RGB distance (0-255) to
  the nearest of a subject's exact colours, averaged. *Nearer* = smaller to A's than to B's; a
  picture without A is not nearer, and has no distance.
- attention peak: the patch where the text query looks most lies on the subject whose mask has the
  most pixels in that patch, or on the ground where no mask has one.
- selected ("all three"): A present, B absent and nearer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.miniworld.judge import PRESENT_PIXELS, palette_distance

Palette = tuple[tuple[int, int, int], ...]


def colour_scores(
    picture: NDArray[np.uint8],
    region: NDArray[np.bool_],
    target: Palette,
    others: Sequence[Palette],
) -> dict[str, Any]:
    """Palette scores of one picture (h, w, 3), with the target's class at `region` (h, w)."""
    pixels = picture[region].astype(np.float32)
    if len(pixels) < PRESENT_PIXELS:
        return {"nearer": False, "distance_target": None, "distance_other": None}
    near = palette_distance(pixels, target)
    far = min(palette_distance(pixels, other) for other in others)
    return {"nearer": near < far, "distance_target": near, "distance_other": far}


def peak_on(attention: NDArray[Any], masks: Sequence[NDArray[np.bool_]]) -> int | None:
    """Index of the subject on which the attention map (h, w) has its peak; None = the ground."""
    row, column = np.unravel_index(int(np.argmax(attention)), attention.shape)
    height, width = masks[0].shape
    down, across = height / attention.shape[0], width / attention.shape[1]
    rows = slice(int(row * down), max(int((row + 1) * down), int(row * down) + 1))
    columns = slice(int(column * across), max(int((column + 1) * across), int(column * across) + 1))
    pixels = [int(mask[rows, columns].sum()) for mask in masks]
    best = int(np.argmax(pixels))
    return best if pixels[best] else None
