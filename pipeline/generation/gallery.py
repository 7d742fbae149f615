"""The single pictures of a run in storage: each kept as soon as it is drawn, none drawn twice.

A picture is a PNG that holds its recipe, what it was drawn from, and which models drew it: all that
it takes to draw it again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from PIL import Image

from pipeline.generation import png
from pipeline.generation.batches import in_batches
from pipeline.generation.recipe import Recipe
from pipeline.progress import Progress
from pipeline.storage import Storage

FOLDER = "generate"

Named: TypeAlias = tuple[str, Recipe]
"""A picture's file name without suffix, and how it is made."""
Draw: TypeAlias = Callable[[Sequence[Recipe], Callable[[int], None]], Sequence[Image.Image]]
"""A batch of recipes that are alike, and whom to tell of every step: `Sampler.make`."""


class Gallery:
    """Pictures under generate/.

    Args:
        storage: the run's root.
        drawn_by: what all its pictures are drawn by (JSON-able): models, precision. A picture that
            was drawn otherwise is drawn again.
    """

    def __init__(self, storage: Storage, drawn_by: Mapping[str, Any]) -> None:
        self.storage, self.drawn_by = storage, dict(drawn_by)

    def pictures(
        self, wanted: Sequence[Named], draw: Draw, batch: int, progress: Progress
    ) -> dict[str, Image.Image]:
        """A picture for each of `wanted`, by name.

        Those that are not there yet are drawn, up to `batch` alike at once, and each batch is kept
        before the next one begins.
        """
        found = {name: self._find(name, recipe) for name, recipe in wanted}
        missing = [each for each in wanted if found[each[0]] is None]
        there = {name: picture for name, picture in found.items() if picture is not None}
        if missing:
            steps = [sum(recipe.steps for _, recipe in some) for some in (wanted, missing)]
            progress.task("steps", steps[0], steps[0] - steps[1])

        def keep(some: Sequence[Named]) -> Sequence[Image.Image]:
            done = f"{len(there) + len(some)} of {len(wanted)}"

            def told(step: int) -> None:
                figures = {"pictures": done} if step == some[0][1].steps else {}
                progress.advance("steps", len(some), **figures)

            drawn = draw([recipe for _, recipe in some], told)
            for (name, recipe), picture in zip(some, drawn, strict=True):
                data = png.encode(picture, self._about(recipe), sources=recipe.pictures())
                self.storage.write_bytes(path(name), data)
                there[name] = picture
            return drawn

        in_batches(missing, batch, keep, alike=lambda each: each[1].alike)
        return there

    def _find(self, name: str, recipe: Recipe) -> Image.Image | None:
        if not self.storage.exists(path(name)):
            return None
        data = self.storage.read_bytes(path(name))
        if png.made_by(data) != json.loads(json.dumps(self._about(recipe))):
            return None
        try:
            return png.picture(data).convert("RGB")
        except ValueError:  # cut off by another program
            return None

    def _about(self, recipe: Recipe) -> dict[str, Any]:
        return {**self.drawn_by, "recipe": recipe.describe()}


def path(name: str) -> str:
    """Where the picture `name` lies under the root."""
    return f"{FOLDER}/{name}.png"
