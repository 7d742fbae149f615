"""What a method under test is: requests in, pictures out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.evaluation.benches import Bench, Request

Part = tuple[float, float, float, float]
"""Of a picture: left, top, right, bottom, as fractions of its width and height."""


@dataclass(frozen=True, eq=False)
class Drawn:
    """A picture, and where the method looked in the first reference to draw it."""

    image: Image.Image
    attention: NDArray[np.float32] | None = None
    """(h, w), one value per patch; None = the method does not point."""
    seen: Part | None = None
    """What of that reference `attention` covers; None = all of it."""


class Method(Protocol):
    """Draws one picture per request, independent of the other requests beside it.

    Building one is cheap and loads nothing: the driver does, to learn its settings. `open` loads
    its models, once in the worker that will draw; `close` lets them go.
    """

    @property
    def name(self) -> str:
        """Its name in results and its folder: "ssr-text"; letters, digits, dots, dashes."""
        ...

    title: str
    """What tables call it."""

    @property
    def native(self) -> bool:
        """Whether its pictures are drawn here; False = they are read from a folder."""
        ...

    @property
    def learns(self) -> bool:
        """Whether it is trained on each reference before it draws: a call then has requests of one
        reference alone."""
        ...

    @property
    def settings(self) -> dict[str, Any]:
        """JSON of everything that shapes its pictures: options, hashes of weights."""
        ...

    def check(self, bench: Bench) -> None:
        """Refuse a bench that it cannot draw, by UserError, before anything is drawn."""
        ...

    def open(self) -> None: ...

    def close(self) -> None: ...

    def __call__(self, requests: Sequence[Request]) -> list[Drawn]: ...
