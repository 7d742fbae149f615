"""Backbones from folders: what they say of themselves, and what is refused."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from ssr_model.metrics import load_clip, load_dino
from ssr_model.metrics.backbones import Backbone
from tests.ssr_model.metrics.pictures import drawing

CUP, _ = drawing("green", "red")


@pytest.fixture
def copy(tiny_models: Path, tmp_path: Path) -> Any:
    """`copy(name)`: a folder of one's own with a tiny model."""

    def make(name: str) -> Path:
        return Path(shutil.copytree(tiny_models / name, tmp_path / name))

    return make


def change(folder: Path, **entries: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def alter(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("kind", "load", "architecture", "width", "processor"),
    [
        ("clip", load_clip, "ViT-48/4", 32, "CLIPImageProcessorPil"),
        ("dino", load_dino, "ViT-32/4", 32, "ViTImageProcessorPil"),
        ("dinov2", load_dino, "ViT-32/4", 32, "BitImageProcessorPil"),
    ],
)
def test_what_a_backbone_says(
    tiny_models: Path, kind: str, load: Any, architecture: str, width: int, processor: str
) -> None:
    folder = tiny_models / kind
    backbone: Backbone = load(str(folder))
    said = backbone.describe()
    assert said["name"] == str(folder) and said["kind"] == kind.removesuffix("v2")
    assert said["architecture"] == architecture and said["dtype"] == "float32"
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert said["sha256"] == digest
    assert said["preprocessing"]["image_processor_type"] == processor
    assert said["preprocessing"]["image_mean"] == list(backbone.image_processor.image_mean)
    assert json.loads(json.dumps(said)) == said
    assert backbone.images([CUP]).shape == (1, width) and backbone.images([]).shape == (0, width)
    assert not any(p.requires_grad for p in backbone.model.parameters())
    assert load(str(folder), name="another").describe() == {**said, "name": "another"}


def test_half_precision_is_close(tiny_models: Path) -> None:
    dino = load_dino(str(tiny_models / "dino"))
    expected = dino.images([CUP])
    half = dino.to("cpu", torch.bfloat16)
    assert half.describe()["dtype"] == "bfloat16"
    found = half.images([CUP])
    assert found.dtype == torch.float32 and float(found[0] @ expected[0]) > 0.99


def test_pictures_of_any_kind_are_seen_the_same(tiny_models: Path) -> None:
    dino = load_dino(str(tiny_models / "dino"))
    expected = dino.images([CUP])
    clear = CUP.convert("RGBA")
    for picture in (np.asarray(CUP), np.asarray(CUP) / 255, clear):
        assert torch.equal(dino.images([picture]), expected)


def test_weights_in_a_pickle_are_read_without_executing_it(copy: Any) -> None:
    folder = copy("dino")
    expected = load_dino(str(folder)).images([CUP])
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    assert torch.equal(load_dino(str(folder)).images([CUP]), expected)
    witness = folder / "witness"

    class Evil:
        def __reduce__(self) -> Any:
            return Path.touch, (witness,)

    torch.save(tensors | {"evil": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="cannot be loaded as a DINO"):
        load_dino(str(folder))
    assert not witness.exists()


def test_weights_in_parts_have_one_hash(copy: Any, tiny_models: Path) -> None:
    from transformers import ViTModel

    folder = copy("dino")
    whole = ViTModel.from_pretrained(folder, add_pooling_layer=False)
    (folder / "model.safetensors").unlink()
    whole.save_pretrained(folder, max_shard_size="40KB")
    parts = sorted(folder.glob("model-*.safetensors"))
    assert len(parts) > 1
    dino = load_dino(str(folder))
    digests = "".join(hashlib.sha256(part.read_bytes()).hexdigest() for part in parts)
    assert dino.sha256 == hashlib.sha256(digests.encode()).hexdigest()
    assert torch.equal(dino.images([CUP]), load_dino(str(tiny_models / "dino")).images([CUP]))


def refused(load: Any, folder: Path | str, match: str) -> None:
    with pytest.raises(ValueError, match=match) as error:
        load(str(folder))
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


def test_another_architecture(tiny_models: Path, tmp_path: Path) -> None:
    from transformers import CLIPVisionModel

    refused(load_clip, tiny_models / "dino", r"of type 'vit', not a CLIP of both towers")
    refused(load_dino, tiny_models / "clip", r"of type 'clip', not a DINO or DINOv2")
    refused(load_dino, tiny_models / "blip2", "of type 'blip-2', not a DINO")
    CLIPVisionModel.from_pretrained(tiny_models / "clip").save_pretrained(tmp_path / "tower")
    refused(load_clip, tmp_path / "tower", "of type 'clip_vision_model', not a CLIP")


def test_missing_and_misshapen_weights(copy: Any) -> None:
    clip, dino, dinov2 = copy("clip"), copy("dino"), copy("dinov2")
    alter(clip, lambda tensors: tensors.pop("text_projection.weight"))
    refused(load_clip, clip, r"the weights lack text_projection\.weight, by the config")
    alter(dino, lambda tensors: [tensors.pop(key) for key in list(tensors) if "layer.2" in key])
    refused(load_dino, dino, r"the weights lack .*layer.*2\.\S+ and 15 more, by the config")
    alter(dinov2, lambda tensors: tensors.update({"layernorm.weight": torch.ones(31)}))
    refused(load_dino, dinov2, r"another shape of layernorm\.weight, by the config")


def test_damaged_weights(copy: Any) -> None:
    dino = copy("dino")
    alter(dino, lambda tensors: tensors["layernorm.weight"].fill_(float("nan")))
    with pytest.raises(ValueError, match=r"vectors without a direction .* weights are damaged"):
        load_dino(str(dino)).images([CUP])
    (dino / "model.safetensors").write_bytes(b"cut")
    refused(load_dino, dino, "cannot be loaded as a DINO")
    (dino / "model.safetensors").unlink()
    refused(load_dino, dino, "holds no weights")


def test_no_such_model(tmp_path: Path) -> None:
    refused(load_clip, tmp_path / "absent", "no such folder, and not a hub id")
    refused(load_dino, "owner/name", "no such folder, and not found on the hub")
    refused(load_dino, tmp_path, "holds no weights")


def test_a_hub_id(tiny_models: Path, tmp_path: Path) -> None:
    """From the hub's cache, which is all there is offline; weights in a pickle are found too."""
    cache = tmp_path / "hub" / "models--owner--dino"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("0" * 40)
    folder = cache / "snapshots" / ("0" * 40)
    shutil.copytree(tiny_models / "dino", folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    script = """if True:
        from ssr_model.metrics import load_dino
        said = load_dino("owner/dino").describe()
        print(said["name"], said["sha256"])
        load_dino("owner/other")
    """
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    ran = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=280
    )
    digest = hashlib.sha256((folder / "pytorch_model.bin").read_bytes()).hexdigest()
    assert ran.stdout.split() == ["owner/dino", digest], ran.stderr
    assert "ValueError: owner/other: no such folder, and not found on the hub" in ran.stderr


def test_a_tokenizer_of_another_model(copy: Any) -> None:
    """transformers makes up a tokenizer of two entries where its files are missing."""
    clip = copy("clip")
    for name in ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json"):
        (clip / name).unlink(missing_ok=True)
    refused(load_clip, clip, "the tokenizer has 2 entries and its text encoder")


def test_image_processors_of_another_model(copy: Any) -> None:
    clip, dino, dinov2 = copy("clip"), copy("dino"), copy("dinov2")
    for folder, entries, match in (
        (clip, {"size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}}, "224"),
        (clip, {"do_normalize": False}, "loaded wrongly"),
        (dino, {"size": {"height": 224, "width": 224}}, r"makes \(3, 224, 224\)"),
        (dino, {"size": {"height": 32, "width": 32}, "do_normalize": False}, "does not rescale"),
        (dinov2, {"crop_size": {"height": 30, "width": 30}}, r"makes \(3, 30, 30\)"),
    ):
        path = folder / "preprocessor_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | entries))
        refused(load_clip if folder is clip else load_dino, folder, match)
    (dino / "preprocessor_config.json").unlink()
    refused(load_dino, dino, "image processor")


def test_a_dinov2_takes_sizes_that_its_patches_divide(copy: Any) -> None:
    """As the published ones, which were trained at 518 pixels and look at 224."""
    dinov2 = copy("dinov2")
    path = dinov2 / "preprocessor_config.json"
    settings = json.loads(path.read_text()) | {"crop_size": {"height": 24, "width": 24}}
    path.write_text(json.dumps(settings))
    assert load_dino(str(dinov2)).images([CUP, Image.new("RGB", (99, 30))]).shape == (2, 32)
