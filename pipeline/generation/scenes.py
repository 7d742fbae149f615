"""What jobs/generate.py draws: every way to select from held-out references, or the user's own.

Both are recipes with names, known before any model is loaded, and a grid of what came of them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
from PIL import Image

from pipeline.config import GenerateConfig
from pipeline.evaluation import benches
from pipeline.evaluation.benches import MiniReference, Request, Selection
from pipeline.evaluation.methods.ssr import By, reference
from pipeline.generation import grid
from pipeline.generation.gallery import FOLDER, Named
from pipeline.generation.recipe import Recipe, Reference
from pipeline.generation.sampler import Sampler
from ssr_model.maps import overlay

GRID = "grid.png"
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
_HEADING = (
    "One picture, two subjects: the query picks the one to draw. Its looks come from the picture "
    "alone: no prompt names a colour."
)


class Scene(Protocol):
    """Pictures to draw, and how they are shown."""

    wanted: list[Named]
    path: str
    """The grid's, under the root."""

    def sheet(self, sampler: Sampler, drawn: Mapping[str, Image.Image]) -> Image.Image:
        """The grid of what was drawn, by the names of `wanted`."""
        ...


class HeldOut:
    """Each reference by text query A and B, by mask query A, with a second one, and without any."""

    path = GRID

    def __init__(self, cfg: GenerateConfig, side: int) -> None:
        self.cfg, self.bench = cfg, benches.mini_bench(cfg.references, side)
        seeds = range(cfg.seed, cfg.seed + len(self.bench))
        a = [benches.request(r, 0, seed) for r, seed in zip(self.bench, seeds, strict=True)]
        b = [benches.request(r, 1, seed) for r, seed in zip(self.bench, seeds, strict=True)]
        self.both = [_with_partner(self.bench, i, seed) for i, seed in enumerate(seeds)]
        self.asked: dict[str, tuple[By | None, list[Request]]] = {
            "text-only": (None, a),
            "text-query-a": ("text", a),
            "text-query-b": ("text", b),
            "mask-query-a": ("mask", a),
            "two-subjects": ("text", self.both),
        }
        how = _how(cfg, side)
        self.wanted = [
            (f"{i:02d}-{kind}", _recipe(requests[i], by, cfg.scale, how))
            for i in range(len(self.bench))
            for kind, (by, requests) in self.asked.items()
        ]

    def sheet(self, sampler: Sampler, drawn: Mapping[str, Image.Image]) -> Image.Image:
        rows = [self._row(i, sampler, drawn) for i in range(len(self.bench))]
        note = f"{_note(self.wanted[0][1])}, subject scale {self.cfg.scale:g}"
        return grid.draw(_TITLES, rows, _HEADING, f"{note}, seed {self.cfg.seed} and following")

    def _row(self, i: int, sampler: Sampler, drawn: Mapping[str, Image.Image]) -> list[grid.Cell]:
        image, (a, b) = self.bench[i].image, self.bench[i].subjects
        looks = sampler.attention(image, [a.query, b.query])
        partner = self.both[i].selections[1]

        def cell(kind: str, told: str = "", tone: str | None = None) -> grid.Cell:
            said = f"“{self.asked[kind][1][i].prompt}”"
            return grid.Cell(drawn[f"{i:02d}-{kind}"], f"{said}\n{told}" if told else said, tone)

        return [
            grid.Cell(image, f"A: {a.query}\nB: {b.query}"),
            grid.Cell(overlay(image, looks[0]), f"query A “{a.query}”", "a"),
            grid.Cell(overlay(image, looks[1]), f"query B “{b.query}”", "b"),
            cell("text-only"),
            cell("text-query-a", f"query A “{a.query}”", "a"),
            cell("text-query-b", f"query B “{b.query}”", "b"),
            cell("mask-query-a", "mask of A, no words", "a"),
            grid.Cell(partner.reference.image, f"C: {partner.subject.query}", "c"),
            cell("two-subjects", "text queries A and C", "c"),
        ]


class Own:
    """The prompt with the user's subjects, beside the text-only pictures of the same noise.

    Pictures are named by the prompt, the seed and a digest of the whole recipe, so that none takes
    another's place.
    """

    def __init__(
        self,
        cfg: GenerateConfig,
        references: Sequence[Reference],
        control: Image.Image | None,
        side: int,
    ) -> None:
        first = Recipe(
            prompt=cfg.prompt or "",
            subjects=tuple(references),
            seed=cfg.seed,
            control=control,
            **_how(cfg, side),
        )
        self.recipes = [replace(first, seed=cfg.seed + i) for i in range(cfg.pictures)]
        shaped = json.dumps({**first.describe(), "seed": None}, sort_keys=True)
        digest = hashlib.sha256(shaped.encode()).hexdigest()[:6]
        slug = _slug(first.prompt)
        self.names = [f"{slug}-seed{recipe.seed}-{digest}" for recipe in self.recipes]
        self.wanted = []
        for name, recipe in zip(self.names, self.recipes, strict=True):
            self.wanted.append((name, recipe))
            self.wanted.append((f"{name}-text-only", recipe.without_subjects()))
        self.path = f"{FOLDER}/{self.names[0]}-grid.png"

    def sheet(self, sampler: Sampler, drawn: Mapping[str, Image.Image]) -> Image.Image:
        rows = []
        for name, recipe in zip(self.names, self.recipes, strict=True):
            said = f"“{recipe.prompt}”" + (f"\nseed {recipe.seed}" if len(self.names) > 1 else "")
            floor = grid.Cell(drawn[f"{name}-text-only"], said)
            rows.append([grid.Cell(drawn[name], said, "a"), floor])
        return beside_references(
            sampler, self.recipes[0], ["Result", "Text only: no reference"], rows
        )


def beside_references(
    sampler: Sampler, recipe: Recipe, titles: Sequence[str], rows: Sequence[Sequence[grid.Cell]]
) -> Image.Image:
    """The grid of `rows`; at the first row's left what the recipe draws from, and what it selects
    of that.
    """
    heads, cells = [], []
    for given in recipe.subjects:
        chosen = _chosen(given)
        heads += [f"Reference: {given.name}", "What is selected"]
        cells += [
            grid.Cell(given.image, chosen),
            grid.Cell(_selected(sampler, given), chosen, "a"),
        ]
    if recipe.control is not None:
        heads.append("ControlNet: its image")
        cells.append(grid.Cell(recipe.control, f"weight {recipe.control_scale:g}"))
    lower = [[grid.Cell()] * len(cells)] * (len(rows) - 1)
    whole = [[*left, *right] for left, right in zip([cells, *lower], rows, strict=True)]
    note = f"{_note(recipe)}, seed {recipe.seed}" + (" and following" if len(rows) > 1 else "")
    return grid.draw([*heads, *titles], whole, note=note, side=256)


def _how(cfg: GenerateConfig, side: int) -> dict[str, Any]:
    """What all recipes of a run have in common."""
    own_size = cfg.width is None and cfg.height is None
    return {
        "negative_prompt": cfg.negative_prompt,
        "steps": cfg.steps,
        "guidance": cfg.guidance,
        "guidance_rescale": cfg.guidance_rescale,
        "size": None if own_size else (cfg.width or side, cfg.height or side),
        "control_scale": cfg.control_scale,
    }


def _recipe(request: Request, by: By | None, scale: float, how: Mapping[str, Any]) -> Recipe:
    chosen = request.selections if by else ()
    subjects = tuple(reference(selection, by, scale) for selection in chosen if by)
    return Recipe(prompt=request.prompt, subjects=subjects, seed=request.seed, **how)


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


def _selected(sampler: Sampler, given: Reference) -> Image.Image:
    if given.query:
        (looks,) = sampler.attention(given.image, [given.query])
        return overlay(sampler.seen(given.image), looks)
    return overlay(given.image, np.asarray(given.mask, np.float32))


def _chosen(given: Reference) -> str:
    """What is asked of a reference, as its caption."""
    parts = [f"query “{given.query}”"] if given.query else []
    parts += ["mask"] if given.mask is not None else []
    parts += [f"scale {given.scale:g}"] if given.scale != 1 else []
    if given.region is not None:
        parts.append("in " + ", ".join(f"{edge:g}" for edge in given.region))
    return "\n".join(parts)


def _note(recipe: Recipe) -> str:
    said = (
        f"{recipe.steps} DDIM steps, guidance {recipe.guidance:g} rescaled by "
        f"{recipe.guidance_rescale:g}"
    )
    without = f", without “{recipe.negative_prompt}”" if recipe.negative_prompt else ""
    size = f", {recipe.size[0]}x{recipe.size[1]} pixels" if recipe.size else ""
    return said + size + without


def _slug(text: str) -> str:
    words = "".join(c if c.isascii() and c.isalnum() else " " for c in text.lower()).split()
    return "-".join(words)[:60] or "picture"
