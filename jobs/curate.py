"""Web metadata -> sealed feature shards: filter, download, caption, features, seal.

python jobs/curate.py                                       # the mini world, on this machine
python jobs/curate.py --preset laion-sd15 --filter.inputs s3://bucket/metadata --root s3://bucket/run
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import partial

from pipeline import report
from pipeline.cluster import connect
from pipeline.config import CurateConfig, parse
from pipeline.curation import retry
from pipeline.curation.caption import CaptionStage
from pipeline.curation.download import Download
from pipeline.curation.features import FeaturesStage
from pipeline.curation.metadata import UNIT, Filter
from pipeline.curation.seal import seal
from pipeline.errors import run
from pipeline.miniworld import website
from pipeline.progress import Progress, quiet_libraries, say
from pipeline.runner import StageSpec, check_stages, run_stages
from pipeline.storage import Storage
from pipeline.units import Ledger, Marker, fingerprint, run_unit


def main() -> None:
    cfg = parse(CurateConfig)
    quiet_libraries()
    storage = Storage(cfg.root)
    storage.check_writable()
    with contextlib.ExitStack() as stack:
        if cfg.website.enabled:
            site = stack.enter_context(website.ensure(cfg.website, storage))
            cfg.filter.inputs = cfg.filter.inputs or [site.metadata]
            cfg.download.allow_private_hosts.append(site.host)
        filtered, ledgers = select(cfg, storage)
        units = retry.units(storage, filtered, Download(cfg.download), cfg.retry_failed, ledgers[0])
        run_stages(
            stages(cfg),
            units,
            storage,
            stack.enter_context(Progress()),
            upstream=filtered.fingerprint,
            redo=cfg.redo,
            connection=connect(
                cfg.ray, [cfg.download_workers, cfg.caption_workers, cfg.features_workers]
            ),
            ledgers=ledgers,
        )
    manifest = seal(storage)
    say(f"features: {storage.url('features')} ({manifest.size()})")
    say(f"report:   {report.build(storage)}")
    say(f"next:     python jobs/train.py --root {cfg.root}")


def select(cfg: CurateConfig, storage: Storage) -> tuple[Marker, Sequence[Ledger]]:
    """Run the filter, or find what it did before: its marker, which lists the units, and the
    ledgers of the stages after it.
    """
    stage = Filter(cfg.filter)
    mark = fingerprint(stage, None)
    ledger = Ledger(storage, stage.name)
    ledger.check(mark, stage.settings, stage.name in cfg.redo)
    ledgers, _ = check_stages(stages(cfg), storage, mark, cfg.redo)  # before units are replaced
    ledger.forget_others(mark)
    marker = run_unit(stage, UNIT, storage, mark)
    tally = marker.tally
    reasons = ", ".join(f"{reason} {rows:,}" for reason, rows in tally.dropped.items())
    say(f"filter:   kept {tally.kept:,} of {tally.rows_in:,} rows (dropped: {reasons or 'none'})")
    return marker, ledgers


def stages(cfg: CurateConfig) -> list[StageSpec]:
    """The stages that Ray Data streams units through, each in workers of its own."""
    caption = partial(CaptionStage, cfg.caption, cfg.models, cfg.device)
    features = partial(FeaturesStage, cfg.features, cfg.models, cfg.download.image_size, cfg.device)
    return [
        StageSpec("images", partial(Download, cfg.download), cfg.download_workers),
        StageSpec("captions", caption, cfg.caption_workers),
        StageSpec("features", features, cfg.features_workers),
    ]


if __name__ == "__main__":
    run(main)
