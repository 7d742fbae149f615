"""Examples to begin with: held-out scenes of the mini world, each with what to take from it."""

from __future__ import annotations

import html
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

from pipeline.evaluation.benches import MiniReference, mini_bench
from pipeline.serving.page_card import Card, shown

# Chosen of the first sixteen held-out scenes, so that a look at the drawings tells whose colours
# they have; how often it goes well is measured by jobs/evaluate.py, on all of them.
_SCENES = 13
_BY_WORD = (5, 7, 12)
_BY_MASK = (3, 1)
"""A scene, and the subject of it."""
_TOGETHER = (10, 11)


@dataclass(frozen=True)
class Chosen:
    """A subject of an example, as the page's widgets hold it."""

    card: Card
    region: str = "everywhere"


@dataclass(frozen=True)
class Example:
    """A form that is filled in by a click."""

    caption: str
    subjects: tuple[Chosen, ...]
    prompt: str


@lru_cache(maxsize=4)
def examples(side: int) -> tuple[Example, ...]:
    """By word, by mask, and two subjects at once; pictures of `side` pixels."""
    bench = mini_bench(_SCENES, side)
    found = []
    for scene in _BY_WORD:
        for target in (0, 1):
            prompt = bench[scene].prompt(target)
            caption = f"“{bench[scene].subjects[target].query}”: {prompt}"
            found.append(Example(caption, (Chosen(_by_word(bench[scene], target)),), prompt))
    masked, target = bench[_BY_MASK[0]], _BY_MASK[1]
    prompt = masked.prompt(target)
    masks = (Chosen(_by_mask(masked, target)),)
    found.append(Example(f"a mask, no word: {prompt}", masks, prompt))
    left, right = (bench[scene] for scene in _TOGETHER)
    found.append(
        Example(
            "two pictures, each subject in its half",
            (Chosen(_by_word(left, 0), "left half"), Chosen(_by_word(right, 0), "right half")),
            f"{left.subjects[0].phrase} and {right.subjects[0].phrase} on {left.ground}",
        )
    )
    return tuple(found)


def gallery(side: int) -> str:
    """The examples as buttons; data-example says which one was pressed."""
    buttons = "".join(
        f'<button type="button" data-example="{index}">'
        f'<img src="{example.subjects[0].card.image}" alt="">'
        f"<span>{html.escape(example.caption)}</span></button>"
        for index, example in enumerate(examples(side))
    )
    return f'<div class="row">{buttons}</div>'


def _by_word(reference: MiniReference, target: int) -> Card:
    query = reference.subjects[target].query
    return Card(reference.key, shown(reference.image), "", query)


def _by_mask(reference: MiniReference, target: int) -> Card:
    mask = reference.subjects[target].mask
    assert mask is not None  # all is known of the mini world
    white = Image.fromarray(mask.astype(np.uint8) * 255)
    return Card(reference.key, shown(reference.image), shown(white), "")
