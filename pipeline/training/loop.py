"""The loop of one worker: batches, the learner's steps, records, checkpoints. No Ray here.

A worker is one of `World.size` processes that run the same code on their share of each batch.
Everything but the weights is a function of the step: batch, noise, learning rate.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from itertools import chain
from typing import Any

import torch

from pipeline.config import TrainConfig
from pipeline.errors import UserError
from pipeline.progress import say
from pipeline.shards import Manifest
from pipeline.storage import Storage
from pipeline.training.attempts import about
from pipeline.training.checkpoint import Checkpoints, Saver, Snapshot
from pipeline.training.figures import BINS, Sums, bin_means
from pipeline.training.inputs import Inputs, Preparer, validation_batches
from pipeline.training.learner import Learner, Taken
from pipeline.training.memory import lanes_of
from pipeline.training.read_ahead import ReadAhead
from pipeline.training.record import (
    Clock,
    Recorder,
    nonfinite_path,
    read_metrics,
    write_corrupt,
    write_nonfinite,
)
from pipeline.training.samples import Samples, two_queries
from pipeline.training.stage import Frozen, Stage, World, learning_rate
from ssr_model.encoder import SSRAdapter
from ssr_model.training_step import Dropping

_NAMED_KEYS = 4
_FRUITLESS = 20  # steps in a row, none of them a number, after which skipping them is no help


class StageLoop:
    """Trains one stage on one worker, from its newest checkpoint to its last step.

    Args:
        cfg: the run's settings.
        stage: what to train.
        world: this worker.
        frozen: the frozen models, on the worker's device.
        adapter: the trainables as the stage begins: the same on every worker.
        storage: the run's root.
        manifest: the sealed shards.
        data: the curated root that holds them; None = the run's.
        info: what checkpoints say of the run, e.g. the settings' fingerprint.
        run: the run's token, for watchers.
        check_owner: called on rank 0 before anything is written; it raises to prevent it.
        leaving: asked on every worker at each log: whether this worker has to go, or another world
            is wanted. If one has, all save and leave.
    """

    def __init__(
        self,
        cfg: TrainConfig,
        stage: Stage,
        world: World,
        frozen: Frozen,
        adapter: SSRAdapter,
        storage: Storage,
        manifest: Manifest,
        data: Storage | None = None,
        info: dict[str, Any] | None = None,
        run: str = "",
        check_owner: Callable[[], None] | None = None,
        leaving: Callable[[], bool] = lambda: False,
    ) -> None:
        self.cfg, self.stage, self.world, self.frozen = cfg, stage, world, frozen
        self.storage, self.manifest, self.info, self.run_token = storage, manifest, info or {}, run
        self.data = data or storage
        self.learner = Learner(cfg, stage, world, frozen, adapter)
        seed = (cfg.seed, stage.number)
        self.prepare = Preparer(
            frozen.tokenizer,
            stage.depths,
            int(frozen.scheduler.config.num_train_timesteps),
            seed,
            codec=manifest.codec,
            dropping=Dropping(cfg.drop_prompt, cfg.drop_subject, cfg.drop_both),
            drop_query=cfg.drop_query,
            drop_article=cfg.drop_article,
            query=cfg.query,
            queries=cfg.queries,
            pin=world.device.type != "cpu",
        )
        self.lanes = lanes_of(cfg, stage, self.data, manifest)
        self.replaced = 0
        """Rows since the last log that stood in for damaged ones, on this worker."""
        self.checkpoints = Checkpoints(
            storage.sub(f"train/{stage.name}"), cfg.keep_checkpoints, cfg.keep_hours
        )
        self.sums = Sums(self.prepare.timesteps, world.device)
        """Of the steps since the last log."""
        self.fruitless = 0
        """Steps since the last log that had one that was a number."""
        self.nonfinite = 0
        """Steps of this attempt that were not a number."""
        self.recent: list[Taken] = []
        """Steps that were not looked at yet."""
        self.validated: dict[str, float] = {}
        """The newest validation's loss, for those who watch."""
        self.recorder: Recorder | None = None
        self.samples: Samples | None = None
        self.saver: Saver | None = None
        self.check_owner = check_owner or (lambda: None)
        self.leaving = leaving
        self.left = False
        """Whether the workers left before the last step. What they reached is saved."""

    # --- the run ---

    def run(self) -> dict[str, Any]:
        """Train to the stage's last step, or until the workers leave: see `left`.

        Returns on rank 0 the newest figures: step, epoch, losses, samples/s, share of time waiting
        for data, validation losses, and the seconds since it began.

        Raises:
            UserError: the loss is no longer a number; the store refuses; shards are damaged.
        """
        torch.manual_seed(self.cfg.seed + self.world.rank)
        self._restore()
        steps, began = self.stage.optim.steps, time.monotonic()
        held_out = self._held_out()
        if self._first:
            self.recorder = Recorder(
                self.storage,
                self.stage.name,
                self.step,
                self.run_token,
                about(self.cfg, self.world),
                self.cfg.trackers,
                self.check_owner,
            )
            self.saver = Saver(self.checkpoints, self._before_save, saved=self.step)
            self._tell_progress()
            self.samples = Samples(self.cfg, self.learner, self._sampled)
        try:
            if self.step == 0:
                self._validate(held_out)
                self._sample()
            batches = self.lanes.batches(self.step, steps, self.world.rank, self.world.size)
            with ReadAhead(batches, self.prepare) as ahead:
                clock = Clock(self.cfg.global_batch, self.step)
                for inputs in clock.timed(iter(ahead)):
                    self.learner.settle(inputs)
                    self._take(inputs)
                    if self._due(self.cfg.log_steps):
                        self.left = self._log(clock) and self.step < steps
                    with clock.paused():
                        if self.left:  # first of all: the node may be gone in half a minute
                            self._save()
                        if self._due(self.cfg.validate_steps):
                            self._validate(held_out)
                        if self._due(self.cfg.checkpoint_steps) and not self.left:
                            self._save()
                        if self._due(self.cfg.sample_steps) and not self.left:
                            self._sample()
                    if self.left:
                        break
            if self.saver is not None:
                self.saver.wait()
        finally:
            if self.saver is not None:
                self.saver.close()
            if self.recorder is not None:
                self.recorder.close()
            self.learner.release()
        newest: dict[str, Any] = {}
        for record in read_metrics(self.storage, self.stage.name) if self._first else []:
            newest.update(record)
        seconds = round(time.monotonic() - began, 1)
        return {**newest, "step": self.step, "seconds": seconds}

    def _take(self, inputs: Inputs) -> None:
        """One step; its figures stay on the device."""
        taken = self.learner(inputs)
        self.sums.add(taken.good, taken.figures, taken.bins)
        self.recent.append(taken)
        self.replaced += inputs.replaced

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.learner.step

    # --- between steps ---

    @property
    def _first(self) -> bool:
        return self.world.rank == 0

    def _due(self, every: int) -> bool:
        """Whether something that is done every so many steps, and at the last one, is due now."""
        return self.step == self.stage.optim.steps or (bool(every) and self.step % every == 0)

    def _log(self, clock: Clock) -> bool:
        """The one place where figures leave the device. Returns whether a worker has to leave."""
        self._check_finite()
        means, skipped, leaving = self.sums.means(self.world, float(self.leaving()))
        replaced, self.replaced = self._tell_corrupt(), 0
        steps, samples_per_s, waiting = clock.lap(self.step)
        self.fruitless = 0 if means else self.fruitless + steps
        if self.fruitless >= _FRUITLESS:
            raise UserError(f"{self._diverged()}: none of the last {self.fruitless} is a number")
        record = {
            **means,
            "lr": learning_rate(self.stage.optim, self.step - 1),
            "samples_per_s": round(samples_per_s, 2),
            "data_wait": round(waiting, 4),
            **({"skipped": skipped} if skipped else {}),
            **({"replaced_rows": replaced} if replaced else {}),
            "epoch": round(self.lanes.epoch(self.step), 4),
        }
        if self.saver is not None:
            self.saver.check()
        if self.recorder is not None:
            self.recorder.log({"step": self.step, **record})
            self._tell_progress(record)
        return bool(leaving)

    def _tell_progress(self, record: Mapping[str, Any] | None = None) -> None:
        """To those who watch, by rank 0."""
        if self.recorder is not None and self.saver is not None:
            self.recorder.progress(
                step=self.step,
                steps=self.stage.optim.steps,
                checkpoint=self.saver.saved,
                nonfinite=self.nonfinite,
                **(record or {}),
                **self.validated,
            )

    def _check_finite(self) -> None:
        """Look at the steps since the last look: write down what was not a number, and stop where
        the settings say so. All workers find the same steps.
        """
        recent, self.recent = self.recent, []
        good = torch.stack([taken.good for taken in recent]).tolist() if recent else []
        if all(good):
            return
        mine = {
            taken.step: [
                key for key, ok in zip(taken.keys, taken.finite.tolist(), strict=True) if not ok
            ]
            for taken, fine in zip(recent, good, strict=True)
            if not fine
        }
        found = self.world.gather(mine)
        rows = {step: [key for worker in found for key in worker[step]] for step in mine}
        self.nonfinite += len(rows)
        if self._first:
            write_nonfinite(self.storage, self.stage.name, rows)
        first, keys = next(iter(rows.items()))
        which = ", ".join(keys[:_NAMED_KEYS]) + (", ..." if len(keys) > _NAMED_KEYS else "")
        what = f"rows {which}" if keys else "the gradient of all its rows"
        told = f"{what}; see {self.storage.url(nonfinite_path(self.stage.name))}"
        if self.cfg.nonfinite == "stop":
            line = f"{self._diverged()}: step {first} is not a number ({told})"
            self._tell_progress()
            raise UserError(line)
        if self._first:
            say(f"warning: {len(rows)} step(s) not taken, the first is {first}: {told}")

    def _tell_corrupt(self) -> int:
        """Write down damaged row groups that were met; returns all workers' rows since the last log
        that stood in for theirs.
        """
        if self.cfg.corrupt == "stop":
            return 0
        met, replaced = zip(
            *self.world.gather((self.lanes.source.corrupt, self.replaced)), strict=True
        )
        if self._first and any(met):
            for one in write_corrupt(self.storage, self.stage.name, chain.from_iterable(met)):
                where = f"row group {one.row_group} of {self.data.url(one.path)}"
                say(f"warning: {where} is damaged ({one.error}); others stand in for its rows")
        return sum(replaced)

    def _diverged(self) -> str:
        name = self.stage.name
        self.world.first_alone(f"{name}/diverged", self._let_save)
        saved = self.checkpoints.steps()
        if not saved:
            return f"{name} diverged before step {self.step} (lower {name}.lr; nothing is saved)"
        return (
            f"{name} diverged before step {self.step} (step {saved[-1]} is saved: go on from it "
            f"with --nonfinite skip, or under another root with --init and a lower {name}.lr)"
        )

    def _held_out(self) -> list[Inputs]:
        if not self._validates or self.step == self.stage.optim.steps:
            return []
        share = max(1, self.cfg.global_batch // self.world.size)
        return validation_batches(
            self.data,
            self.manifest,
            self.prepare,
            rows=self.cfg.validate_rows,
            batch_rows=min(self.cfg.micro_batch or share, share),
            rank=self.world.rank,
            world=self.world.size,
            corrupt=self.cfg.corrupt,
            verify=self.cfg.verify,
        )

    @property
    def _validates(self) -> bool:
        cfg = self.cfg
        return bool(cfg.validate_steps and cfg.validate_rows and self.manifest.rows("test"))

    def _validate(self, held_out: list[Inputs]) -> None:
        """Losses on the held-out split at fixed timesteps and noise, of what is exported."""
        if not self._validates or not self.stage.optim.steps:
            return
        sums = torch.zeros(3 + 2 * BINS, device=self.world.device)
        with self.learner.best():
            for inputs in held_out:
                losses = self.learner.evaluate(inputs)
                means = torch.stack([losses.ldm, losses.reg, torch.ones_like(losses.ldm)])
                sums += torch.cat([means * len(inputs.keys), losses.bins.flatten()])
        ldm_sum, reg_sum, rows_sum, *bins = self.world.sum(sums).tolist()
        if self.recorder is not None and rows_sum:
            ldm_mean, reg_mean = ldm_sum / rows_sum, reg_sum / rows_sum
            record = {
                "validation_loss": ldm_mean + self.cfg.tau * reg_mean,
                "validation_ldm": ldm_mean,
                "validation_reg": reg_mean,
                **bin_means(bins[:BINS], bins[BINS:], self.prepare.timesteps, "validation_ldm"),
            }
            self.validated = {"validation_loss": record["validation_loss"]}
            self.recorder.log({"step": self.step, **record})

    def _sample(self) -> None:
        """Rank 0 draws a grid of samples."""
        if self.cfg.sample_steps and self.stage.optim.steps:
            self.world.first_alone(f"{self.stage.name}/samples/{self.step}", self._draw)

    def _draw(self) -> None:
        assert self.samples is not None and self.recorder is not None
        picture = self.samples(self.step)
        if picture is not None:
            self.recorder.picture(self.step, picture)

    def _sampled(self) -> list[Inputs]:
        """The rows of the grids, in one piece."""
        rows = self.cfg.sample_rows
        return validation_batches(
            self.data,
            self.manifest,
            two_queries(self.prepare),
            rows=rows,
            batch_rows=rows,
            corrupt=self.cfg.corrupt,
            verify=self.cfg.verify,
        )

    # --- state ---

    def _restore(self) -> None:
        """Go on from the newest whole checkpoint, on every worker from the same one."""
        newest = self.world.from_first(self.checkpoints.newest() if self._first else None)
        if newest is None:
            return
        snapshot = self.checkpoints.load(newest)
        self._check_same_tensors(snapshot)
        self.learner.restore(snapshot)
        # new ranks of a larger world have none, and need none: the loop draws nothing from it
        if str(self.world.rank) in snapshot.rng:
            torch.set_rng_state(snapshot.rng[str(self.world.rank)])

    def _check_same_tensors(self, snapshot: Snapshot) -> None:
        ours = {name: tuple(p.shape) for name, p in self.learner.parameters.items()}
        theirs = {name: tuple(t.shape) for name, t in snapshot.trainables.items()}
        odd = sorted(set(ours.items()) ^ set(theirs.items()))
        if odd or (self.learner.ema and snapshot.ema.keys() != self.learner.ema.keys()):
            what = odd[0][0] if odd else "the moving average"
            raise UserError(
                f"the checkpoint of step {snapshot.step} of {self.stage.name} is of another model "
                f"({what}); choose another root, or delete its train folder"
            )

    def _before_save(self) -> None:
        """Records go first: what a checkpoint covers has been recorded."""
        self.check_owner()
        assert self.recorder is not None
        self.recorder.flush()

    def _let_save(self) -> None:
        """Until what is being written is whole, or has failed."""
        if self.saver is not None:
            with contextlib.suppress(UserError):
                self.saver.wait()

    def _save(self) -> None:
        """Take a snapshot, which is written while training goes on."""
        states = self.world.gather(torch.get_rng_state())
        self._check_finite()
        self._tell_corrupt()
        if self.saver is None:
            return
        snapshot = self.learner.snapshot()
        snapshot.rng = {str(rank): state for rank, state in enumerate(states)}
        snapshot.info = {**self.info, "stage": asdict(self.stage), "world": self.world.size}
        self.saver.save(snapshot)
