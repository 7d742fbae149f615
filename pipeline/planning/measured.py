"""What training measured, and of which models: from its records and the manifest of its features.

No torch here; what jobs/train.py leaves is told in docs/training.md.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.config import PlanConfig
from pipeline.errors import UserError
from pipeline.planning import costs
from pipeline.planning.checked import check_size, json_lines, known_json, mapping, name, number
from pipeline.shards import (
    CLIP_PIXELS,
    LATENT_MEAN,
    MANIFEST,
    Manifest,
    Tensor,
    clip_column,
    row_bytes,
)
from pipeline.storage import Storage

_WAITED = 0.05


@dataclass(frozen=True)
class Shapes:
    """Sealed features: what they are of, and how large."""

    codec: str
    flip: bool
    scales: int
    tensors: int
    """Bytes of a row's tensors."""
    shards: int
    rows: int
    bytes: int
    other: str
    """Why they are not of the models that are planned for; "" where they are."""


def shapes_of(storage: Storage) -> Shapes:
    """The sealed features under a root. Raises UserError for a manifest that is none of ours."""
    where = storage.url(MANIFEST)
    check_size(storage, MANIFEST)
    manifest = Manifest.load(storage)
    try:
        if manifest.codec not in costs.LAYOUTS[:-1]:
            raise ValueError("an unknown codec")
        tensors = {
            column: Tensor(column, tuple(int(n) for n in spec["shape"]), str(spec["dtype"]))
            for column, spec in manifest.tensors.items()
        }
        size = row_bytes(manifest, list(tensors))
        depths = [int(depth) for depth in manifest.depths]
        rows = sum(int(number(s["rows"], f"{where}: rows", True)) for s in manifest.shards)
        stored = sum(int(number(s["bytes"], f"{where}: bytes", True)) for s in manifest.shards)
        other, flip = _other(manifest.codec, tensors, depths), manifest.flipped
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError):
        raise UserError(
            f"{where} is not what sealing writes; run jobs/curate.py again, which seals anew, or "
            "give another root"
        ) from None
    return Shapes(
        manifest.codec, flip, len(depths), size, len(manifest.shards), rows, stored,
        other,
    )  # fmt: skip


def _other(codec: str, tensors: Mapping[str, Tensor], depths: list[int]) -> str:
    """Why these are not Stable Diffusion 1.5's latents and CLIP ViT-L/14's states."""
    wanted: dict[str, tuple[int, ...]] = {LATENT_MEAN: costs.LATENT}
    if codec == "pixels":
        wanted[CLIP_PIXELS] = costs.PIXELS
    else:
        wanted |= {clip_column(depth): costs.STATES for depth in depths}
    for column, shape in wanted.items():
        there = tensors[column].shape
        if there != shape:
            return (
                f"its models are not those that are planned for: {column} is "
                f"{'x'.join(map(str, there))}, planned is {'x'.join(map(str, shape))}"
            )
    return ""


@dataclass
class Trained:
    """What training measured."""

    seen: bool = False
    """Whether there are records at all."""
    utilisation: float = 0.0
    told: str = ""
    """What it was measured over."""
    why: str = ""
    """Why nothing was measured; "" where something was."""
    notes: list[str] = field(default_factory=list)


@dataclass
class _Stage:
    gflop: float
    pace: float
    """Samples/s of a GPU that waits for nothing."""
    samples: float
    waited: float
    records: int
    share: float
    """Samples of a step on each GPU; 0 = not known."""
    attempt: Mapping[str, Any]


def trained(storage: Storage, cfg: PlanConfig, shapes: Shapes | None) -> Trained:
    """The share of the peak that training's steps reached, over its stages."""
    found = Trained()
    stages = {"semantic": 1, "multi_scale": shapes.scales if shapes else 1}
    read = {stage: _records(storage, stage) for stage in stages}
    found.seen = any(records for records, _ in read.values())
    if not found.seen:
        found.why = "no record of training"
        return found
    if shapes is None or shapes.other:
        found.why = shapes.other if shapes else "no sealed features beside it tell of its models"
        return found
    measured = []
    for stage, (records, attempt) in read.items():
        if records and attempt is not None:
            measured.append(_measure(storage, stage, records, attempt, shapes, stages[stage]))
    kinds = {name(one.attempt.get("kind")) for one in measured}
    devices = {name(one.attempt.get("device")) for one in measured}
    if not measured or kinds != {"cuda"}:
        found.why = f"it trained on {', '.join(sorted(kinds)) or 'nothing known'}, not on GPUs"
        return found
    device = sorted(devices)[0]
    peak = cfg.peak_tflops or costs.peak_tflops(device)
    if peak is None or len(devices) > 1:
        found.why = f"the peak of {', '.join(sorted(devices))} is not known; say --peak_tflops"
        return found
    work = sum(one.samples * one.gflop for one in measured)
    seconds = sum(one.samples / one.pace for one in measured)
    found.utilisation = work / seconds / 1e3 / peak
    told, rate = sum(one.records for one in measured), measured[-1].pace
    found.told = f"{told:,} records of training, {rate:,.1f} samples/s a GPU ({device})"
    if peak != (cfg.peak_tflops or costs.PEAK_TFLOPS[cfg.gpu]):
        found.notes.append(
            f"warning: it trained on {device}, planned is {cfg.gpu}: the share of the peak of one "
            "kind need not be that of another"
        )
    if odd := _batches(measured, cfg.global_batch / cfg.gpus):
        found.notes.append(odd)
    if (waited := max(one.waited for one in measured)) > _WAITED:
        found.notes.append(
            f"warning: its steps waited for data {waited:.0%} of the time, which the figure leaves "
            "out; see what saturates"
        )
    return found


def _batches(measured: list[_Stage], planned: float) -> str:
    """A warning where GPUs had other shares of a batch: fewer samples reach less of the peak."""
    there = sorted({one.share for one in measured if one.share and one.share != planned})
    if not there:
        return ""
    return (
        f"warning: its GPUs had {there[0]:g} samples a step each, planned are {planned:g}: the "
        "share of the peak depends on it"
    )


def _records(
    storage: Storage, stage: str
) -> tuple[list[Mapping[str, Any]], Mapping[str, Any] | None]:
    """The records of a stage's newest attempt that have a pace, and the attempt."""
    folder = f"train/{stage}"
    records = [r for r in json_lines(storage, f"{folder}/metrics.jsonl") if "samples_per_s" in r]
    attempts = sorted(path for path in storage.list(f"{folder}/attempts") if path[-5:] == ".json")
    if not records or not attempts:
        return [], None
    where = storage.url(attempts[-1])
    attempt = mapping(known_json(storage, attempts[-1]), where)
    start = number(attempt.get("start"), f"{where}: start", whole=True)
    path = storage.url(f"{folder}/metrics.jsonl")
    mine = [r for r in records if number(r.get("step"), f"{path}: step", whole=True) > start]
    return (mine[1:] or mine), attempt  # the first has the start-up in it


def _measure(
    storage: Storage,
    stage: str,
    records: list[Mapping[str, Any]],
    attempt: Mapping[str, Any],
    shapes: Shapes,
    scales: int,
) -> _Stage:
    where = storage.url(f"train/{stage}/metrics.jsonl")
    settings = mapping(attempt.get("settings"), f"{where}: settings of its attempt")
    workers = number(attempt.get("workers"), f"{where}: workers of its attempt", True)
    queries = number(settings.get("queries", 1), f"{where}: queries", True)
    batch = number(settings.get("global_batch", 0), f"{where}: global_batch", True)
    rates = [number(r["samples_per_s"], f"{where}: samples_per_s") for r in records]
    waits = [number(r.get("data_wait", 0), f"{where}: data_wait", most=1) for r in records]
    rate, waited = statistics.median(rates), statistics.median(waits)
    if not workers or not rate or waited >= 1:
        raise UserError(f"{where}: no pace in it ({rate:g} samples/s); give another root")
    return _Stage(
        costs.step_gflop(shapes.codec, scales, int(queries)), rate / (1 - waited) / workers,
        sum(rates), waited, len(records), batch / workers, attempt,
    )  # fmt: skip
