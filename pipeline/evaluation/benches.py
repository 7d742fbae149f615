"""Benches: references in which every subject is known, with the answers.

The mini bench is made of the mini world's `bench` scenes, which nothing is ever trained on: two
subjects on a ground, with their exact masks and colours. Prompts put a subject on another ground
and never speak of its appearance, so that what it looks like can only come from the reference.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.errors import UserError
from pipeline.miniworld import world

SEEDS_PER_BENCH = 100_000
"""Scene seeds that one bench seed owns: benches of different seeds share no scene."""


@dataclass(frozen=True)
class BenchSubject:
    """A subject of a reference, and what is known of it."""

    name: str
    """Its class: one of the world's CLASSES."""
    phrase: str
    """What prompts call it: "a cup"."""
    mask: NDArray[np.bool_]
    """Where it is in the reference, (h, w)."""
    palette: tuple[tuple[int, int, int], ...]
    """Its exact colours, RGB 0-255."""

    @property
    def query(self) -> str:
        """The text query that means it: its name alone. Before its noun, an article's state is the
        same for every query, so it dilutes the map of where a query looks.
        """
        return self.name


@dataclass(frozen=True)
class Reference:
    """A picture to select from, and where the prompts put what was selected."""

    key: str
    image: Image.Image
    subjects: tuple[BenchSubject, ...]
    ground: str
    """Ground of the prompts, never the reference's own."""

    def prompt(self, target: int) -> str:
        return f"{self.subjects[target].phrase} on {self.ground}"


@dataclass(frozen=True)
class Selection:
    """One subject of one reference."""

    reference: Reference
    target: int

    @property
    def subject(self) -> BenchSubject:
        return self.reference.subjects[self.target]

    @property
    def others(self) -> list[BenchSubject]:
        return [s for i, s in enumerate(self.reference.subjects) if i != self.target]


@dataclass(frozen=True)
class Request:
    """One picture to draw: what to take from where, into which sentence."""

    selections: tuple[Selection, ...]
    prompt: str
    seed: int
    """Seed of the initial noise; the same seed gives every method the same noise."""


def mini_bench(count: int, side: int, seed: int = 0, subjects: int = 2) -> list[Reference]:
    """`count` held-out references of `subjects` subjects each, pictures of `side` pixels.

    A longer bench of the same seed begins with the shorter one.
    """
    if not 1 <= count <= SEEDS_PER_BENCH:
        raise UserError(f"references: {count} is not within 1 to {SEEDS_PER_BENCH}; choose another")
    return [_reference(seed * SEEDS_PER_BENCH + i, side, subjects) for i in range(count)]


def _reference(scene_seed: int, side: int, subjects: int) -> Reference:
    scene = world.scene(scene_seed, "bench", subjects)
    size = (side, side)
    known = tuple(
        BenchSubject(
            name=spec.cls,
            phrase=world.phrase(spec, attributes=False),
            mask=mask,
            palette=spec.palette,
        )
        for spec, mask in zip(scene.subjects, world.masks(scene, size), strict=True)
    )
    elsewhere = [ground for ground in world.GROUNDS if ground != scene.ground]
    return Reference(
        key=f"bench-{scene_seed:06d}",
        image=Image.fromarray(world.render(scene, size)),
        subjects=known,
        ground=elsewhere[scene_seed % len(elsewhere)],
    )


def request(reference: Reference, target: int, seed: int) -> Request:
    """The bench's own question: this subject, alone, on the reference's other ground."""
    return Request((Selection(reference, target),), reference.prompt(target), seed)
