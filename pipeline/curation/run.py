"""A curation, whole: the filter (or images of one's own), every stage over its units, the seal."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from pipeline import lease, ray_metrics
from pipeline.cluster import connect, private
from pipeline.config import CurateConfig
from pipeline.curation.aesthetic import ScoresStage
from pipeline.curation.captioning.caption import CaptionStage, interpreter
from pipeline.curation.captioning.caption_given import GivenCaptionStage
from pipeline.curation.downloading import retry
from pipeline.curation.downloading.download import Download
from pipeline.curation.downloading.mini_web import MiniWebImages
from pipeline.curation.features import FeaturesStage
from pipeline.curation.filtering.metadata import UNIT, Filter
from pipeline.curation.folder.images import FolderImages
from pipeline.curation.folder.units import FolderUnits
from pipeline.curation.seal import seal, unseal
from pipeline.curation.webdataset.images import TarImages
from pipeline.curation.webdataset.units import TarUnits
from pipeline.errors import UserError
from pipeline.miniworld import website
from pipeline.progress import Progress, say
from pipeline.runner import StageSpec, check_stages, run_stages
from pipeline.shards import Manifest
from pipeline.storage import Storage
from pipeline.tasks import spread
from pipeline.units import Ledger, Marker, Stage, fingerprint, run_unit


def curate(cfg: CurateConfig, storage: Storage) -> Manifest:
    """Do what is missing under `storage`, and seal it. Raises UserError for what the user can mend;
    what is finished is kept.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(lease.held(storage))
        if cfg.website.enabled and not cfg.own_images:
            site = stack.enter_context(website.ensure(cfg.website, storage))
            cfg.filter.inputs = cfg.filter.inputs or [site.metadata]
            cfg.download.allow_private_hosts.append(site.host)
        progress = stack.enter_context(Progress())
        connected = partial(stack.enter_context, _connection(cfg))
        filtered, ledgers = select(cfg, storage, progress, connected)
        images = _images(cfg)()
        units = retry.units(storage, filtered, images, cfg.retry_failed, ledgers)
        if any(unit not in ledger.units for ledger in ledgers for unit in units):
            unseal(storage)
        run_stages(
            stages(cfg),
            units,
            storage,
            progress,
            upstream=filtered.fingerprint,
            redo=cfg.redo,
            connection=_driven(cfg, storage),
            ledgers=ledgers,
            patience_s=0.0 if private(cfg.ray) else cfg.wait_minutes * 60,
        )
        return seal(storage)


def select(
    cfg: CurateConfig, storage: Storage, progress: Progress, connected: Callable[[], object]
) -> tuple[Marker, Sequence[Ledger]]:
    """Run the filter, or find what it did before: its marker, which lists the units, and the
    ledgers of the stages after it. `connected` connects to Ray; called only if there is work.
    """
    stage = _units(cfg, storage, progress)
    mark = fingerprint(stage, None)
    ledger = Ledger(storage, stage.name)
    ledger.check(mark, stage.settings, stage.name in cfg.redo)
    # all stages before units are replaced
    ledgers, _ = check_stages(stages(cfg), storage, mark, cfg.redo)
    done = ledger.get(UNIT)
    if done is None or done.fingerprint != mark:
        stage.look()  # all that can be refused is, before what was made is forgotten
        connected()
    if any(each.stale for each in (ledger, *ledgers)):
        unseal(storage)
    ledger.forget_others(mark)
    marker = run_unit(stage, UNIT, storage, mark)
    stage.clear(storage)
    tally = marker.tally
    reasons = ", ".join(f"{reason} {rows:,}" for reason, rows in tally.dropped.items())
    say(f"filter:   kept {tally.kept:,} of {tally.rows_in:,} rows (dropped: {reasons or 'none'})")
    return marker, ledgers


def _units(
    cfg: CurateConfig, storage: Storage, progress: Progress
) -> Filter | FolderUnits | TarUnits:
    """Where rows come from: a folder, tars, or metadata."""
    captioned = cfg.caption.backend == "given"
    if cfg.webdataset.inputs:
        return TarUnits(cfg.webdataset, cfg.filter, captioned, storage, progress)
    if cfg.folder.path is None:
        return Filter(cfg.filter, spread=partial(spread, progress=progress))
    folder = Storage(cfg.folder.path)
    if f"{storage.url()}/".startswith(f"{folder.url()}/"):
        raise UserError(
            f"root {storage.url()} lies in folder.path {folder.url()}, among the images; choose "
            "another root"
        )
    return FolderUnits(cfg.folder.path, cfg.filter, captioned, cfg.folder.captions)


def _images(cfg: CurateConfig) -> Callable[[], Download]:
    if cfg.webdataset.inputs:
        return partial(TarImages, cfg.webdataset, cfg.download)
    if cfg.folder.path is not None:
        return partial(FolderImages, cfg.folder.path, cfg.download)
    if cfg.website.enabled:
        return partial(MiniWebImages, cfg.website.port, cfg.download)
    return partial(Download, cfg.download)


def stages(cfg: CurateConfig) -> list[StageSpec]:
    """The stages that Ray Data streams units through, each in workers of its own."""
    names, device, scored = cfg.models, cfg.device, cfg.scores.enabled
    score = partial(ScoresStage, cfg.scores, names, device)
    source = "scores" if scored else "images"
    caption: Callable[[], Stage] = partial(CaptionStage, cfg.caption, names, device, source)
    if cfg.caption.backend == "given":
        caption = partial(GivenCaptionStage, source)
    size = cfg.download.image_size
    features = partial(FeaturesStage, cfg.features, names, size, device, scored)
    return [
        StageSpec("images", _images(cfg), cfg.download_workers),
        *([StageSpec("scores", score, cfg.scores_workers)] if scored else []),
        StageSpec("captions", caption, cfg.caption_workers, interpreter(cfg.caption)),
        StageSpec("features", features, cfg.features_workers),
    ]


def _connection(cfg: CurateConfig) -> contextlib.AbstractContextManager[Any]:
    return connect(cfg.ray, [spec.resources for spec in stages(cfg)])


@contextlib.contextmanager
def _driven(cfg: CurateConfig, storage: Storage) -> Iterator[None]:
    with _connection(cfg), ray_metrics.driver("curate", storage.url()):
        yield
