"""Attention maps: what they are of, and how they are drawn."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ssr_model import overlay


def test_maps_word_by_word(kit: Any) -> None:
    image = np.concatenate([kit.image, kit.image], axis=1)
    fish, cup = kit.ssr.attention_maps(image, ["red fish", "cup"])
    assert (fish.query, fish.words) == ("red fish", ["red", "fish"])
    assert fish.per_word.shape == (2, 8, 8) and cup.per_word.shape == (1, 8, 8)
    assert (fish.per_word >= 0).all() and (fish.per_word.sum(dim=(1, 2)) <= 1).all()
    torch.testing.assert_close(fish.mean, (fish.per_word[0] + fish.per_word[1]) / 2)
    (again,) = kit.ssr.attention_maps(image, ["cup"])
    torch.testing.assert_close(again.mean, cup.mean)

    pixels = kit.ssr.image_processor(Image.fromarray(image), return_tensors="pt").pixel_values
    tokenizer, text_encoder = kit.pipe.tokenizer, kit.pipe.text_encoder
    with torch.no_grad():
        states = kit.ssr.vision(pixels, output_hidden_states=True).hidden_states[-1]
        ids = tokenizer("red fish", padding="max_length", return_tensors="pt").input_ids
        z_q = text_encoder(ids).last_hidden_state
        attention = kit.ssr.adapter.encoder.aligner(z_q, states)
    # the start token, "red", "fish"
    expected = attention[0, :, 1:3, 1:].mean(dim=0).reshape(2, 8, 8)
    torch.testing.assert_close(fish.per_word, expected)
    assert fish.seen.size == (32, 32)  # the central square of a picture twice as wide
    assert np.array_equal(np.asarray(fish.overlay()), np.asarray(overlay(fish.seen, fish.mean)))
    assert np.array_equal(
        np.asarray(fish.overlay(word=1)), np.asarray(overlay(fish.seen, fish.per_word[1]))
    )
    with pytest.raises(ValueError, match="none of them empty"):
        kit.ssr.attention_maps(image, ["cup", " "])
    with pytest.raises(ValueError, match="list of texts"):
        kit.ssr.attention_maps(image, "cup")


def checkers(side: int = 4) -> Image.Image:
    pixels = np.indices((side, side)).sum(0) % 2 * 255
    return Image.fromarray(pixels.astype(np.uint8)).convert("RGB")


def test_overlay_glows_where_the_map_is_highest() -> None:
    heat = np.zeros((2, 2))
    heat[0, 1] = 0.03  # small values are shown against the map's own maximum
    shown = np.asarray(overlay(checkers(8), heat)).sum(axis=2)
    assert shown[:4, 4:].min() > shown[4:].max()
    assert overlay(checkers(8), torch.rand(16, 16)).size == (16, 16)


def test_overlay_of_nothing_stays_dim() -> None:
    shown = np.asarray(overlay(checkers(8), np.full((2, 2), np.nan)))
    assert shown.max() < 160


def test_overlay_refuses_other_shapes() -> None:
    with pytest.raises(ValueError, match="two dimensions"):
        overlay(checkers(), np.zeros((1, 2, 2)))
