"""One model for every base and every vision tower: shapes come from their configs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import CLIPTextConfig, CLIPVisionConfig, CLIPVisionModel

from ssr_model import SSRAdapter, SSRConfig
from ssr_model.losses import diffusion_target, ldm_loss, reg_loss
from ssr_model.training_step import SSRTrainingModule
from ssr_model.vision import vision_features

# Widths are a sixteenth of the real ones; depths, heads, and what the U-Nets do otherwise are real.
BASES: dict[str, dict[str, Any]] = {
    "SD 1.x": {"cross_attention_dim": 48, "attention_head_dim": 8},
    "SD 2.x": {
        "cross_attention_dim": 64,
        "attention_head_dim": (2, 4),
        "use_linear_projection": True,
        "upcast_attention": True,
    },
    "SDXL": {
        "cross_attention_dim": 128,
        "attention_head_dim": (2, 4),
        "use_linear_projection": True,
        "transformer_layers_per_block": (1, 3),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 80 + 6 * 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    },
}
TEXTS = {"SD 1.x": (48,), "SD 2.x": (64,), "SDXL": (48, 80)}
TOWERS = {"ViT-L/14": (64, 24), "ViT-H/14": (80, 32)}
REAL_TEXTS = {"SD 1.x": (768,), "SD 2.x": (1024,), "SDXL": (768, 1280)}
REAL_TOWERS = {"ViT-L/14": (1024, 24), "ViT-H/14": (1280, 32)}


def tiny_unet(base: str) -> Any:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    return UNet2DConditionModel(**{**shape, **BASES[base]})


def texts(widths: tuple[int, ...]) -> list[CLIPTextConfig]:
    return [CLIPTextConfig(hidden_size=width, num_attention_heads=4) for width in widths]


@pytest.mark.parametrize("variant", ["paper", "released"])
@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("base", BASES)
def test_a_training_step_on_every_base_and_tower(base: str, tower: str, variant: Any) -> None:
    width, depth = TOWERS[tower]
    vision_config = CLIPVisionConfig(
        hidden_size=width, num_hidden_layers=depth, intermediate_size=32,
        num_attention_heads=16, image_size=28, patch_size=14,
    )  # fmt: skip
    vision, unet = CLIPVisionModel(vision_config).eval(), tiny_unet(base)
    config = SSRConfig.from_models(vision_config, texts(TEXTS[base]), unet, variant=variant)
    assert (config.vision_dim, config.text_dim) == (width, sum(TEXTS[base]))
    assert len(config.depths) == 6 and config.depths[-1] == depth
    adapter = SSRAdapter(config)
    adapter.init_from_unet(unet)
    module = SSRTrainingModule(adapter, unet)
    torch.manual_seed(1)
    features = vision_features(vision, torch.randn(2, 3, 28, 28), config.depths)
    assert {f.shape for f in features.values()} == {(2, 1 + 4, width)}
    z_q, prompt = torch.randn(2, 7, config.text_dim), torch.randn(2, 7, config.text_dim)
    added = None
    if base == "SDXL":
        added = {"text_embeds": torch.randn(2, 80), "time_ids": torch.ones(2, 6)}
    t = torch.tensor([10, 700])
    for kind in ("epsilon", "v_prediction"):
        from diffusers import DDIMScheduler

        latents, noise = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
        scheduler = DDIMScheduler(prediction_type=kind)
        noisy = scheduler.add_noise(latents, noise, t)
        module.zero_grad()
        prediction, subject = module(noisy, t, prompt, z_q, features, added_cond_kwargs=added)
        assert subject.per_scale.shape == (2, 6, 7, config.text_dim)
        ldm = ldm_loss(prediction, diffusion_target(scheduler, latents, noise, t))
        (ldm + 0.01 * reg_loss(subject.per_scale, subject.z_q)).backward()
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
        assert all(p.grad is None for p in [*unet.parameters(), *vision.parameters()])


@pytest.mark.parametrize("tower", REAL_TOWERS)
@pytest.mark.parametrize("base", BASES)
def test_real_sizes(base: str, tower: str) -> None:
    """The real models' numbers, without their memory."""
    from diffusers import UNet2DConditionModel

    width, depth = REAL_TOWERS[tower]
    given = {
        "SD 1.x": {"cross_attention_dim": 768},
        "SD 2.x": {
            "cross_attention_dim": 1024,
            "attention_head_dim": [5, 10, 20, 20],
            "use_linear_projection": True,
        },
        "SDXL": {
            "sample_size": 128,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": [1, 2, 10],
            "attention_head_dim": [5, 10, 20],
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
    }[base]
    with torch.device("meta"):
        unet = UNet2DConditionModel(**given)
        vision = CLIPVisionConfig(
            hidden_size=width, num_hidden_layers=depth, num_attention_heads=16
        )
        config = SSRConfig.from_models(vision, texts(REAL_TEXTS[base]), unet, variant="released")
        adapter = SSRAdapter(config)
    layers = sum(p.numel() for p in adapter.layers.parameters())
    encoder = sum(p.numel() for p in adapter.encoder.parameters())
    assert len(config.layers) == {"SD 1.x": 16, "SD 2.x": 16, "SDXL": 70}[base]
    assert layers == 2 * config.text_dim * sum(config.layers.values())
    if (base, tower) == ("SD 1.x", "ViT-L/14"):  # as counted on the authors' files
        assert (layers, encoder) == (19_169_280, 6_424_064)
        assert config.depths == (4, 8, 12, 16, 20, 24)
