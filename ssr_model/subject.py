"""What the user asks for: subjects in reference images."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real

import numpy as np

from ssr_model.images import Mask, Picture


@dataclass(eq=False)
class Subject:
    """What to take from a reference image, by a text query, by a mask, or by both; and how strongly
    it acts, where in the picture, and when.
    """

    image: Picture
    """PIL image, or array (H, W, 3) of uint8 or of floats in [0, 1]."""
    query: str | None = None
    """Words that name the subject in the image ("cup"); none = the mask alone selects."""
    mask: Mask | None = None
    """(H, W) of the image's size, nonzero at the subject; none = the query alone selects."""
    scale: float | Mapping[str, float] = 1.0
    """Weight of this subject (lambda of Eq. 4); 0 leaves it out. Of several subjects a small weight
    is not the same as none: their tokens share one softmax. A mapping gives blocks of the
    U-Net their own: {"down_blocks": 0.5, "up_blocks.1": 0}. A name covers all that begins with it,
    the longest counts, and blocks without one keep 1."""
    region: Mask | None = None
    """Where in the drawn picture the subject may act: (h, w) of any size, laid over the whole
    picture, nonzero where it may; values between 0 and 1 weaken it. None = everywhere."""
    schedule: Sequence[float] | None = None
    """Factors of `scale` over the denoising, spread evenly from the first (noisiest) step to the
    last with straight lines between: as many as steps give each step its own, [1, 0] fades the
    subject out. None = 1 throughout."""

    def __post_init__(self) -> None:
        if self.query is not None and not isinstance(self.query, str):
            raise ValueError(f"a query must be text, not {type(self.query).__name__}.")
        if self.mask is None and not (self.query or "").strip():
            raise ValueError("a subject needs a query, a mask, or both: this one has neither.")
        if isinstance(self.scale, Mapping):
            for block, scale in self.scale.items():
                if not isinstance(block, str):
                    raise ValueError(f"a block of the U-Net is named by text, not by {block!r}.")
                _check_number(f"a subject's scale at {block!r}", scale)
        else:
            _check_number("a subject's scale", self.scale)
        if self.schedule is not None:
            sequence = isinstance(self.schedule, (Sequence, np.ndarray))
            if not sequence or isinstance(self.schedule, str) or not len(self.schedule):
                raise ValueError("a subject's schedule must be a list of one or more numbers.")
            for factor in self.schedule:
                _check_number("a factor of a subject's schedule", factor)

    def scale_at(self, layers: Iterable[str]) -> dict[str, float]:
        """The subject's scale at each layer of the U-Net, by the processors' names.

        A block that the U-Net does not have is a ValueError that names the nearest.
        """
        names = list(layers)
        if not isinstance(self.scale, Mapping):
            return dict.fromkeys(names, float(self.scale))
        covered = {block: [n for n in names if _within(n, block)] for block in self.scale}
        for block, found in covered.items():
            if not found:
                blocks = sorted({".".join(n.split(".")[:k]) for n in names for k in (1, 2)})
                near = difflib.get_close_matches(block, blocks, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else f"; it has {', '.join(blocks)}."
                raise ValueError(f"the U-Net has no text attention in {block!r}{hint}")
        scales = dict.fromkeys(names, 1.0)
        for block in sorted(covered, key=len):  # the longest comes last, and stays
            scales |= dict.fromkeys(covered[block], float(self.scale[block]))
        return scales

    def factor_at(self, progress: float) -> float:
        """The schedule's factor at `progress`, from 0 (the first step) to 1 (the last)."""
        if self.schedule is None:
            return 1.0
        knots = np.linspace(0.0, 1.0, len(self.schedule))
        return float(np.interp(progress, knots, np.asarray(self.schedule, float)))

    @property
    def absent(self) -> bool:
        """Whether it has no weight anywhere, and need not be looked at."""
        everywhere = not isinstance(self.scale, Mapping) and self.scale == 0
        return everywhere or (self.schedule is not None and not any(self.schedule))


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


def _within(layer: str, block: str) -> bool:
    return layer == block or layer.startswith(f"{block}.")


def _check_number(what: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"{what} must be a finite number, not {value!r}.")
