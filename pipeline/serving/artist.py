"""Who draws: all that the API and the page know of the models."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.generation.recipe import Recipe


@dataclass(frozen=True)
class Facts:
    """What an artist can do, and with what."""

    side: int
    """Side of its pictures where a recipe names none, pixels."""
    step: int
    """What the sides of its pictures are multiples of, pixels."""
    controlnet: bool
    """Whether recipes may have a control image."""
    models: dict[str, object]
    """Names and hashes of the models, as they go into pictures' metadata."""
    device: str
    """As people call it: the GPU's name, or cpu."""


@dataclass(frozen=True)
class Step:
    """A denoising step is done."""

    done: int
    of: int


@dataclass(frozen=True)
class Drawn:
    """A picture, whole: with its recipe in it."""

    png: bytes
    batch: int = 1
    """How many pictures were denoised together, this one among them."""


@dataclass(frozen=True)
class Look:
    """Where the aligner looks for one query."""

    query: str
    attention: NDArray[np.float32]
    """(h, w): one value per patch of what CLIP sees; 1 in all, less what no patch got."""
    box: tuple[int, int, int, int]
    """What the map covers of the picture: left, top, right, bottom, pixels."""


class Busy(Exception):
    """The queue is full: try again later."""


class Late(Exception):
    """The deadline passed before the picture was done."""


class Gone(Exception):
    """Whoever was drawing is no more: its process ended, or the service is stopping."""


class Artist(Protocol):
    """Raises UserError for what a recipe asks and the models do not have; Busy, Late, Gone."""

    async def facts(self) -> Facts: ...

    def draw(self, recipe: Recipe, within_s: float) -> AsyncIterator[Step | Drawn]:
        """The steps as they are done, and last the picture. Closing the iterator gives up."""
        ...

    async def look(self, image: Image.Image, queries: list[str], within_s: float) -> list[Look]: ...
