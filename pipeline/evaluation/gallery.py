"""Pictures of an evaluation: references beside what each method drew; the best and the worst.

A bench may have tens of thousands of large pictures. So a sheet is chosen first; then every unit
and reference is read once, and what is kept of it is of about a cell's size.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from PIL import Image

from pipeline.evaluation.benches import Request
from pipeline.evaluation.drawing import picture_of, read_pictures
from pipeline.evaluation.evaluation import Evaluation
from pipeline.evaluation.markdown import number
from pipeline.evaluation.methods.method import Part
from pipeline.evaluation.results import Measure, Results
from pipeline.generation import grid
from pipeline.storage import Storage
from ssr_model.maps import overlay

ROWS = 12
"""Requests in the grid."""
EXTREMES = 4
"""Best and worst pictures of each method."""
_RANKED_BY = ("dino_m", "distance_target", "dino", "clip_i", "clip_t")
"""What tells good from bad, the first of these that has values."""
_NEEDS_SUBJECT = "distance_target"
"""The one whose value is missing where the subject is; others then lack what they compare with."""
_COLUMNS = ("key", "image", "attention", "seen")
_SIDE = 320
"""Of the pictures that are kept, pixels: twice a cell's, so that a part of one still fills it."""
_TONES = "abc"


class Pictures:
    """Sheets of one evaluation's pictures.

    methods: whose, names, in their columns' order.
    """

    def __init__(
        self, asked: Evaluation, storage: Storage, results: Results, methods: Sequence[str]
    ) -> None:
        self._asked, self._storage, self._results = asked, storage, results
        self._methods = [m for m in asked.methods if m.name in methods]

    def sheet(self) -> Image.Image:
        """Requests from all over the bench: reference, mask, where a method looks, and what each
        drew.
        """
        rows = self._rows()
        drawn = self._drawn({m.name: [row.key for row in rows] for m in self._methods})
        columns = {"Reference": [row.cell() for row in rows]}
        others = {
            "Mask": [row.mask for row in rows],
            "Where it looks": [self._looks(row, drawn) for row in rows],
        }
        for title, pictures in others.items():
            if any(picture is not None for picture in pictures):
                columns[title] = [grid.Cell(picture) for picture in pictures]
        titles = [*columns, *(method.title for method in self._methods)]
        cells = list(columns.values())
        cells += [[self._cell(m.name, row, drawn) for row in rows] for m in self._methods]
        note = f"under each picture: {self._ranked.title}" if self._ranked else ""
        return grid.draw(titles, list(zip(*cells, strict=True)), self._asked.bench.title, note)

    def extremes(self) -> Image.Image:
        """Each method's pictures with the best and the worst score, their references beside."""
        titles = ["Method", *["Reference", "Drawn"] * EXTREMES]
        chosen: dict[str, dict[str, list[str]]] = {}
        for method in self._methods:
            ranked = self._order(method.name)
            chosen[method.name] = {"best": ranked[:EXTREMES], "worst": ranked[::-1][:EXTREMES]}
        keys = {name: [key for some in of.values() for key in some] for name, of in chosen.items()}
        drawn = self._drawn(keys)
        rows = self._read({key for some in keys.values() for key in some})
        lines = []
        for method in self._methods:
            for which, some in chosen[method.name].items():
                line = [grid.Cell(None, f"{method.title}:\n{which}")]
                for key in some:
                    line += [rows[key].cell(), self._cell(method.name, rows[key], drawn)]
                lines.append(line + [grid.Cell()] * (len(titles) - len(line)))
        by = f"by {self._ranked.title}" if self._ranked else ""
        return grid.draw(titles, lines, f"Best and worst pictures {by}")

    # --- which ---

    def _rows(self) -> list[_Row]:
        """Of references from all over the bench the first requests, those that differ most."""
        bench = self._asked.bench
        spans = bench.references()
        of_first = {_subjects(request) for request in bench.requests(*spans[0])}
        count = min(len(spans), ROWS // min(len(of_first), 2))
        rows: list[_Row] = []
        for place in range(count):
            requests = bench.requests(*spans[place * len(spans) // count])
            rows += [_Row.of(request) for request in _varied(requests)[: ROWS // count]]
        return rows

    def _order(self, method: str) -> list[str]:
        """Keys of the method's pictures, the best first; those without the subject are the worst,
        and those that were not measured are left out.
        """
        if self._ranked is None:
            return []
        sign, lowest = self._ranked.sign, float("-inf")
        missed = self._ranked.name == _NEEDS_SUBJECT
        found = {
            key: lowest if value is None else sign * value
            for (name, key), value in self._scores.items()
            if name == method and (missed or value is not None)
        }
        return sorted(found, key=lambda key: found[key])[::-1]

    @cached_property
    def _ranked(self) -> Measure | None:
        rows = self._results.rows
        shown = rows.filter(pc.is_in(rows["method"], pa.array([m.name for m in self._methods])))
        measures = {measure.name: measure for measure in self._results.measures}
        known = (measures[name] for name in _RANKED_BY if name in measures)
        return next((m for m in known if shown[m.name].null_count < len(shown)), None)

    @cached_property
    def _scores(self) -> dict[tuple[str, str], float | None]:
        """What pictures are ranked by, of (method, key)."""
        if self._ranked is None:
            return {}
        rows = self._results.rows
        columns = (rows[c].to_pylist() for c in ("method", "key", self._ranked.name))
        return {(method, key): value for method, key, value in zip(*columns, strict=True)}

    # --- reading ---

    @cached_property
    def _places(self) -> dict[str, int]:
        """Of each request, by its key, which one it is."""
        outlines = self._asked.bench.outlines()
        return {outline.key: place for place, outline in enumerate(outlines)}

    def _read(self, keys: Iterable[str]) -> dict[str, _Row]:
        """The requests of these keys; those of a reference one after the other, for which benches
        keep its pictures.
        """
        places = self._places
        rows = {}
        for key in sorted(keys, key=lambda key: places[key]):
            (request,) = self._asked.bench.requests(places[key], places[key] + 1)
            rows[key] = _Row.of(request)
        return rows

    def _drawn(self, wanted: Mapping[str, Iterable[str]]) -> dict[tuple[str, str], _Drawn]:
        """What each method drew for its keys, by (method, key)."""
        places, found = self._places, {}
        for method in self._methods:
            units: dict[str, list[str]] = {unit: [] for unit in self._asked.units(method)}
            for key in wanted[method.name]:
                next(some for unit, some in units.items() if _holds(unit, places[key])).append(key)
            for unit, keys in units.items():
                for row in self._unit(method.name, unit, keys) if keys else ():
                    found[method.name, row["key"]] = _Drawn.of(row)
        return found

    def _unit(self, method: str, unit: str, keys: Sequence[str]) -> list[dict[str, Any]]:
        return read_pictures(self._storage, self._asked.folder, method, unit, _COLUMNS, keys)

    # --- cells ---

    def _cell(self, method: str, row: _Row, drawn: Mapping[tuple[str, str], _Drawn]) -> grid.Cell:
        caption = f"“{row.prompt}”\n{self._caption(method, row.key)}"
        return grid.Cell(drawn[method, row.key].image, caption, row.tone)

    def _caption(self, method: str, key: str) -> str:
        if self._ranked is None:
            return ""
        value = self._scores.get((method, key))
        if value is None and self._ranked.name == _NEEDS_SUBJECT:
            return "not found"
        # in words: the sheets' font has no dash
        return "not measured" if value is None else number(value, self._ranked.digits)

    def _looks(self, row: _Row, drawn: Mapping[tuple[str, str], _Drawn]) -> Image.Image | None:
        """Where the first method that points looks, over what it sees of the reference."""
        for method in self._methods:
            found = drawn[method.name, row.key]
            if found.attention is not None:
                return overlay(_part(row.reference, found.seen), found.attention)
        return None


@dataclass(frozen=True, eq=False)
class _Row:
    """What sheets show of a request."""

    key: str
    prompt: str
    names: str
    tone: str
    reference: Image.Image
    mask: Image.Image | None
    """Of the first subject, over the reference."""

    @classmethod
    def of(cls, request: Request) -> Self:
        chosen, reference = request.selections[0], _small(request.reference.image)
        inside = chosen.subject.mask
        if inside is not None:
            inside = np.asarray(Image.fromarray(inside).resize(reference.size))
        return cls(
            request.key,
            request.prompt,
            ", ".join(selection.subject.name for selection in request.selections),
            _TONES[chosen.target % len(_TONES)],
            reference,
            None if inside is None else overlay(reference, inside.astype(np.float32)),
        )

    def cell(self) -> grid.Cell:
        return grid.Cell(self.reference, f"“{self.names}”", self.tone)


@dataclass(frozen=True, eq=False)
class _Drawn:
    """What sheets show of what a method drew."""

    image: Image.Image
    attention: NDArray[np.float32] | None
    seen: Part | None

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Self:
        attention = row["attention"]
        looks = None if attention is None else np.asarray(attention, np.float32)
        return cls(_small(picture_of(row)), looks, row["seen"])


def _small(image: Image.Image) -> Image.Image:
    """The picture within _SIDE x _SIDE."""
    small = image.copy()
    small.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    return small


def _part(image: Image.Image, part: Part | None) -> Image.Image:
    left, top, right, bottom = part or (0, 0, 1, 1)
    width, height = image.size
    x, y = round(left * width), round(top * height)
    end_x, end_y = max(round(right * width), x + 1), max(round(bottom * height), y + 1)
    return image.crop((x, y, end_x, end_y))


def _subjects(request: Request) -> tuple[int, ...]:
    return tuple(selection.target for selection in request.selections)


def _varied(requests: Sequence[Request]) -> list[Request]:
    """One of each choice of subjects, then of each other prompt, then the others."""
    known: set[Any] = set()
    ranks = []
    for request in requests:
        subjects = _subjects(request)
        prompt = (subjects, request.prompt)
        ranks.append(0 if subjects not in known else 1 if prompt not in known else 2)
        known |= {subjects, prompt}
    return [requests[i] for i in sorted(range(len(requests)), key=ranks.__getitem__)]


def _holds(unit: str, place: int) -> bool:
    start, _, stop = unit.partition("-")
    return int(start) <= place < int(stop)
