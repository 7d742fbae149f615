"""Whether embeddings tell two subjects of one class apart: held-out triplets, and their accuracy.

Each has a subject, the same one elsewhere, and another identity of its class. Both of these stand
on one ground, which is not the first's, each at its own place and in its own size: only identity
tells which of them is the first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image

from pipeline.miniworld import world
from pipeline.miniworld.foundation.corpus import GROUND_NAMES
from ssr_model.metrics import subject_view

Embed = Callable[[Sequence[Image.Image]], torch.Tensor]
"""Pictures -> vectors (n, width) of unit length."""


@dataclass(frozen=True)
class Triplet:
    """Scenes of one subject each."""

    first: world.Scene
    same: world.Scene
    other: world.Scene


def triplets(count: int) -> list[Triplet]:
    """`count` of them, made of held-out scenes; a longer list begins with a shorter one."""
    return [_triplet(*(world.scene(3 * i + k, "val", 1) for k in range(3))) for i in range(count)]


def near_misses(known: Sequence[Triplet]) -> list[Triplet]:
    """The same, but for `other`: it has the first's colours and proportions, and differs in texture
    alone.
    """
    found = []
    for triplet in known:
        identity = triplet.first.subjects[0].identity
        texture = next(t for t in world.TEXTURES if t != identity.texture)
        other = replace(triplet.other.subjects[0], identity=replace(identity, texture=texture))
        scene = replace(triplet.other, subjects=(_inside(other),))
        found.append(replace(triplet, other=scene))
    return found


def accuracy(embed: Embed, known: Sequence[Triplet], blank: tuple[int, int, int] | None) -> float:
    """Share of triplets in which `same` is nearer to `first` than `other` is, by cosine.

    blank: cut the subjects out as DINO-M does, on this colour; None = whole pictures. Chance is
    0.5: a tie counts for half.
    """
    scenes = [scene for t in known for scene in (t.first, t.same, t.other)]
    vectors = embed([_picture(scene, blank) for scene in scenes])
    first, same, other = vectors.view(len(known), 3, -1).unbind(dim=1)
    ahead = (first * (same - other)).sum(dim=1)
    return float(((ahead > 0).float() + 0.5 * (ahead == 0)).mean())


def _triplet(first: world.Scene, place: world.Scene, another: world.Scene) -> Triplet:
    subject, other = first.subjects[0], another.subjects[0]
    if _looks(other.identity) == _looks(subject.identity):
        texture = next(t for t in world.TEXTURES if t != other.identity.texture)
        other = replace(other, identity=replace(other.identity, texture=texture))
    ground = place.ground
    if ground == first.ground:
        ground = GROUND_NAMES[(GROUND_NAMES.index(ground) + 1) % len(GROUND_NAMES)]
    moved = replace(place.subjects[0], cls=subject.cls, identity=subject.identity)
    return Triplet(
        first,
        replace(place, subjects=(_inside(moved),), ground=ground),
        replace(another, subjects=(replace(other, cls=subject.cls),), ground=ground),
    )


def _looks(identity: world.Identity) -> tuple[str, str, str]:
    return identity.main, identity.second, identity.texture


def _inside(spec: world.SubjectSpec) -> world.SubjectSpec:
    """At the place of a subject of other proportions, without leaving the picture."""
    hx, hy = spec.half_extent
    cx, cy = (float(np.clip(c, h, 1 - h)) for c, h in ((spec.cx, hx), (spec.cy, hy)))
    return replace(spec, cx=cx, cy=cy)


def _picture(scene: world.Scene, blank: tuple[int, int, int] | None) -> Image.Image:
    picture = Image.fromarray(world.render(scene))
    return picture if blank is None else subject_view(picture, world.masks(scene)[0], blank)
