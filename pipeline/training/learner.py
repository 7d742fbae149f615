"""The learner: the module of all trainables, its optimizer, its moving average, and one step.

No storage and no schedule of a run here: benchmarks time it as it is. The frozen models lie under
it; DistributedDataParallel, which averages the gradients, around it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.config import TrainConfig
from pipeline.errors import UserError
from pipeline.training.checkpoint import Snapshot, copies, optimizer_tensors, restore_optimizer
from pipeline.training.figures import by_timestep
from pipeline.training.inputs import Inputs, TextEncodings
from pipeline.training.stage import Frozen, Stage, World, learning_rate
from pipeline.training.vision import hidden_states
from ssr_model.encoder import SSRAdapter
from ssr_model.losses import diffusion_target, ldm_loss, reg_loss, total_loss
from ssr_model.training_step import SSRTrainingModule

# Of the eager gradient's norm; bfloat16 in another order makes some hundredths.
_APART = 0.1


class Losses(NamedTuple):
    """Of a worker's rows."""

    ldm: Tensor
    """Mean of L_LDM."""
    reg: Tensor
    """Mean of L_reg."""
    finite: Tensor
    """(B,) bool: which rows are numbers."""
    bins: Tensor
    """(2, BINS): L_LDM by part of the timesteps, as sums and numbers of rows."""


class Taken(NamedTuple):
    """What a step leaves on the device; reading it is what waits."""

    step: int
    """Steps done, this one included."""
    keys: list[str]
    """Of this worker's rows."""
    finite: Tensor
    """(B,) bool: which of them are numbers."""
    good: Tensor
    """Scalar bool: whether the gradient was a number. If not, the step was not taken."""
    figures: Tensor
    """(4,): loss, L_LDM, L_reg of this worker's rows, and the norm of the averaged gradient."""
    bins: Tensor
    """(2, BINS): L_LDM of this worker's rows by part of the timesteps, and how many they are."""


class Learner:
    """Trains an adapter on one worker.

    Args:
        cfg: the run's settings.
        stage: what to train.
        world: this worker.
        frozen: the frozen models, on the worker's device.
        adapter: the trainables as the stage begins: the same on every worker.
    """

    def __init__(
        self, cfg: TrainConfig, stage: Stage, world: World, frozen: Frozen, adapter: SSRAdapter
    ) -> None:
        self.cfg, self.stage, self.world, self.frozen = cfg, stage, world, frozen
        self.step = 0
        """Optimizer steps done."""
        self.adapter = adapter.to(world.device).train()
        self.parameters = dict(self.adapter.named_parameters())
        self.module = SSRTrainingModule(self.adapter, frozen.unet)
        if cfg.gradient_checkpointing:
            self.module.unet.enable_gradient_checkpointing()
        if cfg.compile:
            self.module.compile()
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
        self._settled, self._proven = world.size <= 2, not cfg.compile

    def __call__(self, inputs: Inputs) -> Taken:
        """One optimizer step. Nothing here waits for the device."""
        ldm, reg, finite, bins = self.backward(inputs)
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
        self.step += 1
        figures = torch.stack([total_loss(ldm, reg, self.cfg.tau), ldm, reg, norm.detach()])
        return Taken(self.step, inputs.keys, finite, good, figures, bins)

    def backward(self, inputs: Inputs) -> Losses:
        """The losses of this worker's rows, detached, and the gradients of their weighted sum,
        averaged over the workers; `micro_batch` rows at a time.
        """
        rows = len(inputs.keys)
        at_once = self.cfg.micro_batch or rows
        parts = []
        for start in range(0, rows, at_once):
            last = start + at_once >= rows
            share = min(at_once, rows - start) / rows
            with contextlib.nullcontext() if last else self._unsynchronised():
                part = self.losses(self.model, inputs.rows(start, start + at_once))
                (total_loss(part.ldm, part.reg, self.cfg.tau) * share).backward()
            parts.append((share, part))
        ldm = _sum(part.ldm.detach() * share for share, part in parts)
        reg = _sum(part.reg.detach() * share for share, part in parts)
        bins = _sum(part.bins for _, part in parts)
        return Losses(ldm, reg, torch.cat([part.finite for _, part in parts]), bins)

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
        misses, states = prediction.detach().float() - target, subject.per_scale.detach().float()
        drawn, embedded = (size.flatten(1).sum(1).isfinite() for size in (misses, states))
        finite = drawn & embedded.view(len(drawn), -1).all(1)
        rows = misses.square().flatten(1).mean(1)
        bins = by_timestep(rows, inputs.timesteps, int(frozen.scheduler.config.num_train_timesteps))
        return Losses(ldm_loss(prediction, target), reg, finite, bins)

    @torch.no_grad()
    def evaluate(self, inputs: Inputs) -> Losses:
        """The losses, without gradients and without the other workers."""
        return self.losses(self.module, inputs)

    def settle(self, inputs: Inputs) -> None:
        """What is done once, before the first step counts.

        With three workers or more DDP chooses its buckets after the first backward pass, and the
        order of a ring's additions depends on them: a resumed run would otherwise differ in the
        last bit. Two addends commute. A compiled step is proven.
        """
        if not self._settled:
            self._gradient(inputs)
            self._settled = True
        if not self._proven:
            self._prove(inputs)
            self._proven = True

    def _prove(self, inputs: Inputs) -> None:
        """The compiled gradient must be the eager one: no loss tells of a compiler that errs.

        Seen: on CPUs the Inductor of torch 2.13 loses the gradient that comes to a U-Net's middle
        through up blocks without attention, as Stable Diffusion has them.
        """
        ours = self._gradient(inputs)
        with torch.compiler.set_stance("force_eager"):
            eager = self._gradient(inputs)
        apart, size = (
            nn.utils.get_total_norm(tensors) for tensors in (torch._foreach_sub(ours, eager), eager)
        )
        if not apart <= _APART * size and size.isfinite():
            raise UserError(
                f"the gradient of the compiled step is off by {apart / size:.0%}: the compiler of "
                f"torch {torch.__version__} errs on this model here; set compile to false"
            )

    def _gradient(self, inputs: Inputs) -> list[Tensor]:
        """Of these rows, in the order of the parameters that have one; nothing stays of it."""
        self.backward(inputs)
        found = [p.grad.clone() for p in self.parameters.values() if p.grad is not None]
        self.optimizer.zero_grad(set_to_none=True)
        return found

    @contextlib.contextmanager
    def best(self) -> Iterator[None]:
        """Within the block the parameters are what is exported: the moving average, if any."""
        trained = {name: p.detach().clone() for name, p in self.parameters.items() if self.ema}
        self._put(self.ema)
        try:
            yield
        finally:
            self._put(trained)

    def release(self) -> None:
        """Give the U-Net back as it was."""
        self.module.release()
        if self.cfg.gradient_checkpointing:
            self.frozen.unet.disable_gradient_checkpointing()  # type: ignore[operator]

    # --- state ---

    def snapshot(self) -> Snapshot:
        """The state now, copied to the CPU."""
        return Snapshot(
            step=self.step,
            trainables=copies(self.parameters),
            optimizer=optimizer_tensors(self.optimizer, self.parameters),
            ema=copies(self.ema),
        )

    def restore(self, snapshot: Snapshot) -> None:
        """Go on from `snapshot`, of an adapter of the same shape."""
        self._put(snapshot.trainables)
        restore_optimizer(self.optimizer, self.parameters, snapshot.optimizer)
        for name, tensor in self.ema.items():
            tensor.copy_(snapshot.ema[name])
        self.step = snapshot.step

    @torch.no_grad()
    def _put(self, tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            self.parameters[name].copy_(tensor)

    def _unsynchronised(self) -> contextlib.AbstractContextManager[None]:
        """Gradients add up here; the last part's backward pass averages the sum."""
        if isinstance(self.model, DistributedDataParallel):
            return self.model.no_sync()
        return contextlib.nullcontext()


def _sum(terms: Iterator[Tensor]) -> Tensor:
    """The sum; of one term that term itself, to the bit."""
    return reduce(Tensor.add, terms)
