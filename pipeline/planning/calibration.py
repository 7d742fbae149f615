"""Assumptions of a plan replaced by what a short run measured, as its root tells of it.

Read are the commit markers of curation, the manifest of its features, and the records of training.
What depends on the models is taken only from a run of those that are planned for. Whoever wrote the
root may be an enemy: a figure that is none ends in one line.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from pipeline.accounts import is_retry
from pipeline.config import PlanConfig
from pipeline.errors import UserError
from pipeline.planning import costs
from pipeline.planning.checked import mapping, name, number
from pipeline.planning.measured import Shapes, shapes_of, trained
from pipeline.shards import MANIFEST
from pipeline.storage import Storage
from pipeline.units import Ledger, Marker

_MOST_MARKERS = 2000
"""Read of a stage, spread over all of it."""
_FEW = 3
"""Units; of fewer the figures are of chance."""
_DEFAULT = PlanConfig()


@dataclass
class Calibration:
    """Settings with what was measured, and what is to be said of it."""

    cfg: PlanConfig
    measured: dict[str, str] = field(default_factory=dict)
    """Setting -> where it was measured."""
    notes: list[str] = field(default_factory=list)

    def take(self, setting: str, value: float, source: str) -> None:
        """A measured value; one that the user has set stays."""
        mine = getattr(self.cfg, setting)
        if mine != getattr(_DEFAULT, setting):
            self.notes.append(f"{setting}: {mine:g} as you set it; measured was {value:.4g}")
            return
        try:
            given: dict[str, Any] = {setting: value}
            self.cfg = replace(self.cfg, **given)
        except UserError as error:
            self.left([setting], f"measured was {value:.4g} ({error})")
            return
        self.measured[setting] = source
        self.notes.append(f"{setting}: {value:.4g} instead of {mine:.4g}, {source}")

    def left(self, settings: list[str], why: str) -> None:
        """What could not be measured, and why."""
        self.notes.append(f"not calibrated: {', '.join(settings)}: {why}")


def calibrated(cfg: PlanConfig) -> Calibration:
    """The settings, with what the run at `cfg.calibrate` measured; as they are where that is none.

    Raises UserError where there is no run, or its files are not what our jobs write.
    """
    found = Calibration(cfg)
    if cfg.calibrate is None:
        return found
    storage = Storage(cfg.calibrate)
    try:
        _read(storage, found)
    except RecursionError:
        raise UserError(
            f"{storage.url()}: a file there is nested without end, which none of ours is; give "
            "another root"
        ) from None
    if not found.measured and not found.notes:
        raise UserError(
            f"{storage.url()}: nothing was measured there; give the root of a run of "
            "jobs/curate.py or jobs/train.py"
        )
    scanned = ["scan_rows_per_core_s", "redirects", "tries_again", "decodes_per_core_s"]
    found.left(scanned, "markers do not tell of them")
    return found


def _read(storage: Storage, found: Calibration) -> None:
    manifest = storage.exists(MANIFEST)
    shapes = shapes_of(storage) if manifest else None
    stages = {stage: _totals(storage, stage) for stage in ("images", "captions", "features")}
    attempts = trained(storage, found.cfg, shapes)
    if not any(stages.values()) and not attempts.seen:
        return
    _downloads(found, stages["images"])
    _captions(found, stages["captions"])
    _features(found, stages["features"], shapes)
    _rows(found, shapes, storage)
    if attempts.why:
        found.left(["utilisation"], attempts.why)
    else:
        source = f"calibrated from {storage.url()}: {attempts.told}"
        found.take("utilisation", attempts.utilisation, source)
    found.notes += attempts.notes


@dataclass
class _Totals:
    """The units of a stage, added up."""

    source: str = ""
    units: int = 0
    rows_in: int = 0
    kept: int = 0
    bytes: int = 0
    seconds: float = 0.0
    fetched: int = 0
    """Bytes from the web."""
    hosts: int = 0
    settings: dict[str, object] = field(default_factory=dict)

    def add(self, marker: Marker, where: str) -> None:
        """Count a unit. Raises UserError for figures that are none."""
        tally, extra = marker.tally, mapping(marker.tally.extra, f"{where}: extra")
        rows = number(tally.rows_in, f"{where}: rows_in", whole=True)
        kept = number(tally.kept, f"{where}: kept", whole=True, most=rows)
        self.units, self.rows_in = self.units + 1, self.rows_in + int(rows)
        self.kept += int(kept)
        self.bytes += int(number(marker.bytes, f"{where}: bytes", whole=True))
        self.seconds += number(marker.seconds, f"{where}: seconds")
        self.fetched += int(number(extra.get("bytes", 0), f"{where}: bytes fetched", whole=True))
        self.hosts += int(number(extra.get("host_count", 0), f"{where}: hosts", whole=True))
        self.settings = self.settings or dict(mapping(marker.settings, f"{where}: settings"))


def _totals(storage: Storage, stage: str) -> _Totals | None:
    """The units of a stage that are committed; None where there is none."""
    ledger, totals = Ledger(storage, stage), _Totals()
    ledger.look()
    units = [unit for unit in sorted(ledger.units) if not is_retry(unit)]
    some = units[:: -(-len(units) // _MOST_MARKERS) or 1]
    try:
        for marker in ledger.some(some, alike=True):
            totals.add(marker, storage.url(ledger.path(name(marker.unit))))
    except TypeError as error:  # of a fingerprint that is a list, say
        raise UserError(
            f"{storage.url(f'{stage}/_done')}: a marker there is none of ours ({error}); give "
            "another root"
        ) from None
    if not totals.units:
        return None
    units_read = f"{totals.units:,} unit{'s' * (totals.units != 1)} of {stage}"
    totals.source = f"calibrated from {storage.url()}: {units_read}"
    return totals


# --- curation ---


def _downloads(found: Calibration, totals: _Totals | None) -> None:
    of_size = ["fetched_kb", "stored_kb", "downloads_per_core_s"]
    every = ["answering", "hosts_per_link", *of_size]
    if totals is None:
        return found.left(every, "no unit of images")
    if not totals.kept or not totals.seconds:
        return found.left(every, "no image was kept")
    if (size := totals.settings.get("image_size")) != costs.IMAGE_SIZE:
        why = f"its images have {size} pixels, {costs.IMAGE_SIZE} are planned"
        return found.left(every, f"{why}: another web, other decoding")
    if not totals.hosts or not totals.fetched:
        return found.left(every, "its images came from a folder, not from the web")
    found.take("answering", totals.kept / totals.rows_in, totals.source)
    found.take("hosts_per_link", totals.hosts / totals.rows_in, totals.source)
    found.take("fetched_kb", totals.fetched / totals.kept / 1e3, totals.source)
    found.take("stored_kb", totals.bytes / totals.kept / 1e3, totals.source)
    # seconds of a worker, which is a core; it waits for the web too, and is held meanwhile
    found.take("downloads_per_core_s", totals.kept / totals.seconds, totals.source)
    _warn_of_few(found, totals)


def _captions(found: Calibration, totals: _Totals | None) -> None:
    if totals is None or not totals.kept or not totals.seconds:
        return found.left(["captions_per_s", "caption_bytes"], "no unit of captions")
    model = totals.settings.get("model")
    model = model.get("name") if isinstance(model, dict) else model
    kind = totals.settings.get("type")
    made_by = " ".join(name(part) for part in (model, kind) if part) or "no model"
    wanted = found.cfg.captioner
    # LAVIS has names of its own for the same model
    same = wanted in made_by.lower() or ("opt2.7b" in made_by and wanted == _DEFAULT.captioner)
    if same:
        found.take("captions_per_s", totals.rows_in / totals.seconds, totals.source)
        found.take("caption_bytes", totals.bytes / totals.kept, totals.source)
        found.notes.append("captions_per_s: a worker is taken for a GPU")
        _warn_of_few(found, totals)
    else:
        why = f"captions are of {made_by}, planned is {wanted} (--captioner)"
        found.left(["captions_per_s", "caption_bytes"], why)


def _features(found: Calibration, totals: _Totals | None, shapes: Shapes | None) -> None:
    if totals is None or not totals.kept or not totals.seconds:
        return found.left(["encoder_tflops"], "no unit of features")
    if shapes is None:
        return found.left(["encoder_tflops"], "features are not sealed, so their models not known")
    if shapes.other:
        return found.left(["encoder_tflops"], shapes.other)
    gflop = costs.feature_gflop(shapes.codec, shapes.flip)
    rate = totals.kept / totals.seconds
    found.take("encoder_tflops", rate * gflop / 1e3, f"{totals.source}, {rate:,.1f} images/s")
    found.notes.append("encoder_tflops: a worker is taken for a GPU")
    _warn_of_few(found, totals)


def _rows(found: Calibration, shapes: Shapes | None, storage: Storage) -> None:
    """What a row has besides its tensors: the same for all models."""
    if shapes is None or not shapes.rows:
        return found.left(["overhead_bytes"], "no sealed shard")
    source = f"calibrated from {storage.url()}: {shapes.shards:,} shards"
    found.take("overhead_bytes", max(0.0, shapes.bytes / shapes.rows - shapes.tensors), source)


def _warn_of_few(found: Calibration, totals: _Totals) -> None:
    if totals.units < _FEW:
        found.notes.append(f"warning: {totals.source}: so few say little; run some more")
