"""Ablations: encoders trained to differ in one thing, drawn and scored on the same bench.

    arms/<arm>-s<seed>/          the root of one training: train/, model/
    evaluation/<name>/...        its pictures and scores, as method <arm>-s<seed>

A trial is one arm with one seed: trained, then drawn and scored, in a task of its own. A trial that
was broken off goes on from its checkpoint, or from the unit that it had reached.
"""

from __future__ import annotations

import difflib
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from pipeline import lease, models
from pipeline.cluster import connect, cores
from pipeline.command_line import load
from pipeline.config import EvaluateConfig, StageResources, TrainConfig
from pipeline.errors import UserError
from pipeline.evaluation import ablation_tables
from pipeline.evaluation.arms import ARMS, ARMS_FOLDER, Trial
from pipeline.evaluation.benches import MiniBench
from pipeline.evaluation.evaluation import FOLDER, Evaluation, check_models, scorers_of
from pipeline.evaluation.methods import Method
from pipeline.evaluation.methods.ssr import SelectBy
from pipeline.evaluation.methods.text_only import TextOnly
from pipeline.evaluation.publish import Published, publish
from pipeline.evaluation.run import make_here
from pipeline.progress import Progress, quiet_libraries
from pipeline.shards import MANIFEST
from pipeline.storage import Storage
from pipeline.tasks import spread
from pipeline.training.record import PROGRESS
from pipeline.training.stage import STAGES


def trials(cfg: EvaluateConfig) -> list[Trial]:
    """What is trained and drawn, seed by seed, so that a broken-off ablation has whole tables."""
    arms = cfg.ablation.arms
    return [Trial(arm, seed) for seed in range(cfg.ablation.seeds) for arm in arms]


def ablate(cfg: EvaluateConfig, storage: Storage, progress: Progress) -> Published:
    """Train, draw and score what is missing of every trial; write the tables."""
    _check(cfg)
    todo, bench = trials(cfg), _bench(cfg, noise=0)
    scorers = scorers_of(cfg, bench)
    for scorer in scorers:
        scorer.check(bench)
    cpus, gpus = cfg.ablation.cpus, cfg.ablation.gpus
    # no more at once than there are cores: a private cluster counts at least four
    ray = replace(cfg.ray, num_cpus=cfg.ray.num_cpus or cores())
    results = storage.sub(f"{FOLDER}/{cfg.ablation.name}")
    with lease.held(storage.sub(ARMS_FOLDER)), lease.held(results):
        with connect(ray, [StageResources(cpus, gpus)]):
            look = _Watch(cfg, storage, todo, progress).look
            work = partial(run_trial, cfg)
            spread(work, todo, "trials", progress=progress, cpus=cpus, gpus=gpus, look=look)
        methods = [_method(cfg, trial) for trial in todo]
        asked = Evaluation(cfg, bench, methods, scorers, cfg.ablation.name)
        made = publish(asked, storage, shown=[t.name for t in todo if t.seed == 0])
        text = ablation_tables.write(cfg, todo, made, storage)
        return replace(made, text=text)


def _bench(cfg: EvaluateConfig, noise: int) -> MiniBench:
    """The mini bench; trials of one seed share their noise, so that arms are compared on it."""
    count = 100 if cfg.references is None else cfg.references
    return MiniBench(count, check_models(cfg), cfg.seed, noise)


def run_trial(cfg: EvaluateConfig, trial: Trial) -> None:
    """Train one trial, then draw and score it: what a task runs. What is done is not done again."""
    import torch

    quiet_libraries()
    torch.set_num_threads(max(1, int(cfg.ablation.cpus)))
    if trial.trained:
        _train(cfg, trial)
    bench = _bench(cfg, noise=trial.seed)
    method = _method(cfg, trial)
    asked = Evaluation(cfg, bench, [method], scorers_of(cfg, bench), cfg.ablation.name)
    try:
        make_here(asked.stages(method), asked.units(method), Storage(cfg.root))
    finally:
        method.close()


def _train(cfg: EvaluateConfig, trial: Trial) -> None:
    from pipeline.training.run import Run
    from pipeline.training.stage import World

    run = Run(train_settings(cfg, trial))
    if not run.finished:
        run.take_over()
        run.work(World(device=models.device(cfg.device)))


def train_settings(cfg: EvaluateConfig, trial: Trial) -> TrainConfig:
    """The settings of jobs/train.py that a trial is trained with."""
    arm, ablation = ARMS[trial.arm], cfg.ablation
    asked = dict(arm.train or {})
    single = asked.pop("single_scale", False)
    base: TrainConfig = load(TrainConfig, [], preset=ablation.train_preset)
    first = ablation.steps if single else ablation.steps * 3 // 8
    # the last stage's schedule ends both: whoever has one stage ends as the others do
    last = base.multi_scale
    return replace(
        base,
        root=Storage(cfg.root).url(f"{ARMS_FOLDER}/{trial.name}"),
        data=ablation.data_int8 if arm.int8 else ablation.data,
        models=cfg.models,
        seed=trial.seed,
        semantic=replace(last if single else base.semantic, steps=first),
        multi_scale=replace(last, steps=ablation.steps - first),
        validate_steps=0,
        sample_steps=0,
        checkpoint_steps=max(1, ablation.steps // 4),
        **asked,
    )


def _method(cfg: EvaluateConfig, trial: Trial) -> Method:
    """The trial's method; of one that is trained, its model must be there."""
    arm = ARMS[trial.arm]
    title = f"{arm.title}, seed {trial.seed}"
    if arm.train is None:
        return TextOnly(trial.name, cfg, title)
    model = Storage(cfg.root).url(f"{ARMS_FOLDER}/{trial.name}/model")
    return SelectBy(trial.name, cfg, arm.by, model, title)


class _Watch:
    """Shows how far all trainings are together, by what each of them publishes."""

    def __init__(
        self, cfg: EvaluateConfig, storage: Storage, todo: Sequence[Trial], progress: Progress
    ) -> None:
        self.storage, self.progress = storage, progress
        self.steps = cfg.ablation.steps
        self.left = {trial.name: 0 for trial in todo if trial.trained}
        self.every_s = 2.0 if storage.local else 15.0
        self.next = 0.0
        done = sum(self._step(name) for name in self.left)
        progress.task("steps", self.steps * len(self.left), done)
        self.left = {name: self._step(name) for name in self.left}

    def look(self) -> None:
        if time.monotonic() < self.next:
            return
        self.next = time.monotonic() + self.every_s
        for name, seen in list(self.left.items()):
            step = self._step(name)
            if step > seen:
                self.progress.advance("steps", step - seen)
                self.left[name] = step
            if step == self.steps:
                del self.left[name]

    def _step(self, name: str) -> int:
        """Steps of both stages that a trial has done, as it said last."""
        path = f"{ARMS_FOLDER}/{name}/{PROGRESS}"
        try:
            seen = self.storage.read_json(path) if self.storage.exists(path) else {}
            before = self.steps * 3 // 8 if seen.get("stage") == STAGES[2] else 0
            return min(self.steps, before + int(seen.get("step", 0)))
        except (UserError, TypeError, ValueError, AttributeError):
            return 0  # a glance that failed


def _check(cfg: EvaluateConfig) -> None:
    """Refuse before anything is started."""
    if cfg.bench != MiniBench.name or cfg.seeds != 1:
        raise UserError("bench, seeds: an ablation draws the mini bench, each request once")
    if cfg.images_from or cfg.methods != EvaluateConfig().methods:
        raise UserError(
            "methods, images_from: an ablation draws its arms alone; leave them out, or "
            "--ablation.arms"
        )
    for arm in cfg.ablation.arms:
        if cfg.ablation.arms.count(arm) > 1:
            raise UserError(f"ablation.arms: {arm} is there twice; leave one")
    for arm in cfg.ablation.arms:
        if arm not in ARMS:
            near = difflib.get_close_matches(arm, ARMS, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            there = ", ".join(ARMS)
            raise UserError(f"ablation.arms: unknown arm {arm!r}; {hint}there are: {there}")
    for arm in cfg.ablation.arms:
        if ARMS[arm].train is None:
            continue
        int8 = ARMS[arm].int8
        data = cfg.ablation.data_int8 if int8 else cfg.ablation.data
        if not Storage(data).exists(MANIFEST):
            codec = " --features.codec int8" if int8 else ""
            raise UserError(
                f"{data}: no sealed features, which arm {arm} is trained on; make them: python "
                f"jobs/curate.py --root {data}{codec}"
            )
