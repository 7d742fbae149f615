"""CLIPSeg as a segmenter: masks from a folder's model, and folders that are refused."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from ssr_model.metrics import ClipSegSegmenter, load_clipseg
from tests.ssr_model.metrics.pictures import drawing

CUP, _ = drawing("green", "red")
WIDE, _ = drawing("blue", "yellow", box=(60, 30, 75, 51), size=(90, 61))


@pytest.fixture(scope="module")
def folder(tiny_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny `CLIPSegForImageSegmentation` as the published one is laid out, and its processor."""
    from transformers import (
        CLIPSegConfig,
        CLIPSegForImageSegmentation,
        CLIPTokenizer,
        ViTImageProcessorPil,
    )

    place = tmp_path_factory.mktemp("clipseg")
    tokenizer = CLIPTokenizer.from_pretrained(tiny_models / "clip")
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
    config = CLIPSegConfig(
        text_config={
            **size,
            "num_attention_heads": 4,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": tokenizer.model_max_length,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={**size, "num_attention_heads": 4, "image_size": 32, "patch_size": 8},
        projection_dim=24,
        extract_layers=[0, 1, 2],
        reduce_dim=16,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=32,
        use_complex_transposed_convolution=False,
    )
    torch.manual_seed(6)
    model = CLIPSegForImageSegmentation(config).eval()
    with torch.no_grad():  # loud enough for text and picture to matter
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    side = {"height": 48, "width": 48}  # another than the config's, as the published one
    ViTImageProcessorPil(size=side).save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def clipseg(folder: Path) -> ClipSegSegmenter:
    return load_clipseg(str(folder), name="tiny")


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "clipseg"))


def alter(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def pixels(masks: Any) -> list[list[int]]:
    return [[0 if mask is None else int(mask.sum()) for mask in own] for own in masks]


@torch.no_grad()
def test_masks_are_where_the_model_says_half(clipseg: ClipSegSegmenter) -> None:
    """Written out with the library's own processing, one picture and one text at a time."""
    found = clipseg([CUP, WIDE], [["cup", "fish"], ["cup"]])
    assert [len(own) for own in found] == [2, 1]
    for image, own, names in zip([CUP, WIDE], found, [["cup", "fish"], ["cup"]], strict=True):
        for mask, name in zip(own, names, strict=True):
            seen = clipseg.image_processor(image, return_tensors="pt").pixel_values
            ids = clipseg.tokenizer(f"a {name}", return_tensors="pt").input_ids
            chance = clipseg.model(input_ids=ids, pixel_values=seen).logits.view(48, 48).sigmoid()
            expected = np.asarray(
                Image.fromarray(chance.numpy()).resize(image.size, Image.Resampling.BILINEAR)
            )
            assert mask is not None and mask.dtype == bool
            assert mask.shape == (image.height, image.width)
            assert 0 < mask.mean() < 1
            clear = np.abs(expected - 0.5) > 0.05  # Pillow's filter widens where it shrinks
            assert clear.mean() > 0.3
            assert (mask == (expected > 0.5))[clear].mean() > 0.97
    cup, fish = found[0]
    assert (cup != fish).any()  # the text counts


def test_batches_decide_nothing(folder: Path, clipseg: ClipSegSegmenter) -> None:
    images, names = [CUP, WIDE, CUP], [["cup", "fish"], ["key"], ["cup"]]
    expected = clipseg(images, names)
    for size in (1, 3):
        other = load_clipseg(str(folder))
        other.batch_size = size
        for own, theirs in zip(other(images, names), expected, strict=True):
            for mask, its in zip(own, theirs, strict=True):
                assert mask is not None and its is not None
                assert (mask != its).mean() < 0.002  # rounding at the threshold
    assert np.array_equal(expected[0][0], expected[2][0])  # type: ignore[arg-type]
    assert clipseg([], []) == [] and clipseg([CUP], [[]]) == [[]]


def test_nothing_is_none(copy: Path) -> None:
    alter(copy, lambda tensors: tensors["decoder.transposed_convolution.bias"].fill_(-1e3))
    assert load_clipseg(str(copy))([CUP, WIDE], [["cup"], ["fish", "cup"]]) == [[None], [None] * 2]


def test_what_it_says_of_itself(folder: Path, clipseg: ClipSegSegmenter) -> None:
    said = clipseg.describe()
    assert said["name"] == clipseg.name == "tiny" and said["kind"] == "clipseg"
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert said["sha256"] == digest and said["threshold"] == 0.5 and said["text"] == "a {name}"
    assert said["preprocessing"]["size"] == {"height": 48, "width": 48}
    assert json.loads(json.dumps(said)) == said


def refused(folder: Path, match: str) -> None:
    with pytest.raises(ValueError, match=match) as error:
        load_clipseg(str(folder))
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


def test_folders_of_something_else(tiny_models: Path, tmp_path: Path) -> None:
    refused(tiny_models / "clip", "of type 'clip', not a CLIPSeg")
    refused(tmp_path / "absent", "no such folder, and not a hub id")
    refused(tmp_path, "holds no weights")


def test_weights_that_lack_or_are_damaged(copy: Path) -> None:
    whole = (copy / "model.safetensors").read_bytes()
    alter(copy, lambda tensors: tensors.pop("decoder.film_mul.weight"))
    refused(copy, r"the weights lack decoder\.film_mul\.weight, by the config")
    (copy / "model.safetensors").write_bytes(whole)
    alter(copy, lambda tensors: tensors["decoder.film_add.bias"].fill_(float("nan")))
    with pytest.raises(ValueError, match="gives NaN: its weights are damaged"):
        load_clipseg(str(copy))([CUP], [["cup"]])
    (copy / "model.safetensors").write_bytes(b"cut")
    refused(copy, "cannot be loaded as a CLIPSeg")


def test_a_pickle_is_read_without_executing_it(copy: Path, clipseg: ClipSegSegmenter) -> None:
    tensors = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    torch.save(tensors, copy / "pytorch_model.bin")
    found = load_clipseg(str(copy))([CUP], [["cup"]])
    assert pixels(found) == pixels(clipseg([CUP], [["cup"]]))
    witness = copy / "witness"

    class Evil:
        def __reduce__(self) -> Any:
            return Path.touch, (witness,)

    torch.save(tensors | {"evil": Evil()}, copy / "pytorch_model.bin")
    refused(copy, "cannot be loaded as a CLIPSeg")
    assert not witness.exists()


def test_processors_of_another_model(copy: Path) -> None:
    path = copy / "preprocessor_config.json"
    good = path.read_text()
    for entries, match in (
        ({"size": {"height": 44, "width": 44}}, r"makes \(3, 44, 44\)"),
        ({"size": {"height": 48, "width": 32}}, r"makes \(3, 48, 32\)"),
        ({"do_normalize": False}, "does not rescale or normalise"),
    ):
        path.write_text(json.dumps(json.loads(good) | entries))
        refused(copy, match)
    path.write_text(good)
    for name in ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json"):
        (copy / name).unlink(missing_ok=True)
    refused(copy, "the tokenizer has 2 entries and its text encoder")
