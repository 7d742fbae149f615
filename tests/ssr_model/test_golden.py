"""The `released` arithmetic against outputs of the authors' own code."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ssr_model.attention import Slot, SubjectAttnProcessor, SubjectBranch
from ssr_model.config import VARIANTS, SSRConfig
from ssr_model.encoder import SubjectEncoder, SubjectKeyValue
from ssr_model.images import mask_tokens

GOLDEN = Path(os.environ.get("SSR_GOLDEN", Path(__file__).parents[3] / "shared" / "golden"))
pytestmark = pytest.mark.skipif(
    not (GOLDEN / "released.safetensors").is_file(), reason=f"no golden values at {GOLDEN}"
)
SCALES, TOKENS, PATCH_SIDE = 6, 77, 16
TEXT, VISION, HIDDEN, HEADS = 768, 1024, 64, 8


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


@pytest.fixture(scope="module")
def released(recipe: Any) -> SubjectEncoder:
    config = SSRConfig(
        vision_dim=VISION,
        text_dim=TEXT,
        depths=tuple(range(4, 25, 4)),
        layers={"attn2.processor": HIDDEN},
        variant="released",
        **VARIANTS["released"],
    )
    names = {"aligner.to_q": "aligner.to_q", "aligner.to_k": "aligner.to_k", "norm": "norm"}
    for i, depth in enumerate(config.depths):
        names[f"to_v.{depth}"] = f"aligner.processor.to_v.{i}"
        names[f"to_out.{depth}"] = f"aligner.processor.to_out.{i}"
    encoder = SubjectEncoder(config).eval()
    state = {}
    for key, tensor in encoder.state_dict().items():
        module, kind = key.rsplit(".", 1)
        values = recipe.init(f"aligner/{names[module]}.{kind}", tuple(tensor.shape))
        state[key] = torch.from_numpy(values)
    encoder.load_state_dict(state)
    return encoder


def features(recipe: Any, encoder: SubjectEncoder) -> dict[int, torch.Tensor]:
    stacked = data(recipe, "image_embeds", 1, SCALES * (1 + PATCH_SIDE**2), VISION)
    return dict(zip(encoder.config.depths, stacked.chunk(SCALES, dim=1), strict=True))


@torch.no_grad()
def test_subject_embedding(recipe: Any, golden: Any, released: SubjectEncoder) -> None:
    z_q = data(recipe, "text_embeds", 1, TOKENS, TEXT)
    tokens = released(z_q, features(recipe, released)).tokens
    torch.testing.assert_close(tokens, golden["aligner.subject_embeds"], atol=2e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("weight", [1, 5])
def test_mask(recipe: Any, golden: Any, released: SubjectEncoder, weight: int) -> None:
    mask = torch.zeros(512, 512)
    mask[100:300, 200:420] = 1
    tokens = mask_tokens(mask, (0, 0, 512, 512), (PATCH_SIDE, PATCH_SIDE), "bias", cls=True)
    z_q = data(recipe, "text_embeds", 1, TOKENS, TEXT)
    released.aligner.mask_weight = float(weight)
    found = released(z_q, features(recipe, released), tokens[None]).tokens
    expected = golden[f"mask.subject_embeds_w{weight}"]
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("scale", [0.0, 0.65, 1.0])
def test_layer(recipe: Any, golden: Any, scale: float) -> None:
    from diffusers.models.attention_processor import Attention

    attention = Attention(HIDDEN, cross_attention_dim=TEXT, heads=HEADS, dim_head=HIDDEN // HEADS)
    prefix = "unet/down_blocks.1.attentions.0.transformer_blocks.0.attn2"
    attention.load_state_dict(
        {
            key: torch.from_numpy(recipe.init(f"{prefix}.{key}", tuple(tensor.shape)))
            for key, tensor in attention.state_dict().items()
        }
    )
    layer = SubjectKeyValue(TEXT, HIDDEN)
    for kind in ("to_k", "to_v"):
        weight = recipe.init(f"ssr_layers/5.{kind}_SSR.weight", (HIDDEN, TEXT))
        layer.get_submodule(kind).load_state_dict({"weight": torch.from_numpy(weight)})
    pair = layer(data(recipe, "subject_embeds", 1, SCALES * TOKENS, TEXT))
    branch = SubjectBranch.deal({"layer": pair}, [scale], [1])
    attention.set_processor(SubjectAttnProcessor("layer", Slot(branch), attention.processor))
    found = attention(
        data(recipe, "hidden_states", 1, 64, HIDDEN),
        encoder_hidden_states=data(recipe, "prompt_embeds", 1, TOKENS, TEXT),
    )
    torch.testing.assert_close(found, golden[f"layer.out_scale{scale}"], atol=2e-5, rtol=0)
