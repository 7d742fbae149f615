"""Training losses (Eq. 5-7): L = L_LDM + tau * L_reg."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssr_model.config import RegForm


def diffusion_target(scheduler: Any, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """What the U-Net should predict, by the scheduler's `prediction_type`.

    latents, noise: (B, C, h, w), latents already scaled; timesteps: (B,).
    """
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return noise
    if kind == "v_prediction":
        return scheduler.get_velocity(latents, noise, timesteps)
    raise ValueError(f"prediction_type {kind!r} is not supported; use epsilon or v_prediction.")


def ldm_loss(prediction: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """L_LDM = mean ||target - prediction||^2 in float32 (Eq. 5).

    prediction, target: (B, C, h, w). weight: broadcastable to them, normalised to mean one; all
    zeros give zero. Returns a scalar.
    """
    if weight is None:
        return F.mse_loss(prediction.float(), target.float())
    squares = (prediction.float() - target.float()).square()
    weight = weight.float().expand_as(squares)
    return (squares * weight).sum() / weight.sum().clamp(min=torch.finfo(weight.dtype).tiny)


def reg_loss(
    per_scale: Tensor, z_q: Tensor, form: RegForm = "mean", padding_mask: Tensor | None = None
) -> Tensor:
    """L_reg: the subject embedding keeps the meaning of its query (Eq. 6).

    per_scale: c_s^k, (B, K, N_q, D); z_q: (B, N_q, D).
    form: `mean` = 1 - cos(mean_k c_s^k, z_q), averaged over tokens; `per_scale` (released) = sum
    over k of the mean over tokens of 1 - cos(c_s^k, z_q).
    padding_mask: (B, N_q), true at real tokens; only these count. A sample without any counts as
    zero.
    """
    per_scale, z_q = per_scale.float(), z_q.float()
    if form == "mean":
        distance = 1 - F.cosine_similarity(per_scale.mean(dim=1), z_q, dim=-1)
    elif form == "per_scale":
        distance = (1 - F.cosine_similarity(per_scale, z_q[:, None], dim=-1)).sum(dim=1)
    else:
        raise ValueError(f"form must be mean or per_scale, not {form!r}.")
    if padding_mask is None:
        return distance.mean()
    real = padding_mask.to(distance.dtype)
    return ((distance * real).sum(dim=1) / real.sum(dim=1).clamp(min=1)).mean()


def total_loss(ldm: Tensor, reg: Tensor, tau: float) -> Tensor:
    """L = L_LDM + tau * L_reg (Eq. 7)."""
    return torch.add(ldm, reg, alpha=tau)
