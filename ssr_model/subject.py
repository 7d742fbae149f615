"""What the user asks for: subjects in reference images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ssr_model.images import Mask, Picture


@dataclass(eq=False)
class Subject:
    """What to take from a reference image: by a text query, by a mask, or by both."""

    image: Picture
    """PIL image, or array (H, W, 3) of uint8 or of floats in [0, 1]."""
    query: str | None = None
    """Words that name the subject in the image ("cup"); none = the mask alone selects."""
    mask: Mask | None = None
    """(H, W) of the image's size, nonzero at the subject; none = the query alone selects."""
    scale: float = 1.0
    """Weight of this subject (lambda of Eq. 4); 0 leaves it out."""

    def __post_init__(self) -> None:
        if self.query is not None and not isinstance(self.query, str):
            raise ValueError(f"a query must be text, not {type(self.query).__name__}.")
        if self.mask is None and not (self.query or "").strip():
            raise ValueError("a subject needs a query, a mask, or both: this one has neither.")
        if isinstance(self.scale, bool) or not math.isfinite(self.scale):
            raise ValueError(f"a subject's scale must be a finite number, not {self.scale!r}.")


def subject_rows(subjects: Sequence[Subject] | Sequence[Sequence[Subject]]) -> list[list[Subject]]:
    """Subjects per prompt; one flat list serves all prompts, and is one row."""
    if isinstance(subjects, Subject):
        raise ValueError("give a list of subjects, even for one: condition([Subject(...)]).")
    rows: list[list[Subject]] = []
    flat = not subjects or any(isinstance(item, Subject) for item in subjects)
    for row in [subjects] if flat else subjects:
        if not isinstance(row, Sequence) or not all(isinstance(item, Subject) for item in row):
            raise ValueError("subjects must be a list of Subject, or one such list per prompt.")
        rows.append([item for item in row if isinstance(item, Subject)])
    return rows
