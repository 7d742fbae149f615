"""What can be measured exactly where everything is known: pictures of the mini bench.

A is the subject that was asked for, B the reference's other one.

- A present, B absent: the judge finds A's class, and does not find B's.
- palette distance: of every pixel that the judge gives to A's class, the RGB distance (0-255) to
  the nearest of a subject's exact colours, averaged. *Nearer* = smaller to A's than to B's; a
  picture without A is not nearer, and has no distance.
- all three: A present, B absent and nearer.
- texture: the share of A's pixels that have its second colour is nearer to what its own texture
  (plain or striped) gives than to what the other would; a picture without A has missed it.
- attention peak: the patch where the text query looks most lies on the subject whose mask has the
  most pixels in that patch, or on the ground where no mask has one ("pointing accuracy").
- attention IoU: of the patches that A covers by half or more, against as many patches, those where
  the query looks most: intersection over union.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from pipeline import models
from pipeline.errors import UserError
from pipeline.evaluation.benches import Bench, BoolMask, MiniSubject, Request, Selection
from pipeline.evaluation.judging import JUDGE, SIDE
from pipeline.evaluation.results import Measure
from pipeline.miniworld import world
from pipeline.miniworld.judge import PRESENT_PIXELS, Judge, palette_distance

MEASURES = (
    Measure("target_present", "A present", "higher", 2),
    Measure("other_absent", "B absent", "higher", 2),
    Measure("nearer", "nearer to A", "higher", 2),
    Measure("selected", "all three", "higher", 2),
    Measure("distance_target", "distance to A", "lower", 0),
    Measure("distance_other", "distance to B", "higher", 0),
    Measure("texture", "texture", "higher", 2),
    Measure("peak_target", "peak on A", "higher", 2),
    Measure("peak_other", "peak on B", "lower", 2),
    Measure("attention_iou", "attention IoU", "higher", 2),
)

Palette = tuple[tuple[int, int, int], ...]


class ExactScorer:
    """The exact measures of pictures of the mini bench."""

    measures = MEASURES

    def __init__(self) -> None:
        self.settings: dict[str, Any] = {"judge": models.identity(JUDGE)}
        self.judge: Judge | None = None

    def check(self, bench: Bench) -> None:
        """Nothing can be wrong: bench and judge are of one world."""

    def open(self) -> None:
        self.judge = self.judge or Judge.load(models.resolve(JUDGE))

    def __call__(
        self,
        requests: Sequence[Request],
        pictures: Sequence[Image.Image],
        attentions: Sequence[NDArray[np.float32] | None],
    ) -> list[dict[str, float | None]]:
        """For each picture, of `SIDE` pixels, its measures; None = not defined for it."""
        assert self.judge is not None
        for request, picture in zip(requests, pictures, strict=True):
            if picture.size != (SIDE, SIDE):
                raise UserError(
                    f"the picture of {request.key} is {picture.width}x{picture.height}, the mini "
                    f"bench's judge knows {SIDE}x{SIDE}; draw with a base model of "
                    "that size"
                )
        pixels = np.stack([np.asarray(picture.convert("RGB")) for picture in pictures])
        batch = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
        regions = np.asarray(self.judge.segment(batch).cpu())
        present = np.asarray(self.judge.present(batch).cpu())
        return [
            _scores(request.selections[0], *seen)
            for request, *seen in zip(requests, pixels, regions, present, attentions, strict=True)
        ]


def _scores(
    chosen: Selection,
    pixels: NDArray[np.uint8],
    region: NDArray[np.int64],
    present: BoolMask,
    attention: NDArray[np.float32] | None,
) -> dict[str, float | None]:
    subject, others = chosen.subject, chosen.others
    assert isinstance(subject, MiniSubject)
    target = world.CLASSES.index(subject.name)
    there = bool(present[target])
    absent = not present[[world.CLASSES.index(other.name) for other in others]].any()
    palettes = [other.palette for other in others if isinstance(other, MiniSubject)]
    mine = region == target + 1
    colours = colour_scores(pixels, mine, subject.palette, palettes)
    texture = there and texture_matches(pixels[mine], subject.spec)
    scores: dict[str, float | None] = {
        "target_present": float(there),
        "other_absent": float(absent),
        "selected": float(there and absent and bool(colours["nearer"])),
        "texture": float(texture),
        **colours,
    }
    if attention is not None:
        masks = [s.mask for s in chosen.reference.subjects if s.mask is not None]
        peak = peak_on(attention, masks)
        scores["peak_target"] = float(peak == chosen.target)
        scores["peak_other"] = float(peak is not None and peak != chosen.target)
        scores["attention_iou"] = attention_iou(attention, masks[chosen.target])
    return scores


def colour_scores(
    picture: NDArray[np.uint8], region: BoolMask, target: Palette, others: Sequence[Palette]
) -> dict[str, float | None]:
    """Palette scores of one picture (h, w, 3), with the target's class at `region` (h, w)."""
    pixels = picture[region].astype(np.float32)
    if len(pixels) < PRESENT_PIXELS:
        return {"nearer": 0.0, "distance_target": None, "distance_other": None}
    near = palette_distance(pixels, target)
    far = min(palette_distance(pixels, other) for other in others)
    return {"nearer": float(near < far), "distance_target": near, "distance_other": far}


def texture_matches(pixels: NDArray[np.uint8], spec: world.SubjectSpec) -> bool:
    """Whether the pixels of a drawn subject, (n, 3), are mixed as its own texture mixes them."""
    seen = _second_share(pixels, spec)
    share = {}
    for texture in world.TEXTURES:
        as_if = replace(spec, identity=replace(spec.identity, texture=texture))
        alone = world.Scene((as_if,), "snow", (0.0, 0.0))
        drawn, (mask,) = world.render(alone), world.masks(alone)
        share[texture] = _second_share(drawn[mask], spec)
    return min(share, key=lambda texture: abs(share[texture] - seen)) == spec.identity.texture


def _second_share(pixels: NDArray[np.uint8], spec: world.SubjectSpec) -> float:
    """Share of the pixels that are nearer to the second colour than to the main one."""
    gaps = pixels[:, None].astype(np.float32) - np.array(spec.palette, np.float32)[None]
    return float(((gaps**2).sum(-1).argmin(axis=1) == 1).mean())


def peak_on(attention: NDArray[Any], masks: Sequence[BoolMask]) -> int | None:
    """Index of the subject on which the attention map (h, w) has its peak; None = the ground."""
    row, column = np.unravel_index(int(np.argmax(attention)), attention.shape)
    height, width = masks[0].shape
    down, across = height / attention.shape[0], width / attention.shape[1]
    rows = slice(int(row * down), max(int((row + 1) * down), int(row * down) + 1))
    columns = slice(int(column * across), max(int((column + 1) * across), int(column * across) + 1))
    pixels = [int(mask[rows, columns].sum()) for mask in masks]
    best = int(np.argmax(pixels))
    return best if pixels[best] else None


def attention_iou(attention: NDArray[Any], mask: BoolMask) -> float:
    """Intersection over union of the patches that the mask (H, W) covers by half or more (at least
    the one that it covers most) and as many patches of the map (h, w), the highest first.
    """
    covered = torch.nn.functional.adaptive_avg_pool2d(
        torch.from_numpy(mask.astype(np.float32))[None], attention.shape
    )[0].numpy()
    truth = covered >= min(0.5, float(covered.max()))
    highest = np.argsort(-attention, axis=None, kind="stable")[: int(truth.sum())]
    looked = np.zeros(attention.size, bool)
    looked[highest] = True
    both = looked.reshape(truth.shape) & truth
    return float(both.sum() / (looked.reshape(truth.shape) | truth).sum())
