"""What a picture says of its models: names that people know, and hashes of weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from pipeline.config import GenerateConfig, ModelsConfig
from pipeline.generation.identities import identities
from tests.pipeline.evaluation.rivals import write_ssr


def test_folders_are_named_by_their_last_part(tiny_models: Path, tmp_path: Path) -> None:
    parts = ModelsConfig(base=str(tiny_models / "sd"), vision=f"{tiny_models / 'clip'}/")
    folder = str(write_ssr(tmp_path / "model", parts))
    found = identities(GenerateConfig(models=parts), folder)
    assert json.loads(json.dumps(found)) == found
    assert found.keys() == {"model", "base", "vision"}
    assert (found["base"]["name"], found["vision"]["name"]) == ("sd", "clip")
    assert all(len(sha) == 64 for sha in (found["model"], found["base"]["sha256"]))
    moved = shutil.copytree(parts.base, tmp_path / "mine")
    again = identities(GenerateConfig(models=ModelsConfig(str(moved), parts.vision)), folder)
    assert again["base"] == {"name": "mine", "sha256": found["base"]["sha256"]}


def test_shipped_models_keep_their_names_and_a_controlnet_is_told(
    tiny_models: Path, tmp_path: Path
) -> None:
    parts = ModelsConfig(base=str(tiny_models / "sd"), vision=str(tiny_models / "clip"))
    folder = str(write_ssr(tmp_path / "model", parts))
    net = str(tiny_models / "sd" / "unet")  # a folder of config and weights, as a ControlNet's is
    found = identities(GenerateConfig(models=ModelsConfig(), controlnet=net), folder)
    assert (found["base"]["name"], found["vision"]["name"]) == ("miniworld:sd", "miniworld:clip")
    assert found["controlnet"]["name"] == "unet" and len(found["controlnet"]["sha256"]) == 64
