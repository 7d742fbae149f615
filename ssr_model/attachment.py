"""An SSR-Encoder on a pipeline of diffusers: how a condition travels to the attention layers.

The pipeline hands `cross_attention_kwargs={"ssr": condition}` to its U-Net at every step. A hook
takes the condition out before the U-Net's own code runs (its other layers know no such argument),
hangs the keys and values into the slot of the processors, and a second hook empties the slot. The
ControlNet is never given these arguments by diffusers, and so sees no subject.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ssr_model.attention import Slot, SubjectAttention
from ssr_model.branch import SubjectBranch

KEY = "ssr"
"""Key of the condition in `cross_attention_kwargs`."""


@dataclass(eq=False)
class Condition:
    """The subjects of one call of a pipeline, as keys and values of every layer."""

    conditional: SubjectBranch | None
    """Subjects of the prompts; None = none at all."""
    unconditional: SubjectBranch | None = None
    """Subject of the unconditional samples; None = nothing."""
    guided: bool | None = None
    """Whether the batch is [unconditional, conditional]; None = ask the running pipeline."""

    @property
    def branches(self) -> list[SubjectBranch]:
        """The branches that are there."""
        return [b for b in (self.conditional, self.unconditional) if b is not None]

    @property
    def scheduled(self) -> bool:
        """Whether the denoising step matters."""
        return any(branch.scheduled for branch in self.branches)


@dataclass(eq=False)
class Attachment:
    """One U-Net that carries the subject branch, and the pipelines that were seen to use it."""

    attention: SubjectAttention
    pipelines: list[weakref.ref[Any]] = field(default_factory=list)
    hooks: list[Any] = field(default_factory=list)

    @classmethod
    def make(cls, unet: nn.Module, layers: dict[str, int]) -> Attachment:
        """Install processors and hooks."""
        attached = cls(SubjectAttention.install(unet, layers))
        attached.hooks = [
            unet.register_forward_pre_hook(attached._enter, with_kwargs=True),
            unet.register_forward_hook(attached._leave, always_call=True),
        ]
        return attached

    @property
    def slot(self) -> Slot:
        """What the U-Net's processors attend to."""
        return self.attention.slot

    def add(self, pipe: Any) -> None:
        """Remember a pipeline, to ask it whether it runs guided."""
        if all(known() is not pipe for known in self.pipelines):
            self.pipelines.append(weakref.ref(pipe))

    def remove(self) -> None:
        """Leave the U-Net as it was before `make`."""
        for hook in self.hooks:
            hook.remove()
        self.hooks.clear()
        self.attention.remove()

    def _enter(
        self, unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        self.slot.clear()
        given = kwargs.get("cross_attention_kwargs")
        if not given or KEY not in given:
            return None
        condition = given[KEY]
        rest = {key: value for key, value in given.items() if key != KEY}
        if condition.conditional is not None:
            sample = args[0] if args else kwargs["sample"]
            for branch in condition.branches:
                branch.to(sample.device, sample.dtype)
                if condition.scheduled:
                    timestep = args[1] if len(args) > 1 else kwargs["timestep"]
                    branch.at(self._progress(condition, timestep))
            self.attention.reinstall()
            self.slot.latent = (sample.shape[-2], sample.shape[-1])
            self.slot.guided = self._guided(condition)
            self.slot.conditional = condition.conditional
            self.slot.unconditional = condition.unconditional if self.slot.guided else None
        return args, {**kwargs, "cross_attention_kwargs": rest or None}

    def _leave(self, unet: nn.Module, args: Any, output: Any) -> None:
        self.slot.clear()

    def _guided(self, condition: Condition) -> bool:
        if condition.guided is not None:
            return condition.guided
        pipe = self._running(condition)
        if pipe is None:
            raise ValueError(
                "cannot tell whether this call is guided: attach the SSR-Encoder to the pipeline "
                "that runs, or give condition(..., guided=True or False)."
            )
        if getattr(pipe, "do_perturbed_attention_guidance", False):
            raise ValueError(
                f"{type(pipe).__name__} runs perturbed copies of its samples, whose subjects an "
                "SSR-Encoder cannot tell apart: set pag_scale=0, or use the pipeline without PAG."
            )
        return bool(pipe.do_classifier_free_guidance)

    def _progress(self, condition: Condition, timestep: Tensor | float) -> float:
        """Where a step lies among the scheduler's: 0 is the first, 1 the last."""
        pipe = self._running(condition)
        if pipe is None:
            raise ValueError(
                "a subject's schedule needs the running pipeline's timesteps: attach the "
                "SSR-Encoder to that pipeline."
            )
        timesteps = pipe.scheduler.timesteps
        here = torch.as_tensor(timestep).flatten()[0].to(timesteps)
        step = int((timesteps - here).abs().argmin())
        return step / max(1, len(timesteps) - 1)

    def _running(self, condition: Condition) -> Any:
        """The attached pipeline that was called with this condition."""
        for known in self.pipelines:
            pipe = known()
            running = getattr(pipe, "_cross_attention_kwargs", None)
            if pipe is not None and running and running.get(KEY) is condition:
                return pipe
        return None
