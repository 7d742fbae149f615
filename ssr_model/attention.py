"""Subject cross-attention in a U-Net of diffusers (Eq. 4).

    O = Attn(Q, K, V; c_t) + lambda * Attn(Q, K_S, V_S; c_s)

One processor class serves every layer, for training and for inference. What it attends to hangs in
a `Slot` that the processors of one U-Net share: the subject's keys and values, computed once per
call of the pipeline and used at every denoising step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssr_model.aligner import split_heads


@dataclass
class SubjectBranch:
    """Keys and values of the subjects of n samples, ready for every layer.

    Subject scales are already in the values; a sample without a subject has values of zero, so that
    it gets exactly nothing.
    """

    keys: dict[str, Tensor]
    """{processor name: (n, T, hidden)}."""
    values: dict[str, Tensor]
    """{processor name: (n, T, hidden)}."""
    mask: Tensor | None = None
    """(n, T), true at real subject tokens; None where all are."""

    @classmethod
    def deal(
        cls,
        pairs: Mapping[str, tuple[Tensor, Tensor]],
        scales: Sequence[float],
        counts: Sequence[int],
    ) -> SubjectBranch:
        """Keys and values of M subjects, dealt to prompts: the first counts[0] to the first, ...

        pairs: {processor name: (keys, values)}, each (M, tokens per subject, hidden); scales: of
        the M subjects. A prompt's subjects are concatenated over tokens; shorter rows are padded.
        """
        most, even = max(counts), len(set(counts)) == 1
        first_key = next(iter(pairs.values()))[0]
        subjects, per_subject = first_key.shape[:2]
        # row i: the subjects of prompt i, then padding, which points at an extra row of zeros
        index = torch.full((len(counts), most), subjects, device=first_key.device)
        start = 0
        for row, count in enumerate(counts):
            index[row, :count] = torch.arange(start, start + count)
            start += count

        def dealt(tensor: Tensor) -> Tensor:
            if not even:
                tensor = torch.cat([tensor, torch.zeros_like(tensor[:1])])[index.flatten()]
            return tensor.unflatten(0, (len(counts), most)).flatten(1, 2)

        weight = first_key.new_tensor(list(scales))[:, None, None]
        mask = None
        if not even:
            # a prompt without subjects looks at its zeros: nothing is added, and nothing is NaN
            empty = (index == subjects).all(dim=1, keepdim=True)
            mask = ((index != subjects) | empty).repeat_interleave(per_subject, dim=1)
        return cls(
            {name: dealt(key) for name, (key, _) in pairs.items()},
            {name: dealt(value * weight) for name, (_, value) in pairs.items()},
            mask,
        )

    def to(self, device: torch.device, dtype: torch.dtype) -> SubjectBranch:
        """The same branch elsewhere; itself where nothing changes."""
        if all(t.device == device and t.dtype == dtype for t in self.keys.values()):
            return self
        return SubjectBranch(
            {name: t.to(device, dtype) for name, t in self.keys.items()},
            {name: t.to(device, dtype) for name, t in self.values.items()},
            None if self.mask is None else self.mask.to(device),
        )

    def attend(self, name: str, query: Tensor) -> Tensor:
        """Attn(Q, K_S, V_S) at one layer.

        query: (n * g, heads, N, d), the g samples (images per prompt, video frames) of each of the
        n side by side. They share keys and values, so they are folded into one long query instead
        of repeating the keys. Returns the query's shape.
        """
        key = self.keys[name]
        if query.shape[0] % key.shape[0]:
            raise ValueError(
                f"the condition was made for {key.shape[0]} prompts, and the pipeline runs "
                f"{query.shape[0]} samples: give one list of subjects for all, or one per prompt."
            )
        rows, group = key.shape[0], query.shape[0] // key.shape[0]
        _, heads, tokens, _ = query.shape
        if group > 1:
            query = query.unflatten(0, (rows, group)).transpose(1, 2).flatten(2, 3)
        mask = None if self.mask is None else self.mask[:, None, None, :]
        key, value = split_heads(key, heads), split_heads(self.values[name], heads)
        if key.dtype != query.dtype:
            key, value = key.to(query.dtype), value.to(query.dtype)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        if group > 1:
            out = out.unflatten(2, (group, tokens)).transpose(1, 2).flatten(0, 1)
        return out


@dataclass
class Slot:
    """What the processors of one U-Net attend to in the running forward pass."""

    conditional: SubjectBranch | None = None
    """Subjects of the conditional samples (all samples where there is no guidance)."""
    unconditional: SubjectBranch | None = None
    """Subjects of the unconditional samples; None = nothing."""
    guided: bool = False
    """The batch is [unconditional, conditional], as classifier-free guidance has it."""

    def clear(self) -> None:
        """Attend to nothing."""
        self.conditional = self.unconditional = None
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
        slot = self.slot
        if not slot.guided:
            return (
                text
                if slot.conditional is None
                else text + slot.conditional.attend(self.name, query)
            )
        halves = []
        for branch, part, part_query in zip(
            (slot.unconditional, slot.conditional), text.chunk(2), query.chunk(2), strict=True
        ):
            halves.append(part if branch is None else part + branch.attend(self.name, part_query))
        return torch.cat(halves)


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
