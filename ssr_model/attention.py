"""Subject cross-attention in a U-Net of diffusers (Eq. 4).

    O = Attn(Q, K, V; c_t) + lambda * Attn(Q, K_S, V_S; c_s)

One processor class serves every layer, for training and for inference. What it attends to hangs in
a `Slot` that the processors of one U-Net share: the subject's keys and values, computed once per
call of the pipeline and used at every denoising step.
"""

from __future__ import annotations

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

    def clear(self) -> None:
        """Attend to nothing."""
        self.conditional = self.unconditional = self.latent = None
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
            return self.original(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        if encoder_hidden_states is None or hidden_states.ndim != 3:
            raise ValueError(f"{self.name} is not a text cross-attention over tokens.")

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
    slot: Slot = field(default_factory=Slot)
    originals: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def install(cls, unet: nn.Module, layers: Mapping[str, int]) -> SubjectAttention:
        """Replace the processors of the named cross-attention layers; the rest is not touched."""
        processors = {name: _attention(unet, name).processor for name in layers}
        for name, processor in processors.items():
            if isinstance(processor, SubjectAttnProcessor):
                raise ValueError(
                    "this U-Net already carries an SSR-Encoder: detach that one first."
                )
            _check_replaceable(name, processor)
        installed = cls(unet, originals=processors)
        installed.reinstall()
        return installed

    def reinstall(self) -> None:
        """Take back layers whose processors someone replaced since, as attention slicing does."""
        for name in self.originals:
            attention = _attention(self.unet, name)
            current = attention.processor
            if isinstance(current, SubjectAttnProcessor):
                continue
            _check_replaceable(name, current)
            self.originals[name] = current
            attention.set_processor(SubjectAttnProcessor(name, self.slot, current))

    def remove(self) -> None:
        """Put the original processors back, except where someone replaced ours since."""
        for name, original in self.originals.items():
            attention = _attention(self.unet, name)
            if isinstance(attention.processor, SubjectAttnProcessor):
                attention.set_processor(original)
        self.originals.clear()
        self.slot.clear()


PLAIN_PROCESSORS = {
    "AttnProcessor",
    "AttnProcessor2_0",
    "SlicedAttnProcessor",
    "XFormersAttnProcessor",
}
"""Processors of diffusers that compute plain text attention, and so may be replaced."""


def _attention(unet: nn.Module, name: str) -> Any:
    return unet.get_submodule(name.removesuffix(".processor"))


def _check_replaceable(name: str, processor: Any) -> None:
    kind = type(processor).__name__
    if kind not in PLAIN_PROCESSORS:
        raise ValueError(
            f"{name} is a {kind}, which does more than plain text attention: "
            "unload what installed it (an IP-Adapter, say) before attaching an SSR-Encoder."
        )
