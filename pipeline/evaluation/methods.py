"""Methods under test behind one small protocol: requests in, pictures out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np
from PIL import Image

from pipeline.evaluation.benches import Request, Selection
from pipeline.generation.sampler import Sampler
from ssr_model.conditioning import Subject


class Method(Protocol):
    """Draws one picture per request, independent of the other requests beside it."""

    name: str

    def __call__(self, requests: Sequence[Request]) -> list[Image.Image]: ...


class TextOnly:
    """The base model alone: it reads the prompt and never sees the reference. The floor."""

    name = "text-only"

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler

    def __call__(self, requests: Sequence[Request]) -> list[Image.Image]:
        return self._sampler.draw([r.prompt for r in requests], [r.seed for r in requests])


class SelectBy:
    """The SSR-Encoder, told which subject by a text query or by a mask, never by both.

    Every request of a call selects the same number of subjects.
    """

    def __init__(self, sampler: Sampler, by: Literal["text", "mask"], scale: float = 1.0) -> None:
        self.name = f"{by}-query"
        self._sampler, self._by, self._scale = sampler, by, scale

    def __call__(self, requests: Sequence[Request]) -> list[Image.Image]:
        subjects = [[self._subject(s) for s in r.selections] for r in requests]
        prompts, seeds = [r.prompt for r in requests], [r.seed for r in requests]
        return self._sampler.draw(prompts, seeds, subjects)

    def _subject(self, selection: Selection) -> Subject:
        image, chosen = selection.reference.image, selection.subject
        if self._by == "text":
            return Subject(image, query=chosen.query, scale=self._scale)
        mask = Image.fromarray(chosen.mask.astype(np.uint8) * 255)
        return Subject(image, mask=mask, scale=self._scale)
