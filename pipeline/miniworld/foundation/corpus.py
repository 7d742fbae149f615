"""The foundation's training pictures: scenes of the foundation split, rendered once and cached.

Captions are drawn at training time: a good part of them name attributes, because a text-to-image
model can only follow appearance that its captions spoke of; SSR's own prompts never do.
"""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.miniworld import world

IMAGE_SIZE = 32
GROUND_NAMES = tuple(world.GROUNDS)


@dataclass(frozen=True)
class Corpus:
    """Pictures with everything that is known about them."""

    scenes: list[world.Scene]
    images: NDArray[np.uint8]
    """(n, 32, 32, 3) RGB."""
    regions: NDArray[np.uint8]
    """(n, 32, 32): 0 the ground, 1 + i the subject i of the scene."""

    def __len__(self) -> int:
        return len(self.scenes)

    def class_map(self, index: NDArray[np.int64]) -> NDArray[np.int64]:
        """(len(index), 32, 32): class of each pixel; the grounds follow the subjects' classes."""
        out = np.empty((len(index), IMAGE_SIZE, IMAGE_SIZE), np.int64)
        for row, i in enumerate(index):
            scene = self.scenes[i]
            ground = len(world.CLASSES) + GROUND_NAMES.index(scene.ground)
            table = [ground] + [world.CLASSES.index(s.cls) for s in scene.subjects]
            out[row] = np.array(table)[self.regions[i]]
        return out


def _draw(job: tuple[world.Split, int, int | None]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    split, seed, subjects = job
    scene = world.scene(seed, split, subjects)
    size = (IMAGE_SIZE, IMAGE_SIZE)
    region = np.zeros(size, np.uint8)
    for number, mask in enumerate(world.masks(scene, size)):
        region[mask] = number + 1
    return world.render(scene, size), region


def build(
    split: world.Split, count: int, cache: Path | None = None, subjects: int | None = None
) -> Corpus:
    """`count` scenes of a split, seeds 0 ... count-1; pictures are kept in `cache` as .npz."""
    jobs = [(split, seed, subjects) for seed in range(count)]
    scenes = [world.scene(seed, split, subjects) for _, seed, _ in jobs]
    if cache is not None and cache.exists():
        with np.load(cache) as stored:
            return Corpus(scenes, stored["images"], stored["regions"])
    if count > 1000:
        with ProcessPoolExecutor() as pool:
            drawn = list(pool.map(_draw, jobs, chunksize=256))
    else:
        drawn = [_draw(job) for job in jobs]
    images = np.stack([image for image, _ in drawn])
    regions = np.stack([region for _, region in drawn])
    if cache is not None:
        cache.parent.mkdir(parents=True, exist_ok=True)
        partial = cache.with_suffix(".partial.npz")
        np.savez(partial, images=images, regions=regions)
        partial.replace(cache)
    return Corpus(scenes, images, regions)
