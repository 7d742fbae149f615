"""An evaluation, whole: every method's pictures of a bench, their scores, and the tables.

    evaluation/<bench>/pictures/<method>/<unit>.parquet   drawing.py
    evaluation/<bench>/scores/<method>/<unit>.parquet     scoring.py
    evaluation/<bench>/scores.parquet, ...                publish.py

Drawing and scoring are stages of units: a run that was broken off goes on where it stopped, a
method or a metric that is added makes only what it adds.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import partial
from typing import Any

from pipeline import lease, ray_metrics
from pipeline.cluster import connect
from pipeline.config import EvaluateConfig
from pipeline.evaluation.evaluation import Evaluation, plan
from pipeline.evaluation.methods import Method
from pipeline.evaluation.publish import Published, publish
from pipeline.progress import Progress, say
from pipeline.runner import StageSpec, run_stages
from pipeline.storage import Storage
from pipeline.units import Ledger, Stage, chain, run_unit


def evaluate(cfg: EvaluateConfig, storage: Storage, progress: Progress) -> Published:
    """Draw and score what is missing, and write the tables; see the top of this file."""
    asked = plan(cfg)
    asked.check()
    with lease.held(storage.sub(asked.folder)):
        with contextlib.ExitStack() as end:
            cluster = _Cluster(asked, storage, end)
            for method in asked.methods:
                make(asked, method, storage, progress, cluster)
        # after the driver said that it came to its end: a retry of this alone would not say it
        return publish(asked, storage)


class _Cluster(contextlib.AbstractContextManager[None]):
    """Ray, connected by the first method that enters, and by no other, until the stack `end` ends:
    a private cluster takes seconds to start, and the driver is one for all methods.
    """

    def __init__(self, asked: Evaluation, storage: Storage, end: contextlib.ExitStack) -> None:
        self._end = end
        cfg = asked.cfg
        self._due: list[contextlib.AbstractContextManager[Any]] = [
            connect(cfg.ray, (cfg.drawing, cfg.scoring)),
            ray_metrics.driver("evaluate", _run(asked, storage)),
        ]

    def __enter__(self) -> None:
        while self._due:
            self._end.enter_context(self._due.pop(0))

    def __exit__(self, *_: object) -> None: ...


def make(
    asked: Evaluation,
    method: Method,
    storage: Storage,
    progress: Progress,
    connection: contextlib.AbstractContextManager[Any] | None = None,
) -> None:
    """Draw and score what is missing of one method; what has other settings is made again.

    connection: to Ray, entered where there is work for it.
    """
    units, stages = asked.units(method), asked.stages(method)
    redo = [stage.name for stage in stages]
    if method.learns and not {method.name, *redo} & set(asked.cfg.redo):
        redo = redo[1:]  # its pictures took hours: they are given up on request only
    _tell_stale(stages, storage, redo)
    if asked.cfg.drawing.max_workers == 0:
        with contextlib.closing(method):
            make_here(stages, units, storage, progress, redo)
        return
    pools = (asked.cfg.drawing, asked.cfg.scoring)
    specs = [
        StageSpec(stage.name, partial(_itself, stage), pool)
        for stage, pool in zip(stages, pools, strict=True)
    ]
    run_stages(
        specs,
        units,
        storage,
        progress,
        redo=redo,
        connection=connection,
        job="evaluate",
        run=_run(asked, storage),
    )


def _run(asked: Evaluation, storage: Storage) -> str:
    """What its metrics are told from others' by: a root has evaluations side by side."""
    return storage.sub(asked.folder).url()


def make_here(
    stages: Sequence[Stage],
    units: Sequence[str],
    storage: Storage,
    progress: Progress | None = None,
    redo: Sequence[str] | None = None,
) -> None:
    """As run_stages, in this process: unit by unit, every stage of it in turn. redo: the stages
    whose units of other settings are made again; None = all.
    """
    prints = chain(stages)
    ledgers = [Ledger(storage, stage.name) for stage in stages]
    for stage, ledger in zip(stages, ledgers, strict=True):
        may = redo is None or stage.name in redo
        ledger.check(prints[stage.name], stage.settings, redo=may)
        ledger.forget_others(prints[stage.name])
    pending = [unit for unit in units if not all(unit in ledger.units for ledger in ledgers)]
    title = stages[0].name.rpartition("/")[2]
    if progress is not None:
        progress.task(title, len(units), done=len(units) - len(pending))
    for unit in pending:
        made = False
        for stage, ledger in zip(stages, ledgers, strict=True):
            if made or unit not in ledger.units:  # never scores of pictures that are gone
                ledger.forget(unit)
                stage.open()  # type: ignore[attr-defined]
                run_unit(stage, unit, storage, prints[stage.name])
                made = True
        if progress is not None:
            progress.advance(title)


def _itself(stage: Stage) -> Stage:
    return stage


def _tell_stale(stages: Sequence[Stage], storage: Storage, redo: Sequence[str]) -> None:
    for stage, mark in zip(stages, chain(stages).values(), strict=True):
        stale = [m for m in Ledger(storage, stage.name).done().values() if m.fingerprint != mark]
        if stale and stage.name in redo:
            before, now = stale[0].settings, stage.settings
            changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
            what = ", ".join(changed) or "what they were made from"
            say(f"{stage.name}: made with other settings before ({what}); made again")
