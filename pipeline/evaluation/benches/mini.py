"""The mini bench: held-out scenes of the mini world, in which everything is known exactly.

It is made of the mini world's `bench` scenes, which nothing is ever trained on: two subjects on a
ground, with their exact masks and identities. Every subject is asked for in turn, on another
ground, by a prompt that never speaks of its appearance: that can only come from the reference.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from pipeline.errors import UserError
from pipeline.evaluation.benches.bench import (
    BenchSubject,
    BoolMask,
    Outline,
    Reference,
    Request,
    Selection,
)
from pipeline.miniworld import world

SEEDS_PER_BENCH = 100_000
"""Scene seeds that one bench seed owns: benches of different seeds share no scene."""


@dataclass(frozen=True, eq=False)
class MiniSubject(BenchSubject):
    """A subject of the mini world."""

    spec: world.SubjectSpec
    """Its class, exact identity and place."""

    @property
    def palette(self) -> tuple[tuple[int, int, int], ...]:
        """Its exact colours, RGB 0-255."""
        return self.spec.palette


@dataclass(frozen=True, eq=False)
class MiniReference(Reference):
    """A scene to select from, and where the prompts put what was selected."""

    subjects: tuple[MiniSubject, ...]
    ground: str
    """Ground of the prompts, never the scene's own."""

    def prompt(self, target: int) -> str:
        return f"{self.subjects[target].phrase} on {self.ground}"


def mini_bench(count: int, side: int, seed: int = 0, subjects: int = 2) -> list[MiniReference]:
    """`count` held-out references of `subjects` subjects each, pictures of `side` pixels.

    A longer bench of the same seed begins with the shorter one.
    """
    if not 1 <= count <= SEEDS_PER_BENCH:
        raise UserError(f"references: {count} is not within 1 to {SEEDS_PER_BENCH}; choose another")
    return [_reference(seed * SEEDS_PER_BENCH + i, side, subjects) for i in range(count)]


def _reference(scene_seed: int, side: int, subjects: int) -> MiniReference:
    scene = world.scene(scene_seed, "bench", subjects)
    size = (side, side)
    known = tuple(
        MiniSubject(
            name=spec.cls,
            phrase=world.phrase(spec, attributes=False),
            masks=(mask,),
            spec=spec,
        )
        for spec, mask in zip(scene.subjects, world.masks(scene, size), strict=True)
    )
    elsewhere = [ground for ground in world.GROUNDS if ground != scene.ground]
    return MiniReference(
        key=f"bench-{scene_seed:06d}",
        images=(Image.fromarray(world.render(scene, size)),),
        subjects=known,
        ground=elsewhere[scene_seed % len(elsewhere)],
    )


def request(reference: MiniReference, target: int, seed: int) -> Request:
    """The bench's own question: this subject, alone, on the reference's other ground."""
    return Request(
        key=f"{reference.key}-{'abc'[target]}",
        selections=(Selection(reference, target),),
        prompt=reference.prompt(target),
        seed=seed,
        about={"asked": "ABC"[target]},
    )


class MiniBench:
    """Both subjects of `count` references, each asked for in turn with the same noise (a Bench).

    Asking for both tells selecting from copying: a method that does not select is right in one of
    two at most.
    """

    name = "mini"
    published = False

    def __init__(self, count: int, side: int, seed: int = 0, noise: int = 0) -> None:
        """`noise` gives every request other initial noise."""
        self._references = mini_bench(count, side, seed)
        self.settings: dict[str, Any] = {"name": self.name, "side": side, "seed": seed}
        if noise:
            self.settings["noise"] = noise
        self.title = f"{count} held-out mini scenes of two subjects"
        self._noise = seed + noise * SEEDS_PER_BENCH

    def __len__(self) -> int:
        return 2 * len(self._references)

    def outlines(self) -> list[Outline]:
        return [request.outline for request in self.requests(0, len(self))]

    def masks(self) -> Iterator[tuple[str, BoolMask]]:
        for reference in self._references:
            for subject in reference.subjects:
                assert subject.mask is not None  # all is known
                yield f"{reference.key}, {subject.name}", subject.mask

    def references(self) -> Sequence[tuple[int, int]]:
        return [(2 * i, 2 * i + 2) for i in range(len(self._references))]

    def requests(self, start: int, stop: int) -> list[Request]:
        return [
            request(self._references[i // 2], i % 2, self._noise + i // 2)
            for i in range(start, min(stop, len(self)))
        ]
