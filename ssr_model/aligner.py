"""Token-to-patch aligner (Eq. 1-2): which patches of the image the query speaks of."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ssr_model.config import SSRConfig

NEVER = -1e30
"""Logit of an image token that the mask leaves out."""


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, N, heads * d) -> (B, heads, N, d)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


class TokenToPatchAligner(nn.Module):
    """A = softmax(W^Q z_q (W^K z_0)^T / sqrt(d)), per head; a mask confines it to patches."""

    def __init__(self, config: SSRConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.scale = 1 / math.sqrt(config.head_dim)
        self.mask_form = config.mask_form
        self.mask_weight = config.mask_weight
        self.to_q = nn.Linear(config.text_dim, config.inner_dim, bias=False)
        self.to_k = nn.Linear(config.vision_dim, config.inner_dim, bias=False)

    def forward(self, z_q: Tensor, z_0: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attention of query tokens over image tokens.

        z_q: (B, N_q, text width); z_0: (B, N_i, vision width), CLS first.
        mask: (B, N_i) in [0, 1], 1 where the subject is; rows of ones leave their sample as it is.
        Returns A (B, heads, N_q, N_i), rows sum to one.
        """
        # scaled before the product, which half precision might not hold
        query = split_heads(self.to_q(z_q), self.heads) * self.scale
        key = split_heads(self.to_k(z_0), self.heads)
        logits = query @ key.transpose(-1, -2)
        if mask is not None:
            if mask.shape != (z_0.shape[0], z_0.shape[1]):
                raise ValueError(
                    f"the mask must be {(z_0.shape[0], z_0.shape[1])} (batch, image tokens), "
                    f"not {tuple(mask.shape)}."
                )
            logits = logits.float() + self.mask_logits(mask.float())[:, None, None, :]
        # softmax in float32: in half precision the logits of deep CLIP features lose their order
        return logits.float().softmax(dim=-1).to(query.dtype)

    def mask_logits(self, mask: Tensor) -> Tensor:
        """What the mask adds to the logits, (B, N_i).

        `reweight` (paper): log m, for softmax(s + log m) = m e^s / sum m e^s: A reweighted by the
        mask, rows summing to one. `bias` (released): m' - (1 - m') w with m' = [1, w m].
        """
        if self.mask_form == "reweight":
            # a huge negative number instead of -inf: an all-zero row stays finite (uniform)
            return torch.where(mask > 0, mask.clamp(min=1e-6).log(), NEVER)
        weighted = mask * self.mask_weight
        weighted = torch.cat([torch.ones_like(weighted[:, :1]), weighted[:, 1:]], dim=1)
        return weighted - (1 - weighted) * self.mask_weight
