"""What is measured on one picture, and how samples become a table.

The definitions, for a picture drawn for subject A of a reference that also shows B:
- A present, B absent: the judge finds A's class, and does not find B's.
- palette distance: of every pixel that the judge gives to A's class, the RGB distance (0-255) to
  the nearest of a subject's exact colours, averaged. *Nearer* = smaller to A's than to B's; a
  picture with too few pixels of A's class is not nearer, and has no distance.
- attention peak: the patch where the text query looks most lies on the subject whose mask has the
  most pixels in that patch, or on the ground where no mask has one.
- selected: A present, B absent and nearer, all three.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

LEAST_SHARE = 0.01
"""Pixels of A's class needed to speak of its colours, as a share of the picture."""

MEASURES = {
    "target_present": "A present",
    "other_absent": "B absent",
    "nearer": "nearer to A",
    "selected": "all three",
    "distance_target": "distance to A",
    "distance_other": "distance to B",
    "peak_target": "peak on A",
    "peak_other": "peak on B",
}
"""Keys of a score, with the titles of the tables' columns."""


class SubjectJudge(Protocol):
    """Finds classes in pictures, indexed in CLASSES' order; never used as a condition."""

    def segment(self, images: Any) -> Any:
        """(B, 3, H, W) in [0, 1] -> int64 (B, H, W): 0 = ground, i + 1 = class i."""
        ...

    def present(self, images: Any) -> Any:
        """(B, 3, H, W) in [0, 1] -> bool (B, classes)."""
        ...


def palette_distance(pixels: NDArray[Any], palette: NDArray[Any]) -> float:
    """Mean over pixels (n, 3) of the RGB distance to the nearest colour of palette (c, 3)."""
    gaps = np.asarray(pixels, np.float32)[:, None] - np.asarray(palette, np.float32)[None]
    return float(np.linalg.norm(gaps, axis=-1).min(axis=1).mean())


def colour_scores(
    picture: NDArray[np.uint8],
    region: NDArray[np.bool_],
    target: NDArray[Any],
    others: Sequence[NDArray[Any]],
) -> dict[str, Any]:
    """Palette scores of one picture (h, w, 3), the target's class at `region` (h, w)."""
    pixels = picture[region]
    if len(pixels) < LEAST_SHARE * region.size:
        return {"nearer": False, "distance_target": None, "distance_other": None}
    near, far = palette_distance(pixels, target), [palette_distance(pixels, o) for o in others]
    return {"nearer": near < min(far), "distance_target": near, "distance_other": min(far)}


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


def summarise(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means of the measures over samples, and their number; None where nothing was measured."""
    out: dict[str, Any] = {"samples": len(samples)}
    for key in MEASURES:
        values = [float(s[key]) for s in samples if s.get(key) is not None]
        out[key] = float(np.mean(values)) if values else None
    return out


def markdown_table(title: str, rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The conditions' summaries in Markdown; shares with two digits, distances with none."""
    head = [title, *MEASURES.values()]
    lines = [_line(head), _line(["---"] + ["---:"] * len(MEASURES))]
    for name, summary in rows.items():
        lines.append(_line([name] + [shown(key, summary.get(key)) for key in MEASURES]))
    return "\n".join(lines) + "\n"


def shown(measure: str, value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.0f}" if measure.startswith("distance") else f"{value:.2f}"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
