"""What is drawn together: pictures that are alike, a few at a time."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

from PIL import Image

T = TypeVar("T")


def in_batches(
    wanted: Sequence[T],
    size: int,
    draw: Callable[[Sequence[T]], Sequence[Image.Image]],
    alike: Callable[[T], Hashable],
) -> list[Image.Image]:
    """Pictures of what is wanted, in its order, drawn `size` at most at a time: each batch of those
    for which `alike` is equal.
    """
    pictures: dict[int, Image.Image] = {}
    for kind in dict.fromkeys(map(alike, wanted)):
        places = [i for i, each in enumerate(wanted) if alike(each) == kind]
        for first in range(0, len(places), size):
            some = places[first : first + size]
            drawn = draw([wanted[i] for i in some])
            pictures.update(zip(some, drawn, strict=True))
    return [pictures[i] for i in range(len(wanted))]
