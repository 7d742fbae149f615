"""A model from a stranger: what it would run is never run, whatever asks for it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import models
from pipeline.config import CaptionConfig, ModelsConfig
from pipeline.curation.captioning.caption_transformers import TransformersCaptioner
from pipeline.errors import UserError
from ssr_model.metrics.loading import load_dino

CODE = """
import os, pathlib
pathlib.Path(os.environ["BAIT"]).touch()
from diffusers import UNet2DConditionModel
from transformers import PretrainedConfig, PreTrainedTokenizerFast
class Evil(UNet2DConditionModel): pass
class EvilConfig(PretrainedConfig): model_type = "evil"
class EvilTokenizer(PreTrainedTokenizerFast): pass
"""


class Bait:
    """A pickle that makes a file when it is executed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def bait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What appears if anything is executed; whoever is asked at the terminal says yes."""
    path = tmp_path / "executed"
    monkeypatch.setenv("BAIT", str(path))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 100))
    return path


def captioner(folder: Path) -> None:
    TransformersCaptioner(CaptionConfig(), ModelsConfig(captioner=str(folder)), "cpu").open()


PARTS: dict[str, Callable[[Path], object]] = {
    "sd/unet": lambda folder: models.load_unet(str(folder.parent)),
    "sd/vae": lambda folder: models.load_vae(str(folder.parent)),
    "sd/text_encoder": lambda folder: models.load_text_encoder(str(folder.parent)),
    "clip": lambda folder: models.load_vision(str(folder)),
    "blip2": captioner,
    "dino": lambda folder: load_dino(str(folder)),
}


@pytest.mark.parametrize("part", PARTS)
def test_weights_that_are_a_pickle_are_refused_unexecuted(
    part: str, tiny_models: Path, tmp_path: Path, bait: Path
) -> None:
    whole, _, _ = part.partition("/")
    shutil.copytree(tiny_models / whole, tmp_path / whole)
    folder = tmp_path / part
    (weights,) = folder.glob("*.safetensors")
    name = "diffusion_pytorch_model" if part in ("sd/unet", "sd/vae") else "pytorch_model"
    weights.unlink()
    torch.save({"w": Bait(bait)}, folder / f"{name}.bin")
    with pytest.raises((UserError, ValueError)) as caught:
        PARTS[part](folder)
    assert not bait.exists()
    assert caught.type is UserError or part == "dino"  # which ssr_model refuses, without pipeline


@pytest.mark.parametrize("where", ["component", "pipeline"])
def test_a_pipeline_s_own_code_is_not_run(
    where: str, tiny_models: Path, tmp_path: Path, bait: Path
) -> None:
    folder = tmp_path / "sd"
    shutil.copytree(tiny_models / "sd", folder)
    index = json.loads((folder / "model_index.json").read_text())
    if where == "component":
        (folder / "unet" / "evil.py").write_text(CODE)
        index["unet"] = ["evil", "Evil"]
    else:
        (folder / "pipeline.py").write_text(CODE)
        index["_class_name"] = ["pipeline", "Evil"]
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="cannot load StableDiffusionPipeline"):
        models.load_pipeline(str(folder))
    assert not bait.exists()


def test_nobody_is_asked_whether_to_run_a_model_s_own_code(
    tiny_models: Path, tmp_path: Path, bait: Path
) -> None:
    """transformers' Auto classes ask, unless they are told; and a terminal may answer yes."""
    for name in ("clip", "dino", "blip2"):
        folder = tmp_path / name
        shutil.copytree(tiny_models / name, folder)
        (folder / "evil.py").write_text(CODE)
        if name != "blip2":
            config = json.loads((folder / "config.json").read_text())
            config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.EvilConfig"}}
            (folder / "config.json").write_text(json.dumps(config))
        else:
            file = folder / "tokenizer_config.json"
            tokens = json.loads(file.read_text())
            tokens["auto_map"] = {"AutoTokenizer": [None, "evil.EvilTokenizer"]}
            file.write_text(json.dumps({**tokens, "tokenizer_class": "EvilTokenizer"}))
    with pytest.raises(UserError, match="cannot load AutoConfig"):
        models.load_image_embedder_config(str(tmp_path / "clip"))
    with pytest.raises(ValueError, match="a DINO or DINOv2"):
        load_dino(str(tmp_path / "dino"))
    with contextlib.suppress(UserError):  # the tokenizer's files say enough without it
        captioner(tmp_path / "blip2")
    assert not bait.exists()
