"""What jobs/generate.py draws: every way to select from held-out references, or the user's own.

Both put the single pictures into a gallery as they are drawn, and return the grid.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from pipeline.evaluation import benches
from pipeline.evaluation.benches import MiniReference, Request, Selection
from pipeline.evaluation.methods.ssr import By, draw_by
from pipeline.generation import grid
from pipeline.generation.gallery import Gallery
from pipeline.generation.recipe import Reference
from pipeline.generation.sampler import Sampler
from ssr_model.maps import overlay

_TITLES = (
    "Reference: two subjects",
    "Where the encoder looks for A",
    "Where it looks for B",
    "Text only: no reference",
    "Text query A",
    "Text query B",
    "Mask query A",
    "Second reference",
    "A and C together: two subjects, two references",
)
PICTURES_PER_REFERENCE = 5
"""Text only, text query A, text query B, mask query A, two subjects."""

_BATCH = 8
_HEADING = (
    "One picture, two subjects: the query picks the one to draw. Its looks come from the picture "
    "alone: no prompt names a colour."
)


def held_out(
    sampler: Sampler,
    bench: Sequence[MiniReference],
    scale: float,
    seed: int,
    note: str,
    gallery: Gallery,
) -> Image.Image:
    """Each reference by text query A and B, by mask query A, with a second one, and without any."""
    a = [benches.request(r, 0, seed + i) for i, r in enumerate(bench)]
    b = [benches.request(r, 1, seed + i) for i, r in enumerate(bench)]
    both = [_with_partner(bench, i, seed + i) for i in range(len(bench))]
    asked: dict[str, tuple[By | None, list[Request]]] = {
        "text-only": (None, a),
        "text-query-a": ("text", a),
        "text-query-b": ("text", b),
        "mask-query-a": ("mask", a),
        "two-subjects": ("text", both),
    }
    drawn: dict[str, list[Image.Image]] = {name: [] for name in asked}
    for first in range(0, len(bench), _BATCH):
        for name, (by, requests) in asked.items():
            batch = requests[first : first + _BATCH]
            drawn[name] += gallery.pictures(
                [
                    (f"{first + i:02d}-{name}", _made_by(request, by, scale))
                    for i, request in enumerate(batch)
                ],
                partial(_draw, sampler, by, scale, batch),
            )
    rows = []
    for i, reference in enumerate(bench):
        query_a, query_b = reference.subjects[0].query, reference.subjects[1].query
        looks = sampler.attention(reference.image, [query_a, query_b])
        partner = both[i].selections[1]
        said = {name: f"“{requests[i].prompt}”" for name, (_, requests) in asked.items()}
        rows.append(
            [
                grid.Cell(reference.image, f"A: {query_a}\nB: {query_b}"),
                grid.Cell(overlay(reference.image, looks[0]), f"query A “{query_a}”", "a"),
                grid.Cell(overlay(reference.image, looks[1]), f"query B “{query_b}”", "b"),
                grid.Cell(drawn["text-only"][i], said["text-only"]),
                grid.Cell(
                    drawn["text-query-a"][i], f"{said['text-query-a']}\nquery A “{query_a}”", "a"
                ),
                grid.Cell(
                    drawn["text-query-b"][i], f"{said['text-query-b']}\nquery B “{query_b}”", "b"
                ),
                grid.Cell(
                    drawn["mask-query-a"][i], f"{said['mask-query-a']}\nmask of A, no words", "a"
                ),
                grid.Cell(partner.reference.image, f"C: {partner.subject.query}", "c"),
                grid.Cell(
                    drawn["two-subjects"][i],
                    f"{said['two-subjects']}\ntext queries A and C",
                    "c",
                ),
            ]
        )
    return grid.draw(_TITLES, rows, _HEADING, note)


def own(
    sampler: Sampler,
    references: Sequence[Reference],
    prompt: str,
    scale: float,
    seed: int,
    note: str,
    gallery: Gallery,
) -> tuple[str, Image.Image]:
    """The prompt with the user's subjects, beside the text-only picture of the same noise.

    Returns the grid after its name: the prompt, the seed and what was selected, so that another
    reference never takes a picture's place.
    """
    subjects = [reference.subject() for reference in references]
    made = {"prompt": prompt, "seed": seed, "scale": scale}
    chosen_from = [
        {"name": r.name, "query": r.query, "mask": r.mask is not None, "sha256": r.sha256()}
        for r in references
    ]
    digest = hashlib.sha256("".join(str(c["sha256"]) for c in chosen_from).encode()).hexdigest()
    name = f"{_slug(prompt)}-seed{seed}-{digest[:6]}"
    (result,) = gallery.pictures(
        [(name, {**made, "method": "ssr", "references": chosen_from})],
        lambda _: sampler.draw([prompt], [seed], [subjects]),
    )
    (floor,) = gallery.pictures(
        [(f"{name}-text-only", {**made, "method": "text-only", "references": []})],
        lambda _: sampler.draw([prompt], [seed]),
    )
    titles, cells = [], []
    for reference in references:
        titles.append(f"Reference: {reference.name}")
        chosen = f"query “{reference.query}”" if reference.query else "mask"
        cells.append(grid.Cell(reference.image, chosen))
        titles.append("What is selected")
        cells.append(grid.Cell(_selected(sampler, reference), chosen, "a"))
    titles += ["Result", "Text only: no reference"]
    cells += [grid.Cell(result, f"“{prompt}”", "a"), grid.Cell(floor, f"“{prompt}”")]
    return name, grid.draw(titles, [cells], note=note, side=256)


def _draw(
    sampler: Sampler, by: By | None, scale: float, requests: Sequence[Request], places: list[int]
) -> list[Image.Image]:
    some = [requests[place] for place in places]
    if by is None:
        return sampler.draw([r.prompt for r in some], [r.seed for r in some])
    return draw_by(sampler, some, by, scale)


def _with_partner(bench: Sequence[MiniReference], index: int, seed: int) -> Request:
    """A of a reference together with a subject of another class from the next one that has it."""
    first, ground = Selection(bench[index], 0), bench[index].ground
    for step in range(1, len(bench) + 1):
        other = bench[(index + step) % len(bench)]
        for target, subject in enumerate(other.subjects):
            if subject.name != first.subject.name:
                prompt = f"{first.subject.phrase} and {subject.phrase} on {ground}"
                pair = (first, Selection(other, target))
                return Request(f"{bench[index].key}-with-{other.key}", pair, prompt, seed)
    raise ValueError("every subject of the bench is of one class")


def _selected(sampler: Sampler, reference: Reference) -> Image.Image:
    if reference.query:
        (looks,) = sampler.attention(reference.image, [reference.query])
        return overlay(sampler.seen(reference.image), looks)
    assert reference.mask is not None
    return overlay(reference.image, np.asarray(reference.mask, np.float32))


def _made_by(request: Request, by: By | None, scale: float) -> dict[str, Any]:
    selections = [
        {"reference": s.reference.key, "query": s.subject.query} for s in request.selections
    ]
    return {
        "prompt": request.prompt,
        "seed": request.seed,
        "scale": scale,
        "method": f"{by}-query" if by else "text-only",
        "selections": selections if by else [],
    }


def _slug(text: str) -> str:
    words = "".join(c if c.isascii() and c.isalnum() else " " for c in text.lower()).split()
    return "-".join(words)[:60] or "picture"
