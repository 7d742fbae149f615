"""Subject cross-attention in a U-Net of diffusers (Eq. 4).

    O = Attn(Q, K, V; c_t) + lambda * Attn(Q, K_S, V_S; c_s)

One processor class serves every layer, for training and for inference. What it attends to hangs in
a `Slot` that the processors of one U-Net share: the subject's keys and values, computed once per
call of the pipeline and used at every denoising step.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssr_model.aligner import split_heads
from ssr_model.branch import Grid, SubjectBranch


@dataclass
class Slot:
    """What the processors of one U-Net attend to in the running forward pass."""

    conditional: SubjectBranch | None = None
    """Subjects of the conditional samples (all samples where there is no guidance)."""
    unconditional: SubjectBranch | None = None
    """Subjects of the unconditional samples; None = nothing."""
    guided: bool = False
    """The batch is [unconditional, conditional], as classifier-free guidance has it."""
    latent: Grid | None = None
    """Rows and columns of the U-Net's input."""
    samples: int | None = None
    """Samples of the U-Net's input, frames counted; None = not known."""
    closed: bool = False
    """Its processors were removed for good."""

    def clear(self) -> None:
        """Attend to nothing."""
        self.conditional = self.unconditional = self.latent = self.samples = None
        self.guided = False


class SubjectAttnProcessor:
    """Attention processor of one cross-attention layer.

    Without a subject it is the processor that was there before, to the bit. It owns no weights, so
    the U-Net's state_dict stays its own.
    """

    def __init__(self, name: str, slot: Slot, original: Any) -> None:
        self.name = name
        self.slot = slot
        self.original = original

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.original, memo)  # a copy of the U-Net carries no subjects

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """Eq. 4: (B, N, hidden) and the prompt's (B, text tokens, text width) -> (B, N, hidden)."""
        slot = self.slot
        if slot.conditional is None and slot.unconditional is None:
            given = {} if temb is None else {"temb": temb}  # the sliced processor knows none
            return self.original(
                attn, hidden_states, encoder_hidden_states, attention_mask, **given
            )
        if encoder_hidden_states is None or hidden_states.ndim != 3:
            raise ValueError(f"{self.name} is not a text cross-attention over tokens.")
        if slot.samples not in (None, hidden_states.shape[0]):
            raise ValueError(
                f"{self.name} sees {hidden_states.shape[0]} of {slot.samples} samples at a time, "
                "so it is not known whose they are: turn off what splits them (free-noise split "
                "inference, say)."
            )

        residual = hidden_states
        if attn.norm_cross:
            encoder_hidden_states = attn.norm_encoder_hidden_states(encoder_hidden_states)
        query = split_heads(attn.to_q(hidden_states), attn.heads)
        key = split_heads(attn.to_k(encoder_hidden_states), attn.heads)
        value = split_heads(attn.to_v(encoder_hidden_states), attn.heads)
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        if attn.norm_k is not None:
            key = attn.norm_k(key)
        if attention_mask is not None:
            batch, text_tokens = encoder_hidden_states.shape[:2]
            attention_mask = attn.prepare_attention_mask(attention_mask, text_tokens, batch)
            attention_mask = attention_mask.view(batch, attn.heads, -1, attention_mask.shape[-1])
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)
        out = self._add_subject(out, query)
        out = attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(2)))
        if attn.residual_connection:
            out = out + residual
        return out / attn.rescale_output_factor

    def _add_subject(self, text: Tensor, query: Tensor) -> Tensor:
        """Text + subject attention, (B, heads, N, d); each half of a guided batch has its own."""
        if not self.slot.guided:
            return self._add(self.slot.conditional, text, query)
        branches = (self.slot.unconditional, self.slot.conditional)
        halves = zip(branches, text.chunk(2), query.chunk(2), strict=True)
        return torch.cat([self._add(*half) for half in halves])

    def _add(self, branch: SubjectBranch | None, text: Tensor, query: Tensor) -> Tensor:
        subject = None if branch is None else branch.attend(self.name, query, self.slot.latent)
        return text if subject is None else text + subject


@dataclass
class SubjectAttention:
    """The processors put into one U-Net, and what was there before."""

    unet: nn.Module
    layers: dict[str, Any]
    """The attention modules themselves: their names change where diffusers wraps blocks."""
    originals: dict[str, Any]
    slot: Slot = field(default_factory=Slot)

    @classmethod
    def install(cls, unet: nn.Module, layers: Mapping[str, int]) -> SubjectAttention:
        """Replace the processors of the named cross-attention layers; the rest is not touched."""
        attentions = {n: unet.get_submodule(n.removesuffix(".processor")) for n in layers}
        originals = {name: _left_by_others(each.processor) for name, each in attentions.items()}
        for name, processor in originals.items():
            if isinstance(processor, SubjectAttnProcessor):
                raise ValueError(
                    "this U-Net already carries an SSR-Encoder: detach that one first "
                    "(or release the training module)."
                )
            _check_replaceable(name, processor)
        installed = cls(unet, attentions, originals)
        for name, attention in attentions.items():
            installed._put(name, attention)
        return installed

    def reinstall(self) -> None:
        """Take back layers whose processors someone replaced since, as attention slicing does."""
        for name, attention in self.layers.items():
            if not isinstance(attention.processor, SubjectAttnProcessor):
                _check_replaceable(name, attention.processor)
                self.originals[name] = attention.processor
                self._put(name, attention)

    def remove(self) -> None:
        """Put the original processors back, except where someone replaced ours since."""
        for name, attention in self.layers.items():
            if isinstance(attention.processor, SubjectAttnProcessor):
                attention.set_processor(self.originals[name])
        self.layers, self.originals = {}, {}
        self.slot.clear()
        self.slot.closed = True

    def _put(self, name: str, attention: Any) -> None:
        attention.set_processor(SubjectAttnProcessor(name, self.slot, self.originals[name]))


PLAIN_PROCESSORS = {
    "AttnProcessor",
    "AttnProcessor2_0",
    "SlicedAttnProcessor",
    "XFormersAttnProcessor",
}
"""Processors of diffusers that compute plain text attention, and so may be replaced."""


def _left_by_others(processor: Any) -> Any:
    """A processor, without those of ours that came back after their removal: diffusers keeps
    processors aside while projections are fused.
    """
    while isinstance(processor, SubjectAttnProcessor) and processor.slot.closed:
        processor = processor.original
    return processor


def _check_replaceable(name: str, processor: Any) -> None:
    kind = type(processor).__name__
    if kind not in PLAIN_PROCESSORS:
        raise ValueError(
            f"{name} is a {kind}, which does more than plain text attention: "
            "undo what installed it (unload_ip_adapter, unfuse_qkv_projections) first."
        )
