"""What is shared draws the same picture: the snippet is run, the command is parsed."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.command_line import load
from pipeline.config import GenerateConfig
from pipeline.config.serve import ServeConfig
from pipeline.generation.recipe import Recipe, Reference
from pipeline.generation.references import open_picture, read_references
from pipeline.generation.sampler import Sampler
from pipeline.serving import page_share
from tests.untrained import save_controlnet, save_encoder, tiny_parts


@pytest.fixture(scope="module")
def cfg(tiny_models: Path, tmp_path_factory: pytest.TempPathFactory) -> ServeConfig:
    parts = tiny_parts(tiny_models)
    root = tmp_path_factory.mktemp("root")
    save_encoder(root / "model", parts)
    net = save_controlnet(root / "net", parts)
    return ServeConfig(root=str(root), models=parts, device="cpu", controlnet=net)


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 32, 3), np.uint8))


def mask() -> Image.Image:
    cells = np.zeros((32, 32), np.uint8)
    cells[8:24, 4:20] = 255
    return Image.fromarray(cells)


def recipe(**changes: Any) -> Recipe:
    subjects = (
        Reference(picture(0), 'the "red" cup', name="a", scale=0.8, region=(0, 0, 1 / 3, 1)),
        Reference(picture(1), None, mask(), name="b"),
        Reference(picture(2), "fish", mask(), name="c", region=(0.5, 0, 1, 0.7)),
    )
    said = {"prompt": "it's a cup\nwith a fish", "subjects": subjects, "seed": 5, "steps": 2,
            "guidance": 4.0, "guidance_rescale": 0.6}  # fmt: skip
    return Recipe(**{**said, **changes})


def typed(command: str) -> list[str]:
    """The arguments that a shell gives to `python`."""
    said = f"python() {{ printf '%s\\0' \"$@\"; }}\n{command}"
    done = subprocess.run(["bash", "-c", said], capture_output=True, text=True, check=True)
    return done.stdout.split("\0")[:-1]


WHOLE = recipe(negative_prompt="a 'tree'")
SIZED = recipe(size=(48, 32), control=picture(3), control_scale=0.7)
SNIPPETS = {
    "three subjects": WHOLE,
    "none": recipe(subjects=()),
    "another size and a control image": SIZED,
    "a control image and no subject": recipe(subjects=(), control=picture(3).resize((40, 30))),
}


@pytest.mark.parametrize("asked", SNIPPETS.values(), ids=SNIPPETS)
def test_the_snippet_draws_the_picture(
    asked: Recipe, cfg: ServeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, data in page_share.files(asked).items():
        (tmp_path / name).write_bytes(data)
    exec(compile(page_share.as_python(asked, cfg), "snippet.py", "exec"), {})
    sampler = Sampler.load(page_share.model(cfg), cfg, controlnet=cfg.controlnet)
    (expected,) = sampler.make([asked])
    with Image.open(tmp_path / "picture.png") as drawn:
        assert np.array_equal(np.asarray(drawn), np.asarray(expected))
    if asked.control is not None:  # or a snippet without it would pass
        (plain,) = sampler.make([replace(asked, control=None)])
        assert not np.array_equal(np.asarray(plain), np.asarray(expected))


def test_the_command_asks_for_the_same(
    cfg: ServeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    asked = SIZED
    for name, data in page_share.files(asked).items():
        (tmp_path / name).write_bytes(data)
    job, *options = typed(page_share.as_command(asked, cfg))
    assert job == "jobs/generate.py"
    parsed = load(GenerateConfig, options, "mini")
    assert (parsed.root, parsed.prompt, parsed.seed) == (cfg.root, asked.prompt, 5)
    assert (parsed.steps, parsed.guidance, parsed.guidance_rescale) == (2, 4.0, 0.6)
    assert parsed.models.base == cfg.models.base and parsed.models.vision == cfg.models.vision
    assert (parsed.width, parsed.height, parsed.control_scale) == (48, 32, 0.7)
    assert parsed.controlnet == cfg.controlnet and asked.control is not None
    assert open_picture(parsed.control or "").tobytes() == asked.control.tobytes()
    for again, subject in zip(read_references(parsed), asked.subjects, strict=True):
        assert again.sha256() == subject.sha256()
        assert (again.scale, again.region) == (subject.scale, subject.region)
    assert typed(page_share.as_command(WHOLE, cfg))[-5] == "--negative_prompt=a 'tree'"
    assert "--width" not in typed(page_share.as_command(WHOLE, cfg))
    assert "control" not in page_share.as_command(WHOLE, cfg)
    assert page_share.as_command(recipe(subjects=()), cfg) == ""


def test_a_word_that_looks_like_an_option(cfg: ServeConfig) -> None:
    subjects = (Reference(picture(0), "--root"), Reference(picture(1), "fish"))
    asked = recipe(subjects=subjects, prompt="-5")
    parsed = load(GenerateConfig, typed(page_share.as_command(asked, cfg))[1:], "mini")
    assert (parsed.query, parsed.prompt, parsed.root) == (["--root", "fish"], "-5", cfg.root)


def test_the_settings_as_json(cfg: ServeConfig) -> None:
    said = json.loads(page_share.as_json(SIZED, {"model": {"sha256": "abc"}}))
    assert said == {"recipe": SIZED.describe(), "model": {"sha256": "abc"}}
    assert said["recipe"]["size"] == [48, 32] and len(said["recipe"]["control"]) == 64


def test_a_remote_model_is_named_as_a_copy(cfg: ServeConfig) -> None:
    told = page_share.as_python(recipe(), ServeConfig(root="s3://bucket/run", dtype="float16"))
    assert "# model: a copy of s3://bucket/run/model" in told and "'model', vision=clip" in told
    assert "device=device, dtype=torch.float16" in told
