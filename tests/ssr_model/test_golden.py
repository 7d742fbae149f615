"""The `released` variant against outputs of the authors' own code, through their files."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ssr_model import released
from ssr_model.attention import Slot, SubjectAttnProcessor
from ssr_model.branch import SubjectBranch
from ssr_model.encoder import SSRAdapter
from ssr_model.images import mask_tokens
from ssr_model.subject import Subject

GOLDEN = Path(os.environ.get("SSR_GOLDEN", Path(__file__).parents[3] / "shared" / "golden"))
pytestmark = pytest.mark.skipif(
    not (GOLDEN / "released.safetensors").is_file(), reason=f"no golden values at {GOLDEN}"
)
SCALES, TOKENS, PATCH_SIDE = 6, 77, 16
TEXT, VISION, INNER = 768, 1024, 512
WIDTHS = (32, 64, 64, 64)
VIT_L = SimpleNamespace(hidden_size=VISION, num_hidden_layers=24)
LAYER = "down_blocks.1.attentions.0.transformer_blocks.0.attn2"


@pytest.fixture(scope="module")
def recipe() -> Any:
    spec = importlib.util.spec_from_file_location("golden_recipe", GOLDEN / "recipe.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "released.safetensors")


def data(recipe: Any, name: str, *shape: int) -> torch.Tensor:
    return torch.from_numpy(recipe.data(f"shared/{name}", shape))


def small_unet() -> Any:
    """Stable Diffusion 1's U-Net at the widths of the golden values, without weights."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel(
            block_out_channels=WIDTHS, cross_attention_dim=TEXT, norm_num_groups=8
        )


@pytest.fixture(scope="module", params=["all processors", "cross-attention alone"])
def adapter(request: Any, recipe: Any, tmp_path_factory: Any) -> SSRAdapter:
    """The published files, made by the recipe in either count of the layers, and read."""
    shapes = {"aligner.to_q.weight": (INNER, TEXT), "aligner.to_k.weight": (INNER, VISION)}
    for i in range(SCALES):
        shapes[f"aligner.processor.to_v.{i}.weight"] = (INNER, VISION)
        shapes[f"aligner.processor.to_out.{i}.weight"] = (TEXT, INNER)
    shapes |= {"norm.weight": (TEXT,), "norm.bias": (TEXT,)}
    aligner = {k: torch.from_numpy(recipe.init(f"aligner/{k}", s)) for k, s in shapes.items()}
    layers, unet = {}, small_unet()
    for i, name in enumerate(unet.attn_processors):
        if not i % 2:
            continue
        assert name.endswith("attn2.processor")
        width = unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
        index = i if request.param == "all processors" else i // 2
        for kind in ("to_k_SSR", "to_v_SSR"):
            values = recipe.init(f"ssr_layers/{i}.{kind}.weight", (width, TEXT))
            layers[f"{index}.{kind}.weight"] = torch.from_numpy(values)
    folder = tmp_path_factory.mktemp("released")
    torch.save(aligner, folder / "pytorch_model.bin")
    torch.save(layers, folder / "pytorch_model_1.bin")
    return released.load(
        folder / "pytorch_model.bin", folder / "pytorch_model_1.bin", VIT_L, TEXT, unet
    )


def features(recipe: Any, adapter: SSRAdapter) -> dict[int, torch.Tensor]:
    stacked = data(recipe, "image_embeds", 1, SCALES * (1 + PATCH_SIDE**2), VISION)
    return dict(zip(adapter.config.depths, stacked.chunk(SCALES, dim=1), strict=True))


@torch.no_grad()
def test_subject_embedding(recipe: Any, golden: Any, adapter: SSRAdapter) -> None:
    assert adapter.config.depths == (4, 8, 12, 16, 20, 24)
    z_q = data(recipe, "text_embeds", 1, TOKENS, TEXT)
    tokens = adapter.encoder(z_q, features(recipe, adapter)).tokens
    torch.testing.assert_close(tokens, golden["aligner.subject_embeds"], atol=2e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("weight", [1, 5])
def test_mask(recipe: Any, golden: Any, adapter: SSRAdapter, weight: int) -> None:
    aligner = adapter.encoder.aligner
    mask = torch.zeros(512, 512)
    mask[100:300, 200:420] = 1
    tokens = mask_tokens(mask, (0, 0, 512, 512), (PATCH_SIDE, PATCH_SIDE), "bias", cls=True)
    z_q = data(recipe, "text_embeds", 1, TOKENS, TEXT)
    assert aligner.mask_weight == 1
    aligner.mask_weight = float(weight)
    found = adapter.encoder(z_q, features(recipe, adapter), tokens[None]).tokens
    aligner.mask_weight = 1.0
    expected = golden[f"mask.subject_embeds_w{weight}"]
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("scale", [0.0, 0.65, 1.0])
def test_layer(recipe: Any, golden: Any, adapter: SSRAdapter, scale: float) -> None:
    """Index 5 of the layers' file is the third cross-attention of the U-Net."""
    attention = small_unet().get_submodule(LAYER).to_empty(device="cpu")
    attention.load_state_dict(
        {
            key: torch.from_numpy(recipe.init(f"unet/{LAYER}.{key}", tuple(tensor.shape)))
            for key, tensor in attention.state_dict().items()
        }
    )
    tokens = data(recipe, "subject_embeds", 1, SCALES * TOKENS, TEXT)
    subject = Subject(np.zeros((1, 1, 3), np.uint8), query="fish", scale=scale)
    branch = SubjectBranch.deal(adapter.by_layer(), tokens, [[subject]])
    name = f"{LAYER}.processor"
    attention.set_processor(SubjectAttnProcessor(name, Slot(branch), attention.processor))
    found = attention(
        data(recipe, "hidden_states", 1, 64, 64),
        encoder_hidden_states=data(recipe, "prompt_embeds", 1, TOKENS, TEXT),
    )
    torch.testing.assert_close(found, golden[f"layer.out_scale{scale}"], atol=2e-5, rtol=0)
