"""Saving, loading, and refusing files that are not what they say."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from ssr_model import SSRConfig, SSREncoder
from ssr_model.weights import load_adapter, save_adapter


@pytest.fixture
def saved(kit: Any, tmp_path: Path) -> Path:
    kit.ssr.metadata.update(stage="multi_scale", step="100")
    kit.ssr.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def rewrite(folder: Path, change: Any, metadata: dict[str, str] | None = None) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    said = {"format": "ssr-encoder-2"} if metadata is None else metadata
    save_file(tensors, folder / "model.safetensors", metadata=said)


def test_round_trip(kit: Any, saved: Path) -> None:
    assert sorted(p.name for p in saved.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    loaded = SSREncoder.from_pretrained(saved)
    assert loaded.config == kit.ssr.config
    assert loaded.metadata["stage"] == "multi_scale" and loaded.metadata["variant"] == "paper"
    mine, theirs = kit.ssr.adapter.state_dict(), loaded.adapter.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    stored = load_file(saved / "model.safetensors")
    assert {name.split(".")[0] for name in stored} == {"encoder", "layers"}
    shared = SSREncoder.from_pretrained(saved, base=kit.pipe)
    assert shared.queries.encoders == [kit.pipe.text_encoder]
    pair = (kit.ssr.vision, kit.ssr.image_processor)
    given = SSREncoder.from_pretrained(saved, vision=pair, base=kit.pipe)
    assert (given.vision, given.image_processor) == pair


def test_half_precision(kit: Any, tmp_path: Path) -> None:
    save_adapter(tmp_path, kit.ssr.adapter, dtype=torch.float16)
    assert {t.dtype for t in load_file(tmp_path / "model.safetensors").values()} == {torch.float16}
    adapter, metadata = load_adapter(tmp_path)
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}
    assert metadata == {"format": "ssr-encoder-2", "variant": "paper"}


def test_model_card(kit: Any, saved: Path) -> None:
    card = (saved / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "diffusers" and "ssr-encoder" in front["tags"]
    assert "base_model" not in front  # a folder is no name on the hub
    assert front["license"] == "other" and front["license_name"] == "as-base-model"
    count = sum(p.numel() for p in kit.ssr.adapter.parameters())
    for told in ("| stage | multi_scale |", "| step | 100 |", "| variant | paper |", f"{count:,}"):
        assert told in card
    odd = {"base_model": "owner/name", "note": "a | b\n```\n<x>", "vision_model": 'x"\n'}
    save_adapter(saved, kit.ssr.adapter, odd)
    card = (saved / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["base_model"] == "owner/name"
    assert "a \\| b ''' <x>" in card and card.count("```") == 2
    (code,) = re.findall("```python\n(.*?)```", card, re.S)
    compile(code.replace("FOLDER_OR_HUB_ID", '"folder"'), "card", "exec")


def test_pickle_is_not_run(saved: Path, tmp_path: Path) -> None:
    witness = tmp_path / "witness"

    class Evil:
        def __reduce__(self) -> Any:
            return Path.touch, (witness,)

    (saved / "model.safetensors").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match="not a safetensors file"):
        load_adapter(saved)
    assert not witness.exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t.pop("encoder.norm.weight"), "encoder.norm.weight is missing"),
        (lambda t: t.update({"unet.conv": torch.ones(1)}), "unet.conv does not belong"),
        (lambda t: t.update({"encoder.norm.bias": torch.ones(3)}), "encoder.norm.bias is \\(3,\\)"),
        (
            lambda t: t.update({"encoder.norm.bias": t["encoder.norm.bias"].long()}),
            "not a float tensor",
        ),
        (lambda t: t["encoder.norm.bias"].fill_(float("nan")), "NaN"),
    ],
)
def test_damaged_tensors(saved: Path, damage: Any, message: str) -> None:
    rewrite(saved, damage)
    with pytest.raises(ValueError, match=message) as error:
        load_adapter(saved)
    assert "\n" not in str(error.value)


def test_truncated_foreign_and_missing(saved: Path, tmp_path: Path) -> None:
    rewrite(saved, lambda t: None, metadata={})
    with pytest.raises(ValueError, match="format None"):
        load_adapter(saved)
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match="not a safetensors file"):
        load_adapter(saved)
    file.unlink()
    with pytest.raises(ValueError, match="missing"):
        load_adapter(saved)
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        load_adapter(tmp_path)
    with pytest.raises(ValueError, match="no such folder"):
        SSREncoder.from_pretrained(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_dimm": 8}, "did you mean 'head_dim'"),
        ({"heads": "8"}, "heads must be a positive whole number"),
        ({"heads": 10**6}, "encoder.aligner.to_q.weight is"),
        ({"heads": 10**30}, "heads must be at most"),
        ({"depths": 3}, "depths must be a list"),
        ({"depths": [6, 2]}, "rise without repeats"),
        ({"variant": "papr"}, "variant must be one of"),
        ({"layers": {}}, "layers must map"),
        ({"layers": {"keys": 32}}, "no text cross-attention"),
        ({"layers": {"_modules": 3}}, "no text cross-attention"),
        ({"layers": {"x\n.attn2.processor": 3}}, "no text cross-attention"),
        ({"token_norm": 1}, "token_norm must be true or false"),
        ({"value_projection": "odd"}, "value_projection must be one of"),
        ({"norm_eps": -1}, "positive number"),
    ],
)
def test_hostile_config(saved: Path, change: dict[str, Any], message: str) -> None:
    path = saved / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=message) as error:
        load_adapter(saved)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "[]", "{}", "{" * 5, "\xff"])
def test_config_that_is_not_one(text: str) -> None:
    with pytest.raises(ValueError, match="SSR-Encoder's config"):
        SSRConfig.from_json(text)


def test_a_model_of_another_kind_is_refused(kit: Any, saved: Path) -> None:
    with pytest.raises(ValueError, match="cannot be loaded as a CLIP vision model"):
        SSREncoder.from_pretrained(saved, vision=str(saved.parent))
    with pytest.raises(ValueError, match="does not say which vision"):
        save_adapter(saved, kit.ssr.adapter)
        SSREncoder.from_pretrained(saved)
