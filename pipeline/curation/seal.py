"""The end of curation: the manifest that training reads, and the summary that people read.

Both are made from commit markers and one shard's schema alone, so sealing is cheap, can be
repeated at any time, and gives the same manifest for the same shards.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
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
    dealt = Ledger(storage, STAGES[0]).done()
    units = unit_ids(storage, dealt)
    features = Ledger(storage, FOLDER)
    features.look()
    missing = [unit for unit in units if unit not in features.units]
    if missing:
        raise UserError(
            f"{storage.url(FOLDER)}: {len(missing)} of {len(units)} units are unfinished "
            f"({missing[0]} ...); run jobs/curate.py again with this root"
        )
    accounts = {STAGES[0]: Account.of(dealt.values())}
    for stage in STAGES[1:-1]:
        accounts[stage] = Account.of(_markers(Ledger(storage, stage), units))
    stages = stages_of([accounts["captions"].settings])
    if SCORES in stages:
        accounts[SCORES] = Account.of(_markers(Ledger(storage, SCORES), units))
    accounts[FOLDER] = Account()
    manifest = _manifest(storage, features.some(units, alike=True), accounts[FOLDER])
    accounts[STAGES[1]].less_retried(dealt.values())
    write_summary(storage, {stage: accounts[stage] for stage in stages})
    if not manifest.shards:
        raise UserError(f"{storage.url(FOLDER)}: no row is left; {storage.url(SUMMARY)} says why")
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


def write_summary(storage: Storage, accounts: Mapping[str, Account]) -> dict[str, Any]:
    """Write and return `curation.json`: where every row went, stage by stage.

    Each entry of `stages` has: units, rows_in, kept, dropped {reason: rows}, failed {cause: rows},
    bytes written, seconds of work (summed over workers), rows_per_second (of one worker), and what
    else the report shows (accounts.py). Where failed downloads were retried, "units" and "images"
    have `retried` too: so many rows were given to "images" a second time, and stand in its rows_in
    and failed once for every time, in transient (what a further retry would take) once. `splits`
    counts the kept rows of the last stage.
    """
    stages = {stage: account.to_json() for stage, account in accounts.items()}
    splits = dict(accounts[FOLDER].splits)
    summary = {"root": storage.url(), "splits": splits, "stages": stages}
    storage.write_json(SUMMARY, summary)
    return summary


def _markers(ledger: Ledger, units: Iterable[str]) -> Iterator[Marker]:
    """The markers of those of `units` that are committed."""
    ledger.look()
    return ledger.some((unit for unit in units if unit in ledger.units), alike=True)


def _manifest(storage: Storage, markers: Iterable[Marker], account: Account) -> Manifest:
    """The manifest of these units of features, which are added to `account` on the way: of very
    many units no more than the shards' lines are kept.
    """
    from pipeline.curation.fidelity import combined  # torch: seconds that a status does without

    shards: list[Shard] = []
    settings: dict[str, Any] = {}
    depths: list[int] = []

    def parts() -> Iterator[tuple[int, dict[str, Any]]]:
        for marker in markers:
            account.add(marker)
            tally = marker.tally
            settings.update(marker.settings)
            depths[:] = tally.extra["depths"]
            yield tally.kept, tally.extra.get("codec_error", {})
            if tally.kept:
                shard = Shard(
                    path=f"{FOLDER}/{marker.unit}.parquet",
                    split=split_of(marker.unit),
                    rows=tally.kept,
                    row_groups=tally.extra["row_groups"],
                    bytes=marker.bytes,
                    sha256=marker.sha256,
                )
                shards.append(shard)

    codec_error = combined(parts())
    tensors = {}
    if shards:
        with open_shard(storage, shards[0]["path"]) as file:
            tensors = tensor_specs(file.schema_arrow)
    return Manifest(
        shards=shards,
        depths=depths,
        tensors=tensors,
        encoders={role: settings[role] for role in _ENCODERS},
        codec=settings["codec"],
        codec_error=codec_error,
    )
