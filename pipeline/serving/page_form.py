"""The page's form as a recipe: which values it sends, in which order, and what they mean."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.config.serve import MOST_GUIDANCE, ServeConfig
from pipeline.errors import UserError
from pipeline.generation.recipe import Recipe, Reference, Region, read_region
from pipeline.serving.bodies import MOST_SCALE
from pipeline.serving.page_card import read_card

REGIONS: dict[str, Region | None] = {
    "everywhere": None,
    "left half": (0.0, 0.0, 0.5, 1.0),
    "right half": (0.5, 0.0, 1.0, 1.0),
    "top half": (0.0, 0.0, 1.0, 0.5),
    "bottom half": (0.0, 0.5, 1.0, 1.0),
}
FOUR_NUMBERS = "four numbers"
"""The other choice: the text beside it says where."""
PER_SUBJECT = 4
"""Values of a subject: the card, its scale, the chosen region, the region's four numbers."""


@dataclass(frozen=True)
class Form:
    """All values of the page, as its events send them."""

    subjects: tuple[tuple[Any, ...], ...]
    """PER_SUBJECT values each."""
    prompt: str
    negative_prompt: str
    seed: float | None
    steps: float
    guidance: float
    guidance_rescale: float
    width: float | None
    height: float | None
    control: Any
    """A card with neither mask nor query."""
    control_scale: float

    @classmethod
    def of(cls, values: Sequence[Any], slots: int) -> Form:
        """values: those of each of the `slots` subjects, then the others in the fields' order."""
        first = slots * PER_SUBJECT
        subjects = tuple(tuple(values[i : i + PER_SUBJECT]) for i in range(0, first, PER_SUBJECT))
        return cls(subjects, *values[first:])

    def recipe(self, cfg: ServeConfig) -> Recipe:
        """Raises UserError for what cannot be drawn, or is more than the settings allow."""
        for name in ("prompt", "negative_prompt"):
            if len(getattr(self, name) or "") > cfg.limits.text:
                most = cfg.limits.text
                raise UserError(f"{name}: more than {most} characters; make it shorter")
        seed = within("seed", self.seed)
        if not seed.is_integer():
            raise UserError("seed: missing; give a whole number")
        control = read_card(self.control)
        return Recipe(
            prompt=self.prompt or "",
            subjects=self.references(cfg),
            negative_prompt=self.negative_prompt or "",
            seed=int(seed),
            steps=int(within("steps", self.steps, cfg.limits.steps)),
            guidance=within("guidance", self.guidance, MOST_GUIDANCE),
            guidance_rescale=within("guidance_rescale", self.guidance_rescale, 1),
            size=self.size(cfg),
            control=control.picture(cfg.limits) if control.image else None,
            control_scale=within("control_scale", self.control_scale, MOST_SCALE),
        )

    def size(self, cfg: ServeConfig) -> tuple[int, int] | None:
        """Width and height; none = the model's own square, for an emptied widget too."""
        most = cfg.limits.side
        width, height = (
            int(within(name, getattr(self, name) or 0, most)) for name in ("width", "height")
        )
        if bool(width) != bool(height):
            raise UserError("size: one side is missing; give width and height, or 0 for both")
        return (width, height) if width else None

    def references(self, cfg: ServeConfig) -> tuple[Reference, ...]:
        """Those of the cards that hold anything."""
        found = []
        for number, (value, scale, choice, edges) in enumerate(self.subjects, start=1):
            card = read_card(value)
            if card.empty:
                continue
            try:
                weight = within("scale", scale, MOST_SCALE)
                found.append(card.reference(cfg.limits, weight, region(choice, edges)))
            except UserError as error:
                raise UserError(f"subject {number}: {error}") from None
        return tuple(found)


def within(name: str, value: Any, most: float = math.inf) -> float:
    """From 0 to `most`. The page's widgets keep to that, and who asks without them is told."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{name}: missing; give a number")
    if not (math.isfinite(value) and 0 <= value <= most):
        raise UserError(f"{name}: {value:g} is not within 0 to {most:g}")
    return float(value)


def region(choice: str, edges: str) -> Region | None:
    """Where a subject may act, by the page's choice and the four numbers beside it."""
    if choice not in (FOUR_NUMBERS, *REGIONS):
        raise UserError("region: not one of the page's; load the page anew")
    if choice != FOUR_NUMBERS:
        return REGIONS[choice]
    if not (edges or "").strip():
        raise UserError("region: missing; give left,top,right,bottom from 0 to 1")
    return read_region(edges)
