"""Images, masks, tokenizers, image processors and configs: what is accepted, what is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer

from ssr_model import SSRConfig
from ssr_model.config import depths_for
from ssr_model.frozen import load_text, load_vision
from ssr_model.images import as_mask, as_rgb, check_image_processor, mask_tokens, seen_box
from ssr_model.text import check_tokenizer, real_tokens, tokenize
from ssr_model.vision import vision_features


def test_images() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 4, 3), dtype=np.uint8)
    image = as_rgb(pixels)
    assert image.size == (4, 6)
    assert np.array_equal(np.asarray(as_rgb(pixels / np.float32(255))), pixels)
    assert np.array_equal(np.asarray(as_rgb(image.convert("RGBA"))), pixels)
    turned = Image.fromarray(pixels)
    turned.getexif()[0x0112] = 6  # shown a quarter turn clockwise
    assert as_rgb(turned).size == (6, 4)
    deep = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    assert deep.mode == "I;16"
    assert np.array_equal(np.asarray(as_rgb(deep))[..., 0], pixels[..., 0])
    clear = Image.fromarray(np.dstack([pixels, np.zeros_like(pixels[..., 0])]))
    assert (np.asarray(as_rgb(clear)) == 255).all()  # what is hidden stays hidden
    for bad, message in (
        (Image.new("F", (4, 4), float("nan")), "mode 'F' does not tell its range"),
        (Image.new("I", (4, 4)), "mode 'I' does not tell its range"),
        (Image.new("RGB", (0, 4)), "must not be empty"),
        (pixels[..., 0], "height, width, 3"),
        (np.zeros((4, 4, 4), np.uint8), "height, width, 3"),
        (np.full((4, 4, 3), np.nan), "NaN"),
        (np.full((4, 4, 3), 7.0), r"in \[0, 1\]"),
        (pixels.astype(np.int64), "uint8 or float"),
        ("a.png", "PIL image or a NumPy array"),
    ):
        with pytest.raises(ValueError, match=message):
            as_rgb(bad)  # type: ignore[arg-type]


def test_masks() -> None:
    mask = np.zeros((6, 4), bool)
    mask[1:3] = True
    expected = torch.from_numpy(mask).float()
    for form in (mask, mask.astype(np.uint8), mask.astype(np.uint8) * 255, torch.from_numpy(mask)):
        assert torch.equal(as_mask(form, (4, 6)), expected)
    assert torch.equal(as_mask(Image.fromarray(mask), (4, 6)), expected)
    for bad, message in (
        (mask.T, "own size"),
        (np.zeros((6, 4)), "selects nothing"),
        (np.full((6, 4), np.nan), "must lie in"),
        (np.full((6, 4), 2.0), "must lie in"),
        (mask.astype(np.uint8) * 2, "one label's pixels"),
    ):
        with pytest.raises(ValueError, match=message):
            as_mask(bad, (4, 6))


def test_mask_follows_the_crop() -> None:
    """What the image processor cuts away is cut from the mask, and the rest keeps its place."""
    processor = SimpleNamespace(
        size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}, do_center_crop=True
    )
    box = seen_box(processor, (48, 32))
    assert box == (8, 0, 40, 32)
    mask = torch.zeros(32, 48)
    mask[0:16, 8:24] = 1  # the upper left quarter of what CLIP sees
    mask[:, :8] = 1  # and something that it does not
    tokens = mask_tokens(mask, box, (2, 2), "reweight", cls=False)
    assert tokens.tolist() == [0, 1, 0, 0, 0]
    tokens = mask_tokens(mask, box, (2, 2), "bias", cls=True)  # blurred across edges of patches
    assert tokens[0] == 1 and 0.7 < tokens[1] < 1 and 0 < tokens[2] < 0.35
    outside = torch.zeros(32, 48)
    outside[:, :4] = 1
    with pytest.raises(ValueError, match="outside the centre square"):
        mask_tokens(outside, box, (2, 2), "reweight", cls=False)


def test_a_tokenizer_that_loaded_wrongly(tiny_models: Path) -> None:
    from transformers import CLIPTokenizer

    queries = load_text(str(tiny_models / "sd"))
    text_encoder, tokenizer = queries.encoders[0], queries.tokenizers[0]
    check_tokenizer(tokenizer, text_encoder.config)
    with pytest.raises(ValueError, match="entries and its text encoder"):
        check_tokenizer(CLIPTokenizer(), text_encoder.config)
    letters = copy.deepcopy(tokenizer)  # a tokenizer.json without its merges
    model = json.loads(letters.backend_tokenizer.to_str())
    model["model"]["merges"] = []
    letters._tokenizer = Tokenizer.from_str(json.dumps(model))
    with pytest.raises(ValueError, match="as 12 tokens instead of 5 words"):
        check_tokenizer(letters, text_encoder.config)
    tokenizer.model_max_length = 10**30  # what a missing tokenizer_config.json gives
    with pytest.raises(ValueError, match="model_max_length"):
        check_tokenizer(tokenizer, text_encoder.config)


def test_an_image_processor_that_loaded_wrongly(tiny_models: Path) -> None:
    from transformers import CLIPImageProcessorPil

    vision, processor = load_vision(str(tiny_models / "clip"))
    check_image_processor(processor, vision.config)
    with pytest.raises(ValueError, match="loaded wrongly"):
        check_image_processor(CLIPImageProcessorPil(), vision.config)
    for settings in (
        {"do_rescale": False},
        {"do_normalize": False},
        {"do_resize": False},
        {"image_mean": [0, 0, 0], "image_std": [1, 1, 1]},
    ):
        wrong = CLIPImageProcessorPil.from_pretrained(tiny_models / "clip", **settings)
        with pytest.raises(ValueError, match="does not resize, rescale or normalise") as error:
            check_image_processor(wrong, vision.config)
        assert "\n" not in str(error.value)


def test_real_tokens(tiny_models: Path) -> None:
    tokenizer = load_text(str(tiny_models / "sd")).tokenizers[0]
    ids = tokenize(tokenizer, ["cup", "", "a red fish " * 40])
    assert ids.shape == (3, tokenizer.model_max_length)
    real = real_tokens(tokenizer, ids)
    assert real[0].tolist() == [False, True] + [False] * (len(real[0]) - 2)
    assert not real[1].any()
    assert real[2].tolist() == [False] + [True] * (len(real[2]) - 2) + [False]


@torch.no_grad()
def test_vision_features(tiny_models: Path) -> None:
    from transformers import CLIPModel

    vision, _ = load_vision(str(tiny_models / "clip"))
    pixels = torch.randn(2, 3, 32, 32)
    found = vision_features(vision, pixels, (0, 3, 6))
    assert {d: f.shape for d, f in found.items()} == dict.fromkeys((0, 3, 6), (2, 65, 48))
    whole = CLIPModel.from_pretrained(tiny_models / "clip")
    torch.testing.assert_close(vision_features(whole.vision_model, pixels, (6,))[6], found[6])
    # the layers written out; no post-LayerNorm after the last
    x = vision.pre_layrnorm(vision.embeddings(pixels)) if hasattr(vision, "embeddings") else None
    if x is not None:
        torch.testing.assert_close(found[0], x)
    with pytest.raises(ValueError, match="pixel_values must be"):
        vision_features(vision, pixels[:, :1], (6,))
    with pytest.raises(ValueError, match="depth 7"):
        vision_features(vision, pixels, (7,))


def test_depths() -> None:
    assert depths_for(24, 6) == (4, 8, 12, 16, 20, 24)
    assert depths_for(6, 3) == (2, 4, 6)
    assert depths_for(24, 1) == (24,)
    assert depths_for(32, 6)[-1] == 32
    with pytest.raises(ValueError, match="1 to 6"):
        depths_for(6, 7)


@pytest.mark.parametrize("cross_dim", [32, 40])
def test_dimensions_come_from_the_models(cross_dim: int, tiny_models: Path) -> None:
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.load_config(tiny_models / "sd" / "unet")
    unet["cross_attention_dim"] = cross_dim
    vision = SimpleNamespace(hidden_size=48, num_hidden_layers=12)
    text = SimpleNamespace(hidden_size=cross_dim)
    config = SSRConfig.from_models(vision, text, unet)
    assert config.depths == (2, 4, 6, 8, 10, 12) and config.text_dim == cross_dim
    assert list(config.layers.values()) == [16, 32, 32, 32, 16, 16, 32]
    assert SSRConfig.from_json(config.to_json()) == config
    with pytest.raises(ValueError, match="belong to different models"):
        SSRConfig.from_models(vision, SimpleNamespace(hidden_size=7), unet)
