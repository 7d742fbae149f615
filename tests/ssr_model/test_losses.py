"""Losses against their formulas."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from ssr_model.losses import diffusion_target, ldm_loss, reg_loss, total_loss


def cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))


def test_reg_loss_forms() -> None:
    c, z = torch.randn(2, 3, 5, 8), torch.randn(2, 5, 8)
    mean = (1 - cosine(c.mean(1), z)).mean()
    torch.testing.assert_close(reg_loss(c, z), mean)
    summed = sum((1 - cosine(c[:, k], z)).mean() for k in range(3))
    torch.testing.assert_close(reg_loss(c, z, "per_scale"), summed)
    with pytest.raises(ValueError, match="mean or per_scale"):
        reg_loss(c, z, "median")  # type: ignore[arg-type]


def test_reg_loss_is_zero_on_the_query_itself() -> None:
    z = torch.randn(2, 5, 8)
    assert reg_loss(z[:, None].repeat(1, 3, 1, 1), z).abs() < 1e-6


def test_padding_does_not_count() -> None:
    c, z = torch.randn(2, 3, 5, 8), torch.randn(2, 5, 8)
    real = torch.tensor([[True, True, False, False, False], [True, False, False, False, False]])
    loss = reg_loss(c, z, padding_mask=real)
    expected = (reg_loss(c[:1, :, :2], z[:1, :2]) + reg_loss(c[1:, :, :1], z[1:, :1])) / 2
    torch.testing.assert_close(loss, expected)
    assert reg_loss(c, z, padding_mask=torch.zeros_like(real)) == 0


def test_ldm_loss_weight_has_mean_one() -> None:
    prediction, target = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    plain = ldm_loss(prediction, target)
    torch.testing.assert_close(plain, (prediction - target).square().mean())
    torch.testing.assert_close(ldm_loss(prediction, target, torch.full((2, 1, 1, 1), 5.0)), plain)
    half = torch.tensor([1.0, 0.0])[:, None, None, None]
    torch.testing.assert_close(
        ldm_loss(prediction, target, half), ldm_loss(prediction[:1], target[:1])
    )
    torch.testing.assert_close(total_loss(plain, torch.tensor(2.0), 0.01), plain + 0.02)


def test_diffusion_target() -> None:
    from diffusers import DDIMScheduler

    latents, noise = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    steps = torch.tensor([10, 900])
    assert diffusion_target(DDIMScheduler(), latents, noise, steps) is noise
    scheduler = DDIMScheduler(prediction_type="v_prediction")
    a = scheduler.alphas_cumprod[steps][:, None, None, None]
    v = a.sqrt() * noise - (1 - a).sqrt() * latents
    torch.testing.assert_close(diffusion_target(scheduler, latents, noise, steps), v)
    odd = SimpleNamespace(config=SimpleNamespace(prediction_type="sample"))
    with pytest.raises(ValueError, match="not supported"):
        diffusion_target(odd, latents, noise, steps)
