"""Scores of drawn pictures: the stage of units after drawing.

So a metric that is added, or another backbone, scores the pictures that are there and draws none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipeline import models
from pipeline.config import LookConfig
from pipeline.errors import UserError
from pipeline.evaluation.benches import Bench, Request
from pipeline.evaluation.drawing import ASKED, picture_of, read_pictures, requests_of
from pipeline.evaluation.exact import ExactScorer
from pipeline.evaluation.judging import JUDGE, JudgeSegmenter, check_classes
from pipeline.evaluation.results import Measure
from pipeline.miniworld.judge import PRESENT_PIXELS
from pipeline.storage import Storage
from pipeline.units import Tally
from ssr_model.metrics.segmenting import TEXT, THRESHOLD

if TYPE_CHECKING:
    import torch

MOST_PIXELS = 1 << 25
"""Of a batch of pictures in memory, as 3 bytes each; a unit of 512 x 512 is one."""
LOOKED_FOR, NOT_FOUND = "looked_for", "not_found"
"""Columns of DINO-M: how many subjects of a picture were looked for, and how many of them were not
found and count as 0."""
_DIGITS = 3


class MetricScorer:
    """The metrics of ssr_model.metrics whose backbones the settings name."""

    def __init__(self, look: LookConfig, device: str) -> None:
        from ssr_model.metrics import METRICS

        self.look, self.device = look, device
        kinds = {kind for kind in ("clip", "dino", "aesthetic") if getattr(look, kind)}
        self.metrics = [
            metric
            for metric in METRICS.values()
            if metric.backbone in kinds and not (metric.needs_masks and not look.segmenter)
        ]
        self.measures = tuple(
            Measure(metric.name, metric.title, metric.better, _DIGITS) for metric in self.metrics
        )
        self.settings = {
            "formulas": {metric.name: metric.formula for metric in self.metrics},
            **{kind: self._identity(kind) for kind in sorted(kinds)},
        }
        if look.segmenter and any(metric.needs_masks for metric in self.metrics):
            found_by = self._identity("segmenter")
            how: dict[str, Any] = {"present_pixels": PRESENT_PIXELS}
            if look.segmenter != JUDGE:
                how = {"text": TEXT, "threshold": THRESHOLD}
            self.settings["segmenter"] = {**found_by, **how}
        self._backbones: dict[Any, Any] = {}
        self._segmenter: Any = None
        self.described: dict[str, Any] = {}
        """What looked, by metric: name, hash, preprocessing. Known once something was scored."""

    def _identity(self, kind: str) -> Any:
        look = self.look
        try:
            if kind != "aesthetic":
                return models.identity(getattr(look, kind), "", look.revision)
            predictor = models.file_sha256(str(look.aesthetic))
            clip = models.identity(look.aesthetic_clip, "", look.revision)
        except UserError as error:
            raise UserError(f"look.{kind}: {error}") from None
        return {"predictor": predictor, "clip": clip}

    def check(self, bench: Bench) -> None:
        """Refuse what cannot look at the bench's pictures: all is loaded, and let go again, for
        workers are sent the scorer without its models; on the CPU, for a GPU is theirs.
        """
        if self.look.segmenter == JUDGE and any(metric.needs_masks for metric in self.metrics):
            asked = [outline for outline in bench.outlines() if outline.masked]
            check_classes(subject.name for outline in asked for subject in outline.subjects)
        self._load("cpu")
        self._backbones, self._segmenter = {}, None

    def open(self) -> None:
        if self.metrics and not self._backbones:
            self._load(models.device(self.device))

    def _load(self, where: torch.device | str) -> None:
        from ssr_model.metrics import AestheticScorer, load_clip, load_dino

        look = self.look
        loaders = {"clip": load_clip, "dino": load_dino}
        try:
            for kind in {metric.backbone for metric in self.metrics}:
                if kind == "aesthetic":
                    name = look.aesthetic_clip
                    clip = load_clip(models.resolve(name), look.revision, name).to(where)
                    made: Any = AestheticScorer.load(str(look.aesthetic), clip)
                else:
                    name = getattr(look, kind)
                    made = loaders[kind](models.resolve(name), look.revision, name).to(where)
                self._backbones[kind] = made
        except ValueError as error:
            raise UserError(f"look.{kind}: {' '.join(str(error).split())}") from None
        if "segmenter" in self.settings:
            self._segmenter = _segmenter(look, where)

    def __call__(
        self,
        requests: Sequence[Request],
        pictures: Sequence[Image.Image],
        attentions: Sequence[Any],
    ) -> list[dict[str, float | None]]:
        """For each picture its metrics, without those that the bench has not what they need for;
        where DINO-M was measured, LOOKED_FOR and NOT_FOUND too.
        """
        from ssr_model.metrics import SampleError, measure

        samples = [r.sample(p) for r, p in zip(requests, pictures, strict=True)]
        rows: list[dict[str, float | None]] = [{} for _ in samples]
        for able, names in self._groups(samples).items():
            try:
                some = [samples[i] for i in able]
                found = measure(names, some, self._backbones, self._segmenter)
            except SampleError as error:
                key = requests[able[error.number]].key
                raise UserError(" ".join(f"{key}{error.fault}".split())) from None
            except ValueError as error:
                raise UserError(" ".join(str(error).split())) from None
            for name, scores in found.items():
                self.described[name] = scores.backbone
                for i, value in zip(able, scores.values, strict=True):
                    rows[i][name] = float(value)
                if scores.missing is not None:
                    for i, missing, parts in zip(able, scores.missing, scores.parts, strict=True):
                        rows[i] |= {LOOKED_FOR: len(parts), NOT_FOUND: int(missing)}
        return rows

    def _groups(self, samples: Sequence[Any]) -> dict[tuple[int, ...], list[str]]:
        """Metrics by the samples that have what they need: those of a group share embeddings."""
        groups: dict[tuple[int, ...], list[str]] = {}
        for metric in self.metrics:
            needs = metric.needs - {"text"}  # every request has one
            able = (i for i, s in enumerate(samples) if all(len(getattr(s, n)) for n in needs))
            groups.setdefault(tuple(able), []).append(metric.name)
        groups.pop((), None)
        return groups


def _segmenter(look: LookConfig, where: Any) -> Any:
    if look.segmenter == JUDGE:
        return JudgeSegmenter.load()
    from ssr_model.metrics import load_clipseg

    assert look.segmenter is not None
    try:
        name = look.segmenter
        return load_clipseg(models.resolve(name), look.revision, name).to(where)
    except ValueError as error:
        raise UserError(f"look.segmenter: {' '.join(str(error).split())}") from None


class ScoresStage:
    """Scores a unit's pictures (a Stage of pipeline/units.py)."""

    def __init__(
        self,
        bench: Bench,
        method: str,
        folder: str,
        scorers: Sequence[MetricScorer | ExactScorer],
    ) -> None:
        self.name, self.source = f"{folder}/scores/{method}", f"{folder}/pictures/{method}"
        self._bench, self._method, self._folder = bench, method, folder
        self._scorers = list(scorers)
        self.settings: dict[str, Any] = {}
        for scorer in self._scorers:
            self.settings |= scorer.settings

    def open(self) -> None:
        for scorer in self._scorers:
            scorer.open()

    def __call__(self, unit: str, storage: Storage, sink: BinaryIO) -> Tally:
        requests = requests_of(self._bench, unit)
        rows = read_pictures(storage, self._folder, self._method, unit)
        if [row["key"] for row in rows] != [request.key for request in requests]:
            raise UserError(
                f"{storage.url(f'{self.source}/{unit}.parquet')} holds pictures of other requests "
                "than the bench has; delete its folder and run again"
            )
        for some, pictures in _batches(rows):
            attentions = [_array(row["attention"]) for row in rows[some]]
            for scorer in self._scorers:
                found = scorer(requests[some], pictures, attentions)
                for row, scores in zip(rows[some], found, strict=True):
                    row.update(scores)
        pq.write_table(pa.Table.from_pylist(rows, score_schema(self._scorers)), sink)
        looked: Mapping[str, Any] = {}
        for scorer in self._scorers:
            looked = {**looked, **getattr(scorer, "described", {})}
        return Tally(rows_in=len(rows), kept=len(rows), extra={"backbones": dict(looked)})


def score_schema(scorers: Sequence[MetricScorer | ExactScorer]) -> pa.Schema:
    """What was asked, what was found of it, and a column for each measure; null where one is not
    defined."""
    found = [pa.field(LOOKED_FOR, pa.int64()), pa.field(NOT_FOUND, pa.int64())]
    values = [pa.field(m.name, pa.float64()) for m in measures_of(scorers)]
    return pa.schema([*ASKED, *found, *values])


def measures_of(scorers: Sequence[MetricScorer | ExactScorer]) -> list[Measure]:
    """All measures, in the order of tables."""
    return [measure for scorer in scorers for measure in scorer.measures]


def _batches(rows: Sequence[dict[str, Any]]) -> Iterator[tuple[slice, list[Image.Image]]]:
    """Spans of rows with their pictures, which the rows lose; a span ends with the picture that
    reaches MOST_PIXELS.
    """
    start, pixels = 0, 0
    pictures: list[Image.Image] = []
    for stop, row in enumerate(rows, 1):
        picture = picture_of(row)
        del row["image"]
        pictures.append(picture)
        pixels += picture.width * picture.height
        if pixels >= MOST_PIXELS or stop == len(rows):
            yield slice(start, stop), pictures
            start, pixels, pictures = stop, 0, []


def _array(rows: list[list[float]] | None) -> Any:
    return None if rows is None else np.asarray(rows, np.float32)
