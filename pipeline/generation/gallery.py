"""The single pictures of a run in storage: each kept as soon as it is drawn, none drawn twice."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from PIL import Image

from pipeline.generation import png
from pipeline.storage import Storage

FOLDER = "generate"


class Gallery:
    """Pictures under generate/, each a PNG that says how it was made.

    Args:
        storage: the run's root.
        settings: what made every picture of the run (JSON-able); a picture that was made otherwise
            is drawn again.
    """

    def __init__(self, storage: Storage, settings: Mapping[str, Any]) -> None:
        self.storage, self.settings = storage, dict(settings)
        self.names: list[str] = []
        """The run's pictures so far, file names without suffix."""

    def pictures(
        self,
        wanted: Sequence[tuple[str, Mapping[str, Any]]],
        draw: Callable[[list[int]], Sequence[Image.Image]],
    ) -> list[Image.Image]:
        """A picture for each (name, how it is made) of `wanted`, in its order.

        Those that are not there yet are drawn together by `draw`, which is given their places in
        `wanted`, and kept before anything else is drawn.
        """
        found = [self._find(name, made_by) for name, made_by in wanted]
        missing = [place for place, picture in enumerate(found) if picture is None]
        if missing:
            for place, picture in zip(missing, draw(missing), strict=True):
                name, made_by = wanted[place]
                self.storage.write_bytes(_path(name), png.encode(picture, self._about(made_by)))
                found[place] = picture
        self.names += [name for name, _ in wanted]
        return [picture for picture in found if picture is not None]

    def _find(self, name: str, made_by: Mapping[str, Any]) -> Image.Image | None:
        if not self.storage.exists(_path(name)):
            return None
        data = self.storage.read_bytes(_path(name))
        if png.made_by(data) != json.loads(json.dumps(self._about(made_by), default=str)):
            return None
        with Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
            return picture.convert("RGB")

    def _about(self, made_by: Mapping[str, Any]) -> dict[str, Any]:
        return {**self.settings, **made_by}


def _path(name: str) -> str:
    return f"{FOLDER}/{name}.png"
