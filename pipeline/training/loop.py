"""The loop of one worker: frozen models, one module of trainables, one optimizer. No Ray here.

A worker is one of `World.size` processes that run the same code on their share of each batch; the
gradients are averaged by DistributedDataParallel, which wraps the module that owns every trainable
tensor. Everything but the weights is a function of the step: batch, noise, learning rate.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.config import TrainConfig
from pipeline.errors import UserError
from pipeline.progress import say
from pipeline.shards import Manifest
from pipeline.storage import Storage
from pipeline.training.checkpoint import (
    Checkpoints,
    Saver,
    Snapshot,
    copies,
    optimizer_tensors,
    restore_optimizer,
)
from pipeline.training.inputs import (
    Inputs,
    Preparer,
    TextEncodings,
    validation_batches,
)
from pipeline.training.lanes import Lanes, ReadAhead
from pipeline.training.record import (
    Clock,
    Recorder,
    nonfinite_path,
    read_metrics,
    write_nonfinite,
)
from pipeline.training.stage import Frozen, Stage, World, learning_rate
from pipeline.training.vision import hidden_states
from ssr_model.encoder import SSRAdapter
from ssr_model.losses import diffusion_target, ldm_loss, reg_loss, total_loss
from ssr_model.training_step import Dropping, SSRTrainingModule

_MEASURED = ("loss", "ldm", "reg", "grad_norm")
_NAMED_KEYS = 4


class Losses(NamedTuple):
    """Of a worker's rows: the means of L_LDM and L_reg, and which rows are numbers, (B,) bool."""

    ldm: Tensor
    reg: Tensor
    finite: Tensor


class StageLoop:
    """Trains one stage on one worker, from its newest checkpoint to its last step.

    Args:
        cfg: the run's settings.
        stage: what to train.
        world: this worker.
        frozen: the frozen models, on the worker's device.
        adapter: the trainables as the stage begins: the same on every worker.
        storage: the run's root.
        manifest: its sealed shards.
        info: what checkpoints say of the run, e.g. the settings' fingerprint.
        run: the run's token, for watchers.
        before_save: called on rank 0 before a checkpoint is written; it raises to prevent it.
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
        info: dict[str, Any] | None = None,
        run: str = "",
        before_save: Callable[[], None] | None = None,
    ) -> None:
        self.cfg, self.stage, self.world, self.frozen = cfg, stage, world, frozen
        self.storage, self.manifest, self.info, self.run_token = storage, manifest, info or {}, run
        self.adapter = adapter.to(world.device).train()
        self.parameters = dict(self.adapter.named_parameters())
        self.module = SSRTrainingModule(self.adapter, frozen.unet)
        self.model: nn.Module = self.module
        if world.size > 1:
            self.model = DistributedDataParallel(
                self.module,
                device_ids=None if world.device.type == "cpu" else [world.device],
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
            )
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=0.0, weight_decay=cfg.weight_decay, fused=True
        )
        self.ema: dict[str, Tensor] = {}
        if cfg.ema_decay:
            self.ema = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.texts = TextEncodings(frozen.text_encoder)
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
        self.lanes = Lanes(
            storage,
            manifest,
            self.prepare.columns,
            lanes=cfg.lanes,
            global_batch=cfg.global_batch,
            shuffle_rows=cfg.shuffle_rows,
            seed=seed,
        )
        self.checkpoints = Checkpoints(storage.sub(f"train/{stage.name}"), cfg.keep_checkpoints)
        self.sums = torch.zeros(len(_MEASURED) + 1, device=world.device)
        """Of the steps since the last log that were numbers, and how many were not."""
        self.recent: list[tuple[int, list[str], Tensor, Tensor]] = []
        """Step, keys, which rows are numbers, whether the gradient is; none looked at yet."""
        self.step = 0
        self.recorder: Recorder | None = None
        self.saver: Saver | None = None
        self.before_save = before_save or (lambda: None)
        self._settled = world.size <= 2

    # --- the run ---

    def run(self) -> dict[str, Any]:
        """Train to the stage's last step.

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
            self.recorder = Recorder(self.storage, self.stage.name, self.step, self.run_token)
            self.recorder.progress(step=self.step, steps=steps)
            self.saver = Saver(self.checkpoints, self._before_save)
        try:
            if self.step == 0:
                self._validate(held_out)
            batches = self.lanes.batches(self.step, steps, self.world.rank, self.world.size)
            with ReadAhead(batches, self.prepare) as ahead:
                clock = Clock(self.cfg.global_batch, self.step)
                for inputs in clock.timed(iter(ahead)):
                    self._settle_buckets(inputs)
                    self.train_step(inputs)
                    if self._due(self.cfg.log_steps):
                        self._log(clock)
                    with clock.paused():
                        if self._due(self.cfg.validate_steps):
                            self._validate(held_out)
                        if self._due(self.cfg.checkpoint_steps):
                            self._save()
            if self.saver is not None:
                self.saver.wait()
        finally:
            if self.saver is not None:
                self.saver.close()
            if self.recorder is not None:
                self.recorder.close()
            self.module.release()
        newest: dict[str, Any] = {}
        for record in read_metrics(self.storage, self.stage.name) if self._first else []:
            newest.update(record)
        seconds = round(time.monotonic() - began, 1)
        return {**newest, "step": self.step, "seconds": seconds}

    def train_step(self, inputs: Inputs) -> None:
        """One optimizer step. Nothing here waits for the device."""
        ldm, reg, finite = self.losses(self.model, inputs)
        loss = total_loss(ldm, reg, self.cfg.tau)
        loss.backward()
        limit = self.cfg.clip_norm or math.inf
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), limit)
        good = norm.isfinite()  # gradients are averaged over the workers: all of them see the same
        # a step that is not a number is never taken; the optimizer asks the device, not us
        self.optimizer.found_inf = (~good).float()  # type: ignore[attr-defined]
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.stage.optim, self.step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema:
            torch._foreach_lerp_(
                list(self.ema.values()), list(self.parameters.values()), 1 - self.cfg.ema_decay
            )
        figures = torch.stack([loss.detach(), ldm.detach(), reg.detach(), norm.detach()])
        self.sums[:-1] += torch.where(good, figures, 0.0)
        self.sums[-1] += ~good
        self.step += 1
        self.recent.append((self.step, inputs.keys, finite, good))

    def losses(self, model: nn.Module, inputs: Inputs) -> Losses:
        """The losses of this worker's rows."""
        device, frozen = self.world.device, self.frozen
        inputs = inputs.to(device)
        deviation = (0.5 * inputs.latent_logvar.float().clamp(-30.0, 20.0)).exp()
        latents = inputs.latent_mean.float() + deviation * inputs.latent_noise
        latents = (latents * frozen.scaling_factor).contiguous(memory_format=torch.channels_last)
        noise = inputs.noise.contiguous(memory_format=torch.channels_last)
        noisy = frozen.scheduler.add_noise(latents, noise, inputs.timesteps)
        half = self.cfg.precision == "bf16"
        dtype = torch.bfloat16 if half else torch.float32
        states = hidden_states(inputs.features, self.stage.depths, frozen.vision)
        features = {depth: value.to(dtype) for depth, value in states.items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            prompt, z_q = self.texts(inputs.prompt_ids), self.texts(inputs.query_ids.flatten(0, 1))
            z_q = z_q.unflatten(0, inputs.query_ids.shape[:2])
            prediction, subject = model(
                noisy, inputs.timesteps, prompt, z_q, features, keep_subject=inputs.keep_subject
            )
        target = diffusion_target(frozen.scheduler, latents, noise, inputs.timesteps)
        # a dropped query names nothing that its embedding could keep
        named = inputs.named.flatten()[:, None].expand(-1, subject.z_q.shape[1])
        reg = reg_loss(subject.per_scale, subject.z_q, self.adapter.config.reg_form, named)
        sizes = prediction.detach().float() - target, subject.per_scale.detach().float()
        drawn, embedded = (size.flatten(1).sum(1).isfinite() for size in sizes)
        finite = drawn & embedded.view(len(drawn), -1).all(1)
        return Losses(ldm_loss(prediction, target), reg, finite)

    # --- between steps ---

    @property
    def _first(self) -> bool:
        return self.world.rank == 0

    def _due(self, every: int) -> bool:
        """Whether something that is done every so many steps, and at the last one, is due now."""
        return self.step == self.stage.optim.steps or (bool(every) and self.step % every == 0)

    def _log(self, clock: Clock) -> None:
        """The one place where figures leave the device."""
        self._check_finite()
        *sums, skipped = self.world.sum(self.sums.clone()).tolist()
        self.sums.zero_()
        steps, samples_per_s, waiting = clock.lap(self.step)
        taken = steps * self.world.size - skipped
        if not taken:
            raise UserError(f"{self._diverged()}: none of the last {steps} steps is a number")
        means = [value / taken for value in sums]
        record = {
            **dict(zip(_MEASURED, means, strict=True)),
            "lr": learning_rate(self.stage.optim, self.step - 1),
            "samples_per_s": round(samples_per_s, 2),
            "data_wait": round(waiting, 4),
            **({"skipped": int(skipped / self.world.size)} if skipped else {}),
            "epoch": round(self.lanes.epoch(self.step), 4),
        }
        if self.saver is not None:
            self.saver.check()
        if self.recorder is not None:
            self.recorder.log({"step": self.step, **record})
            self.recorder.progress(step=self.step, steps=self.stage.optim.steps, **record)

    def _check_finite(self) -> None:
        """Look at the steps since the last look: write down what was not a number, and stop where
        the settings say so. All workers find the same steps.
        """
        recent, self.recent = self.recent, []
        good = torch.stack([good for *_, good in recent]).tolist() if recent else []
        if all(good):
            return
        mine = {
            step: [key for key, fine in zip(keys, finite.tolist(), strict=True) if not fine]
            for (step, keys, finite, _), fine in zip(recent, good, strict=True)
            if not fine
        }
        found = self.world.gather(mine)
        rows = {step: [key for worker in found for key in worker[step]] for step in mine}
        if self._first:
            write_nonfinite(self.storage, self.stage.name, rows)
        first, keys = next(iter(rows.items()))
        which = ", ".join(keys[:_NAMED_KEYS]) + (", ..." if len(keys) > _NAMED_KEYS else "")
        what = f"rows {which}" if keys else "the gradient of all its rows"
        told = f"{what}; see {self.storage.url(nonfinite_path(self.stage.name))}"
        if self.cfg.nonfinite == "stop":
            raise UserError(f"{self._diverged()}: step {first} is not a number ({told})")
        if self._first:
            say(f"warning: {len(rows)} step(s) not taken, the first is {first}: {told}")

    def _diverged(self) -> str:
        name, saved = self.stage.name, self.checkpoints.steps()
        kept = f"step {saved[-1]} is saved" if saved else "nothing is saved yet"
        return f"{name} diverged before step {self.step} (lower {name}.lr; {kept})"

    def _held_out(self) -> list[Inputs]:
        if not self._validates or self.step == self.stage.optim.steps:
            return []
        return validation_batches(
            self.storage,
            self.manifest,
            self.prepare,
            rows=self.cfg.validate_rows,
            batch_rows=max(1, self.cfg.global_batch // self.world.size),
            rank=self.world.rank,
            world=self.world.size,
        )

    @property
    def _validates(self) -> bool:
        cfg = self.cfg
        return bool(cfg.validate_steps and cfg.validate_rows and self.manifest.rows("test"))

    @torch.no_grad()
    def _validate(self, held_out: list[Inputs]) -> None:
        """Losses on the held-out split at fixed timesteps and noise, of what is exported."""
        if not self._validates or not self.stage.optim.steps:
            return
        trained: dict[str, Tensor] = {}
        if self.ema:
            trained = {name: p.detach().clone() for name, p in self.parameters.items()}
            self._put(self.ema)
        sums = torch.zeros(3, device=self.world.device)
        for inputs in held_out:
            ldm, reg, _ = self.losses(self.module, inputs)
            rows = len(inputs.keys)
            sums += torch.stack([ldm * rows, reg * rows, torch.full_like(ldm, rows)])
        if trained:
            self._put(trained)
        ldm_sum, reg_sum, rows_sum = self.world.sum(sums).tolist()
        if self.recorder is not None:
            ldm_mean, reg_mean = ldm_sum / rows_sum, reg_sum / rows_sum
            record = {
                "validation_loss": ldm_mean + self.cfg.tau * reg_mean,
                "validation_ldm": ldm_mean,
                "validation_reg": reg_mean,
            }
            self.recorder.log({"step": self.step, **record})

    def _settle_buckets(self, inputs: Inputs) -> None:
        """With three workers or more: let DDP choose its buckets before the first step counts.

        It does so after the first backward pass, and the order of a ring's additions depends on
        them: a resumed run would otherwise differ in the last bit. Two addends commute.
        """
        if not self._settled:
            ldm, reg, _ = self.losses(self.model, inputs)
            total_loss(ldm, reg, self.cfg.tau).backward()
            self.optimizer.zero_grad(set_to_none=True)
            self._settled = True

    # --- state ---

    @torch.no_grad()
    def _put(self, tensors: dict[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(tensors[name])

    def _restore(self) -> None:
        """Go on from the newest whole checkpoint, on every worker from the same one."""
        newest = self.world.from_first(self.checkpoints.newest() if self._first else None)
        if newest is None:
            return
        snapshot = self.checkpoints.load(newest)
        self._check_same_tensors(snapshot)
        self._put(snapshot.trainables)
        restore_optimizer(self.optimizer, self.parameters, snapshot.optimizer)
        for name, tensor in self.ema.items():
            tensor.copy_(snapshot.ema[name])
        # new ranks of a larger world have none, and need none: the loop draws nothing from it
        if str(self.world.rank) in snapshot.rng:
            torch.set_rng_state(snapshot.rng[str(self.world.rank)])
        self.step = snapshot.step

    def _check_same_tensors(self, snapshot: Snapshot) -> None:
        ours = {name: tuple(p.shape) for name, p in self.parameters.items()}
        theirs = {name: tuple(t.shape) for name, t in snapshot.trainables.items()}
        odd = sorted(set(ours.items()) ^ set(theirs.items()))
        if odd or (self.ema and snapshot.ema.keys() != self.ema.keys()):
            what = odd[0][0] if odd else "the moving average"
            raise UserError(
                f"the checkpoint of step {snapshot.step} of {self.stage.name} is of another model "
                f"({what}); choose another root, or delete its train folder"
            )

    def _before_save(self) -> None:
        """Records go first: what a checkpoint covers has been recorded."""
        self.before_save()
        assert self.recorder is not None
        self.recorder.flush()

    def _save(self) -> None:
        """Take a snapshot, which is written while training goes on."""
        states = self.world.gather(torch.get_rng_state())
        self._check_finite()
        if self.saver is None:
            return
        self.saver.save(
            Snapshot(
                step=self.step,
                trainables=copies(self.parameters),
                optimizer=optimizer_tensors(self.optimizer, self.parameters),
                rng={str(rank): state for rank, state in enumerate(states)},
                ema=copies(self.ema),
                info={**self.info, "stage": asdict(self.stage), "world": self.world.size},
            )
        )
