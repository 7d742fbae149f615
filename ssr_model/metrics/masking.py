"""Subjects cut out of their pictures, and who finds them in a picture that was drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
from PIL import Image

from ssr_model.images import Mask, Picture, as_mask, as_rgb
from ssr_model.metrics.samples import Sample

MARGIN = 1 / 8
"""Of a subject's longer side, on every side of it: a DINOv2's image processor crops a sixteenth of
what it is given from each side, and would cut the subject."""
SMALLEST = 1 / 1024
"""Share of a drawn picture below which a region is no subject: 16 x 16 pixels of 512 x 512."""


class Segmenter(Protocol):
    """Finds subjects by their class in drawn pictures."""

    name: str

    def __call__(
        self, images: Sequence[Image.Image], names: Sequence[Sequence[str]]
    ) -> Sequence[Sequence[Mask | None]]:
        """For each image a mask (h, w) of its size for each of its names; None = not there.

        Several things of a class make one mask together.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """What shapes its masks, as JSON: for results and for fingerprints of settings."""
        ...


def locate(samples: Sequence[Sample], segmenter: Segmenter) -> list[Sample]:
    """The samples with a mask for every subject: those that have one keep it, the segmenter looks
    for the others. What it does not find has a mask that is zero everywhere.
    """
    asked = [[s.name for s in sample.subjects if s.mask is None] for sample in samples]
    places = [i for i, names in enumerate(asked) if names]
    images = [as_rgb(samples[i].image) for i in places]
    answers = segmenter(images, [asked[i] for i in places]) if places else []
    if [len(masks) for masks in answers] != [len(asked[i]) for i in places]:
        raise ValueError(f"{segmenter.name} must give a mask or None for each name of each image.")
    located = list(samples)
    for i, image, masks in zip(places, images, answers, strict=True):
        nothing = np.zeros((image.height, image.width), bool)
        found = iter([nothing if mask is None else mask for mask in masks])
        located[i] = replace(
            samples[i],
            subjects=[
                replace(subject, mask=next(found)) if subject.mask is None else subject
                for subject in samples[i].subjects
            ],
        )
    return located


def subject_view(picture: Picture, mask: Mask, blank: tuple[int, int, int]) -> Image.Image:
    """The subject alone: its pixels (mask >= 0.5) cut out by their box, centred on a square of the
    colour `blank`, whose side is the box's longer side and a MARGIN on both ends.

    So neither the ground, nor the subject's place and size in the picture, nor the shape of the
    picture counts. A mask that is nowhere 0.5 is a ValueError.
    """
    image = as_rgb(picture)
    inside = as_mask(mask, image.size).numpy() >= 0.5
    if not inside.any():
        raise ValueError("the mask is below 0.5 everywhere: it selects no subject.")
    rows, columns = (np.flatnonzero(inside.any(axis=axis)).tolist() for axis in (1, 0))
    left, top, right, bottom = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    side = max(right - left, bottom - top)
    side += 2 * math.ceil(MARGIN * side)
    place = (side - (right - left)) // 2, (side - (bottom - top)) // 2
    view = Image.new("RGB", (side, side), blank)
    cut = Image.fromarray(inside[top:bottom, left:right])
    view.paste(image.crop((left, top, right, bottom)), place, cut)
    return view


def is_found(picture: Picture, mask: Mask) -> bool:
    """Whether a mask of a drawn picture covers at least SMALLEST of it."""
    image = as_rgb(picture)
    inside = as_mask(mask, image.size, may_be_empty=True) >= 0.5
    return int(inside.sum()) >= SMALLEST * image.width * image.height
