"""The method written out, slowly: plain matrices, one sample and one subject after the other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from ssr_model import SSREncoder, Subject
from ssr_model.encoder import layer_key


@dataclass
class Part:
    """One subject at one layer: its tokens, how strongly it acts, where, and when."""

    tokens: torch.Tensor
    scale: float = 1.0
    region: np.ndarray | None = None
    """(h, w), multiples of every layer's grid."""
    schedule: list[float] | None = None
    """A factor for each step."""


class Written:
    """Eq. 4 in place of a processor; sample b of the U-Net's batch (or its frames) has parts[b].

    With m(p) the share of position p in a subject's region: O(p) = text + max_s m_s(p) * softmax
    over the tokens of all subjects, each weighted by its m_s(p), of the values times their scales.
    """

    def __init__(self, layer: Any, parts: list[list[Part]], latent: tuple[int, int]) -> None:
        self.layer, self.parts, self.latent, self.step = layer, parts, latent, 0

    def __call__(self, attn: Any, x: Any, encoder_hidden_states: Any, *_: Any, **__: Any) -> Any:
        rows = []
        frames = len(x) // len(self.parts)
        for b, row in enumerate(x):
            c = encoder_hidden_states[b]
            out = self.attend(attn, row, attn.to_k(c), attn.to_v(c))
            out = out + self.subjects(attn, row, self.parts[b // frames])
            rows.append(attn.to_out[0](out))
        self.step += 1
        return torch.stack(rows)

    def subjects(self, attn: Any, row: Any, parts: list[Part]) -> Any:
        keys, values, shares = [], [], []
        for part in parts:
            scale = part.scale * (part.schedule[self.step] if part.schedule else 1)
            if scale == 0:
                continue
            keys.append(self.layer.to_k(part.tokens))
            values.append(self.layer.to_v(part.tokens) * scale)
            shares.append(self.share(part.region, len(row)).to(row).expand(len(part.tokens), -1))
        if not keys:
            return torch.zeros_like(row)
        m = torch.cat(shares).T  # (positions, tokens)
        return self.attend(attn, row, torch.cat(keys), torch.cat(values), m) * m.amax(1)[:, None]

    def share(self, region: np.ndarray | None, positions: int) -> torch.Tensor:
        if region is None:
            return torch.ones(positions)
        h, w = self.latent
        while h * w > positions:
            h, w = h // 2, w // 2
        blocks = region.reshape(h, region.shape[0] // h, w, region.shape[1] // w)
        return torch.from_numpy(blocks.astype(np.float32).mean(axis=(1, 3)).flatten())

    def attend(self, attn: Any, x: Any, k: Any, v: Any, m: Any = None) -> Any:
        q, k, v = (t.unflatten(-1, (attn.heads, -1)).transpose(0, 1) for t in (attn.to_q(x), k, v))
        weights = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1)
        if m is not None:
            weights = weights * m
            weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-30)
        return (weights @ v).transpose(0, 1).flatten(1)


def query(ssr: SSREncoder, text: str) -> Any:
    """z_q: the last hidden state, or for SDXL the two states before the last layers."""
    states = []
    for encoder, tokenizer in zip(ssr.queries.encoders, ssr.queries.tokenizers, strict=True):
        ids = tokenizer(text, padding="max_length", return_tensors="pt").input_ids
        out = encoder(ids, output_hidden_states=True)
        states.append(out.hidden_states[-2] if ssr.queries.penultimate else out.last_hidden_state)
    return torch.cat(states, dim=-1)


def tokens(ssr: SSREncoder, subject: Subject) -> Any:
    """Subject tokens, step by step, of an image of 32 x 32 pixels, the vision model's own size."""
    pixels = ssr.image_processor(Image.fromarray(subject.image), return_tensors="pt").pixel_values
    states = ssr.vision(pixels, output_hidden_states=True).hidden_states
    mask = None
    if subject.mask is not None:
        blocks = torch.from_numpy(subject.mask).float().reshape(8, 4, 8, 4).mean(dim=(1, 3))
        mask = torch.cat([torch.zeros(1), blocks.flatten()])[None]
    features = {d: states[d] for d in ssr.config.depths}
    return ssr.adapter.encoder(query(ssr, subject.query or ""), features, mask).tokens[0]


def write_out(
    ssr: SSREncoder,
    unet: Any,
    rows: list[list[Subject]],
    latent: tuple[int, int] = (8, 8),
    dtype: torch.dtype | None = None,
) -> None:
    """Put written-out processors into the U-Net: one row of subjects per sample of its batch."""
    made = {id(s): tokens(ssr, s).to(dtype) for row in rows for s in row}
    for name in ssr.config.layers:
        layer = ssr.adapter.layers[layer_key(name)]
        parts = []
        for row in rows:
            parts.append(
                [
                    Part(
                        made[id(s)],
                        next((v for k, v in s.scale.items() if name.startswith(k)), 1.0)
                        if isinstance(s.scale, dict)
                        else s.scale,
                        s.region,
                        s.schedule,
                    )
                    for s in row
                ]
            )
        processor = Written(layer, parts, latent)
        unet.get_submodule(name.removesuffix(".processor")).set_processor(processor)


def close(a: torch.Tensor, b: torch.Tensor, atol: float = 2e-3) -> None:
    torch.testing.assert_close(a, b, atol=atol, rtol=atol)
