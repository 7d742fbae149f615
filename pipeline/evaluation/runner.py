"""Runs the selection bench: unit by unit, resumable, then one table and one grid.

A unit is one condition on one batch of references. Its Parquet holds the pictures with their
scores, so that every figure of the table can be traced to a picture.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from pipeline.evaluation import benches, scores, table
from pipeline.evaluation.benches import Reference, Request
from pipeline.evaluation.methods import Method
from pipeline.generation import grid, png
from pipeline.miniworld import world
from pipeline.miniworld.judge import Judge
from pipeline.progress import Progress
from pipeline.storage import Storage
from pipeline.units import Ledger, Tally, fingerprint, run_unit

STAGE = "evaluation/samples"

Attention = Callable[[Image.Image, Sequence[str]], Any]
"""(image, queries) -> maps (queries, h, w)."""


@dataclass(frozen=True)
class Condition:
    """A row of the table: a method, asked for one of the reference's subjects."""

    name: str
    title: str
    method: Method
    target: int
    points: bool = False
    """Whether the method looks by a text query, so that its attention can be scored."""


class SelectionStage:
    """Draws and judges one condition on one batch of references (a Stage of pipeline/units.py)."""

    name = STAGE
    source = None

    def __init__(
        self,
        bench: Sequence[Reference],
        conditions: Sequence[Condition],
        judge: Judge,
        attention: Attention,
        batch_size: int,
        seed: int,
        settings: Mapping[str, Any],
    ) -> None:
        self._bench, self._batch, self._seed = bench, batch_size, seed
        self._conditions = {condition.name: condition for condition in conditions}
        self._judge, self._attention = judge, attention
        self.settings = {**settings, "seed": seed, "batch_size": batch_size}

    def units(self) -> list[str]:
        """Names with the first reference and the one after the last: a longer bench makes only what
        it adds, and a last batch that was short before is another unit.
        """
        firsts = range(0, len(self._bench), self._batch)
        ends = [min(first + self._batch, len(self._bench)) for first in firsts]
        return [
            f"{name}-{first:05d}-{end:05d}"
            for name in self._conditions
            for first, end in zip(firsts, ends, strict=True)
        ]

    def __call__(self, unit: str, storage: Storage, sink: BinaryIO) -> Tally:
        name, start, end = unit.rsplit("-", 2)
        condition, first = self._conditions[name], int(start)
        references = self._bench[first : int(end)]
        requests = [
            benches.request(reference, condition.target, self._seed + first + i)
            for i, reference in enumerate(references)
        ]
        pictures = condition.method(requests)
        rows = self._score(condition, requests, pictures)
        pq.write_table(pa.Table.from_pylist(rows, _SCHEMA), sink)
        return Tally(rows_in=len(rows), kept=len(rows))

    def _score(
        self, condition: Condition, requests: Sequence[Request], pictures: Sequence[Image.Image]
    ) -> list[dict[str, Any]]:
        pixels = np.stack([np.asarray(picture.convert("RGB")) for picture in pictures])
        batch = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
        regions = np.asarray(self._judge.segment(batch).cpu())
        present = np.asarray(self._judge.present(batch).cpu())
        rows = []
        for i, (asked, picture) in enumerate(zip(requests, pictures, strict=True)):
            (chosen,) = asked.selections
            target = world.CLASSES.index(chosen.subject.name)
            others = [world.CLASSES.index(other.name) for other in chosen.others]
            row = {
                "key": chosen.reference.key,
                "condition": condition.name,
                "target": chosen.subject.name,
                "prompt": asked.prompt,
                "seed": asked.seed,
                "target_present": bool(present[i, target]),
                "other_absent": not present[i, others].any(),
                "image": png.encode(picture),
            }
            palettes = [other.palette for other in chosen.others]
            region = regions[i] == target + 1
            row |= scores.colour_scores(pixels[i], region, chosen.subject.palette, palettes)
            row["selected"] = row["target_present"] and row["other_absent"] and row["nearer"]
            if condition.points:
                row |= self._point(chosen)
            rows.append(row)
        return rows

    def _point(self, chosen: benches.Selection) -> dict[str, bool]:
        reference = chosen.reference
        looked = self._attention(reference.image, [chosen.subject.query])[0]
        peak = scores.peak_on(np.asarray(looked), [s.mask for s in reference.subjects])
        return {
            "peak_target": peak == chosen.target,
            "peak_other": peak is not None and peak != chosen.target,
        }


_SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("key", "condition", "target", "prompt")]
    + [("seed", pa.int64())]
    + [(k, pa.float32() if k.startswith("distance") else pa.bool_()) for k in table.MEASURES]
    + [("image", pa.binary())]
)


def run(stage: SelectionStage, storage: Storage, progress: Progress) -> list[dict[str, Any]]:
    """Run what is missing, return every sample's row; samples of other settings are made again."""
    mark = fingerprint(stage, None)
    units = stage.units()
    ledger = Ledger(storage, stage.name)
    done = ledger.check(mark, stage.settings, redo=True)
    ledger.forget_others(mark)
    progress.task("evaluate", len(units), done=sum(unit in done for unit in units))
    rows: list[dict[str, Any]] = []
    for unit in units:
        run_unit(stage, unit, storage, mark)
        if unit not in done:
            progress.advance("evaluate")
        with storage.open_input(f"{stage.name}/{unit}.parquet") as file:
            rows += pq.read_table(file).to_pylist()
    return rows


def tabulate(
    rows: Sequence[Mapping[str, Any]], conditions: Sequence[Condition]
) -> dict[str, dict[str, Any]]:
    """The summary of each condition, by its title, in the conditions' order."""
    return {
        condition.title: table.summarise([r for r in rows if r["condition"] == condition.name])
        for condition in conditions
    }


def picture(
    bench: Sequence[Reference],
    rows: Sequence[Mapping[str, Any]],
    conditions: Sequence[Condition],
    most: int = 12,
) -> Image.Image:
    """The first references beside what every condition drew; with a hit or the reason of a miss."""
    by_place = {(row["condition"], row["key"]): row for row in rows}
    lines = []
    for reference in bench[:most]:
        a, b = reference.subjects[0], reference.subjects[1]
        line = [grid.Cell(reference.image, f"A: {a.query}\nB: {b.query}")]
        for condition in conditions:
            row = by_place[condition.name, reference.key]
            verdict = "hit" if row["selected"] else _why_not(row)
            image = Image.open(io.BytesIO(row["image"]))
            line.append(grid.Cell(image, f"“{row['prompt']}”\n{verdict}", "ab"[condition.target]))
        lines.append(line)
    note = (
        "hit = the judge finds the asked subject and not the other one, and its colours are "
        "nearer to the asked subject's than to the other's"
    )
    titles = ["Reference", *(condition.title for condition in conditions)]
    return grid.draw(titles, lines, "Selection on held-out references", note)


def _why_not(row: Mapping[str, Any]) -> str:
    if not row["target_present"]:
        return f"no {row['target']}"
    return "nearer to the other's colours" if row["other_absent"] else "the other is there too"
