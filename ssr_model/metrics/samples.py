"""What is measured: drawn pictures, each with what it is compared with, and the scores of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ssr_model.images import Mask, Picture

Need = Literal["text", "others", "references", "subjects"]
"""Fields of a Sample that a metric compares its picture with."""


@dataclass(frozen=True, eq=False)
class MaskedSubject:
    """A subject that a picture was asked to show, and where it is seen."""

    name: str
    """Its class, as a segmenter is asked for it: "cup"."""
    references: Sequence[tuple[Picture, Mask]]
    """One or more pictures of it, each with its mask of the picture's own size (h, w)."""
    mask: Mask | None = None
    """Where it is in the drawn picture, (h, w) of that picture's size. A mask that is zero
    everywhere = looked for and not found; None = nobody looked, a segmenter has to."""


@dataclass(frozen=True, eq=False)
class Sample:
    """One drawn picture, and what it is compared with; a metric asks for some of it."""

    image: Picture
    """What was drawn: PIL image, or array (H, W, 3) of uint8 or of floats in [0, 1]."""
    text: str | None = None
    """What it should show, in words that describe it: a learned word (`<v>`, `sks`) is no word."""
    others: Sequence[str] = ()
    """The reference's other subjects, which it should leave out, in words: "a cat"."""
    references: Sequence[Picture] = ()
    """Whole pictures of what it should show."""
    subjects: Sequence[MaskedSubject] = ()
    """The subjects that it was asked to show, one or more."""

    def __post_init__(self) -> None:
        for need in ("others", "references", "subjects"):
            if not isinstance(getattr(self, need), (list, tuple)):
                raise ValueError(f"a sample's {need} must be a list, even of one.")


@dataclass(frozen=True, eq=False)
class Scores:
    """One metric of B samples, in their order."""

    metric: str
    values: NDArray[np.float32]
    """(B,): the mean of each sample's parts."""
    parts: list[list[float]]
    """Per sample: one number for each reference, each other text, or each subject."""
    backbone: dict[str, Any] = field(default_factory=dict)
    """What looked: see `Backbone.describe`."""
    missing: NDArray[np.int64] | None = None
    """(B,): subjects not found in each picture, which count as 0; None = none is looked for."""

    @classmethod
    def of(
        cls,
        metric: str,
        parts: list[list[float]],
        backbone: dict[str, Any],
        missing: Sequence[int] | None = None,
    ) -> Scores:
        """Scores of their parts; every sample has at least one."""
        values = np.array([np.mean(part) for part in parts], np.float32)
        absent = None if missing is None else np.array(missing, np.int64)
        return cls(metric, values, parts, backbone, absent)


class SampleError(ValueError):
    """A sample that cannot be measured.

    number: its place among those that were given, from 0.
    fault: what is wrong, to follow on whatever it is called: " has no text, ...".
    """

    def __init__(self, number: int, fault: str) -> None:
        super().__init__(number, fault)
        self.number, self.fault = number, fault

    def __str__(self) -> str:
        return f"sample {self.number}{self.fault}"


_LACKS = {
    "text": "no text",
    "others": "no text of another subject of its reference",
    "references": "no reference",
    "subjects": "no masked subject",
}


def require(title: str, samples: Sequence[Sample], *needs: Need) -> None:
    """Refuse samples that lack what a metric compares them with; SampleError names the first."""
    for number, sample in enumerate(samples):
        for need in needs:
            # a text that is empty is one: the empty prompt has an embedding
            if getattr(sample, need) is None or (need != "text" and not len(getattr(sample, need))):
                raise SampleError(
                    number,
                    f" has {_LACKS[need]}, which {title} needs: give it, or leave the metric out.",
                )
