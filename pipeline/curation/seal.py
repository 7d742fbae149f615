"""The end of curation: the manifest that training reads, and the summary that people read.

Both are made from commit markers and one shard's schema alone, so sealing is cheap, can be
repeated at any time, and gives the same manifest for the same shards.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from pipeline.accounts import Account, split_of
from pipeline.errors import UserError
from pipeline.shards import FOLDER, MANIFEST, Manifest, Shard, open_shard, tensor_specs
from pipeline.storage import Storage
from pipeline.units import Ledger, Marker

SUMMARY = "curation.json"
SCORES = "scores"
SCORED = "scores.enabled"
"""In the settings of captions that were made from what the stage of scores kept; named as the
setting of the job is, because a change is told by this name.
"""
STAGES = ("units", "images", "captions", FOLDER)
"""The stages of every run; `stages_of` says where a run has the optional one besides."""
_ENCODERS = ("vision", "vae", "text")


def seal(storage: Storage) -> Manifest:
    """Write `features/manifest.json` and `curation.json`; needs every unit committed.

    Raises:
        UserError: the filter has not run, units are unfinished, or no row is left.
    """
    markers = {stage: Ledger(storage, stage).done() for stage in STAGES}
    stages = stages_of(marker.settings for marker in markers["captions"].values())
    markers |= {stage: Ledger(storage, stage).done() for stage in stages if stage not in markers}
    units = unit_ids(storage, markers["units"])
    missing = [unit for unit in units if unit not in markers[FOLDER]]
    if missing:
        raise UserError(
            f"{storage.url(FOLDER)}: {len(missing)} of {len(units)} units are unfinished "
            f"({missing[0]} ...); run jobs/curate.py again with this root"
        )
    finished = {stage: _of(units, markers[stage]) for stage in stages[1:]}
    write_summary(storage, {"units": list(markers["units"].values()), **finished})
    manifest = _manifest(storage, finished[FOLDER])
    manifest.save(storage)
    return manifest


def unseal(storage: Storage) -> None:
    """Take the manifest away: what is made from now on is not what it lists, until `seal`."""
    storage.delete(MANIFEST)


def stages_of(captions: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
    """The stages of a run, in order: with "scores" where the captions, as the settings in their
    markers say, were made from them.
    """
    scored = any(settings.get(SCORED) for settings in captions)
    return (*STAGES[:2], SCORES, *STAGES[2:]) if scored else STAGES


def unit_ids(storage: Storage, filtered: Mapping[str, Marker]) -> list[str]:
    """The units that the filter and retries made, in their order."""
    units = [unit for marker in filtered.values() for unit in marker.tally.extra["units"]]
    if not units:
        raise UserError(f"{storage.url('units')}: no units yet; run jobs/curate.py with this root")
    return units


def write_summary(storage: Storage, markers: Mapping[str, list[Marker]]) -> dict[str, Any]:
    """Write and return `curation.json`: where every row went, stage by stage.

    Each entry of `stages` has: units, rows_in, kept, dropped {reason: rows}, failed {cause: rows},
    bytes written, seconds of work (summed over workers), rows_per_second (of one worker), and what
    else the report shows (accounts.py). Where failed downloads were retried, "units" and "images"
    have `retried` too: so many rows were given to "images" a second time, and stand in its rows_in
    and failed once for every time, in transient (what a further retry would take) once. `splits`
    counts the kept rows of the last stage.
    """
    accounts = {stage: Account.of(done) for stage, done in markers.items()}
    accounts[STAGES[1]].less_retried(markers[STAGES[0]])
    stages = {stage: account.to_json() for stage, account in accounts.items()}
    splits: Counter[str] = Counter()
    for marker in markers[FOLDER]:
        splits[split_of(marker.unit)] += marker.tally.kept
    summary = {"root": storage.url(), "splits": dict(splits), "stages": stages}
    storage.write_json(SUMMARY, summary)
    return summary


def _of(units: list[str], done: Mapping[str, Marker]) -> list[Marker]:
    return [done[unit] for unit in units if unit in done]


def _manifest(storage: Storage, markers: list[Marker]) -> Manifest:
    from pipeline.curation.fidelity import combined  # torch: seconds that a status does without

    shards = [
        Shard(
            path=f"{FOLDER}/{marker.unit}.parquet",
            split=split_of(marker.unit),
            rows=marker.tally.kept,
            row_groups=marker.tally.extra["row_groups"],
            bytes=marker.bytes,
            sha256=marker.sha256,
        )
        for marker in markers
        if marker.tally.kept
    ]
    if not shards:
        raise UserError(f"{storage.url(FOLDER)}: no row is left; {storage.url(SUMMARY)} says why")
    settings = next(iter(markers)).settings
    with open_shard(storage, shards[0]["path"]) as file:
        tensors = tensor_specs(file.schema_arrow)
    return Manifest(
        shards=shards,
        depths=list(next(iter(markers)).tally.extra["depths"]),
        tensors=tensors,
        encoders={role: settings[role] for role in _ENCODERS},
        codec=settings["codec"],
        codec_error=combined(
            (marker.tally.kept, marker.tally.extra.get("codec_error", {})) for marker in markers
        ),
    )
