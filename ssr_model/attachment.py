"""An SSR-Encoder on a pipeline of diffusers: how a condition travels to the attention layers.

The pipeline hands `cross_attention_kwargs={"ssr": condition}` to its U-Net at every step. A hook
takes the condition out before the U-Net's own code runs (its other layers know no such argument),
hangs the keys and values into the slot of the processors, and a second hook empties the slot. The
ControlNet is never given these arguments by diffusers, and so sees no subject.
"""

from __future__ import annotations

import sys
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ssr_model.attention import SubjectAttention
from ssr_model.branch import SubjectBranch

KEY = "ssr"
"""Key of the condition in `cross_attention_kwargs`."""

KNOWN_PIPELINES = {
    *(f"StableDiffusion{kind}Pipeline" for kind in ("", "Img2Img", "Inpaint", "Depth2Img")),
    *(f"StableDiffusionXL{kind}Pipeline" for kind in ("", "Img2Img", "Inpaint")),
    *(
        f"StableDiffusion{net}{kind}Pipeline"
        for net in ("ControlNet", "XLControlNet", "XLControlNetUnion", "PAG", "XLPAG")
        for kind in ("", "Img2Img", "Inpaint")
    ),
    *(f"AnimateDiff{kind}Pipeline" for kind in ("", "ControlNet", "SDXL", "SparseControlNet")),
    *(f"AnimateDiffVideoToVideo{kind}Pipeline" for kind in ("", "ControlNet")),
}
"""Pipelines of diffusers that tell by `do_classifier_free_guidance` whether their U-Net sees
[unconditional, conditional] samples. Others have other layouts, or a property that is not true."""


@dataclass(eq=False)
class Condition:
    """The subjects of one call of a pipeline, as keys and values of every layer."""

    conditional: SubjectBranch | None
    """Subjects of the prompts; None = none at all."""
    unconditional: SubjectBranch | None = None
    """Subject of the unconditional samples; None = nothing."""
    guided: bool | None = None
    """Whether the batch is [unconditional, conditional]; None = ask the running pipeline."""
    checked: Any = None
    """The timesteps of the call whose prompts were compared with the subjects' rows."""

    @property
    def branches(self) -> list[SubjectBranch]:
        """The branches that are there."""
        return [b for b in (self.conditional, self.unconditional) if b is not None]

    @property
    def scheduled(self) -> bool:
        """Whether the denoising step matters."""
        return any(branch.scheduled for branch in self.branches)


class ConditionArguments(dict[str, Any]):
    """`cross_attention_kwargs` with a condition in them. Only an attached U-Net may open them: the
    layers of another would pass the condition over, and draw a picture without the subject.
    """

    def items(self) -> Any:
        """What a layer that knows no condition asks for."""
        raise ValueError(
            "this pipeline's U-Net does not carry the SSR-Encoder that made the condition: "
            "attach(pipe) first."
        )

    def copy(self) -> Any:
        """As `items`."""
        return self.items()

    def __reduce__(self) -> Any:
        # pipelines keep their last arguments, and may be copied with them
        return ConditionArguments, ({key: self[key] for key in self},)


@dataclass(eq=False)
class Attachment:
    """One U-Net that carries the subject branch, and the pipelines that it was attached by."""

    attention: SubjectAttention | None
    """None in the copy of a U-Net, which carries nothing."""
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

    def __deepcopy__(self, memo: dict[int, Any]) -> Attachment:
        return Attachment(None)

    @property
    def unet(self) -> nn.Module | None:
        """The U-Net that carries the branch."""
        return None if self.attention is None else self.attention.unet

    @property
    def live(self) -> bool:
        """Whether a pipeline that it was attached by still has this U-Net."""
        pipes = (known() for known in self.pipelines)
        return any(pipe is not None and pipe.unet is self.unet for pipe in pipes)

    def add(self, pipe: Any) -> None:
        """Remember a pipeline."""
        if all(known() is not pipe for known in self.pipelines):
            self.pipelines.append(weakref.ref(pipe))

    def remove(self) -> None:
        """Leave the U-Net as it was before `make`."""
        for hook in self.hooks:
            hook.remove()
        self.hooks.clear()
        if self.attention is not None:
            self.attention.remove()

    def _enter(
        self, unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self.attention is None:
            return None
        slot = self.attention.slot
        slot.clear()
        given = kwargs.get("cross_attention_kwargs")
        if not given or KEY not in given:
            return None
        condition = given[KEY]
        rest = {key: given[key] for key in given if key != KEY}
        if condition.conditional is not None:
            sample, timestep, prompt = (
                args[i] if len(args) > i else kwargs[name]
                for i, name in enumerate(("sample", "timestep", "encoder_hidden_states"))
            )
            pipe = _running()
            guided = _guided(condition, pipe)
            _check_batch(condition, guided, prompt, pipe)
            progress = _progress(pipe, timestep) if condition.scheduled else None
            for branch in condition.branches:
                branch.to(sample.device, sample.dtype)
                if progress is not None:
                    branch.at(progress)
            self.attention.reinstall()
            frames = sample.shape[2] if sample.ndim == 5 else 1
            slot.samples = sample.shape[0] * frames
            slot.latent = (sample.shape[-2], sample.shape[-1])
            slot.guided = guided
            slot.conditional = condition.conditional
            slot.unconditional = condition.unconditional if guided else None
        return args, {**kwargs, "cross_attention_kwargs": rest or None}

    def _leave(self, unet: nn.Module, args: Any, output: Any) -> None:
        if self.attention is not None:
            self.attention.slot.clear()


def _running() -> Any:
    """The pipeline that is running the U-Net; None where it is called by hand.

    The hook runs inside that call, so it stands in the stack. What pipelines keep of their calls
    tells nothing: they never forget it, and several may share a U-Net and a condition.
    """
    from diffusers import DiffusionPipeline

    frame = sys._getframe(1)
    while frame is not None:
        pipe = frame.f_locals.get("self")
        if isinstance(pipe, DiffusionPipeline):
            return pipe
        frame = frame.f_back  # type: ignore[assignment]
    return None


def _guided(condition: Condition, pipe: Any) -> bool:
    """Whether the batch is [unconditional, conditional]."""
    if condition.guided is not None:
        return condition.guided
    if not {kind.__name__ for kind in type(pipe).__mro__} & KNOWN_PIPELINES:
        what = "a U-Net that no pipeline runs" if pipe is None else f"a {type(pipe).__name__}"
        raise ValueError(
            f"cannot tell whether {what} is guided: give condition(..., guided=True) where the "
            "U-Net sees [unconditional, conditional] samples, guided=False where it sees one of "
            "each."
        )
    if getattr(pipe, "do_perturbed_attention_guidance", False):
        raise ValueError(
            f"{type(pipe).__name__} runs perturbed copies of its samples, whose subjects an "
            "SSR-Encoder cannot tell apart: set pag_scale=0, or use the pipeline without PAG."
        )
    return bool(pipe.do_classifier_free_guidance)


def _progress(pipe: Any, timestep: Tensor | float) -> float:
    """Where a step lies among the scheduler's distinct timesteps: 0 is the first, 1 the last.

    Schedulers of second order name a timestep twice; both visits are one step.
    """
    if pipe is None:
        raise ValueError("a subject's schedule needs a pipeline that runs, for its timesteps.")
    timesteps = torch.as_tensor(pipe.scheduler.timesteps).unique().flip(0)
    here = torch.as_tensor(timestep).flatten()[0].to(timesteps)
    step = int((timesteps - here).abs().argmin())
    return step / max(1, len(timesteps) - 1)


def _check_batch(condition: Condition, guided: bool, prompt: Tensor, pipe: Any) -> None:
    """Refuse a batch whose samples are not those of the condition's prompts, in their order.

    prompt: the U-Net's text, (B, tokens, width). Images of one prompt have one text at the first
    step of a call; callbacks may change it afterwards.
    """
    assert condition.conditional is not None
    rows = len(condition.conditional.rows)
    if guided and len(prompt) % 2:
        raise ValueError(
            f"a guided batch is [unconditional, conditional], but this one has {len(prompt)} "
            "samples: give condition(..., guided=False) if the pipeline is not guided."
        )
    samples = prompt[len(prompt) // 2 :] if guided else prompt
    if len(samples) % rows:
        raise ValueError(
            f"the condition was made for {rows} prompts, and the pipeline runs {len(samples)} "
            "samples: give one list of subjects for all, or one per prompt."
        )
    # every call sets its scheduler's timesteps anew
    call = None if pipe is None else pipe.scheduler.timesteps
    if rows > 1 and (call is None or condition.checked is not call):
        each = samples.unflatten(0, (rows, -1))
        if not torch.equal(each, each[:, :1].expand_as(each)):
            raise ValueError(
                f"the condition was made for {rows} prompts, and the pipeline runs more: give one "
                "list of subjects for all, or one per prompt."
            )
    condition.checked = call
