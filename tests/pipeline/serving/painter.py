"""A Sampler whose work the test holds, lets go and counts; the threads around it are real."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.errors import UserError
from pipeline.generation.recipe import Recipe

PATIENCE_S = 30.0


class Painter:
    """Prompts say what happens: "wrong ..." is refused, "broken ..." fails, "dead ..." ends the
    thread; all others give a picture of one colour, the seed's. With `obeys=False` all do: for
    words that a fuzzer finds ("deadline_s" was one).
    """

    side, step = 32, 8

    def __init__(self, obeys: bool = True) -> None:
        self._obeys = obeys
        self.batches: list[list[str]] = []
        self.steps = 0
        self.begun = threading.Semaphore(0)
        self.go = threading.Event()
        self.go.set()

    def make(
        self, recipes: Sequence[Recipe], on_step: Callable[[int], None] | None = None
    ) -> list[Image.Image]:
        prompts = [recipe.prompt for recipe in recipes]
        self.batches.append(prompts)
        self.begun.release()
        for prompt in prompts if self._obeys else ():
            if prompt.startswith("wrong"):
                raise UserError(f"{prompt}: cannot be drawn")
            if prompt.startswith("broken"):
                raise RuntimeError("out of memory at 0x7f")
            if prompt.startswith("dead"):
                raise SystemExit
        for done in range(1, recipes[0].steps + 1):
            assert self.go.wait(PATIENCE_S)
            self.steps += 1
            if on_step is not None:
                on_step(done)
        return [Image.new("RGB", (32, 32), (recipe.seed % 256, 0, 0)) for recipe in recipes]

    def attention(self, image: Image.Image, queries: Sequence[str]) -> NDArray[np.float32]:
        if self._obeys and any(query.startswith("wrong") for query in queries):
            raise UserError("wrong: no such word")
        return np.full((len(queries), 8, 8), 1 / 64, np.float32)

    def seen_box(self, image: Image.Image) -> tuple[int, int, int, int]:
        return 0, 0, *image.size

    def check_size(self, size: tuple[int, int]) -> None:
        if any(side % self.step for side in size):
            raise UserError(f"size: {size[0]}x{size[1]}; multiples of {self.step}")


def picture(width: int = 40, height: int = 30, colour: str = "blue", kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(buffer, kind)
    return buffer.getvalue()
