"""The SSR-Encoder as a method: what its fingerprint covers, and what is refused when."""

from __future__ import annotations

import copy
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline.config import EvaluateConfig
from pipeline.errors import UserError
from pipeline.evaluation.benches import open_bench
from pipeline.evaluation.methods import make_methods
from pipeline.evaluation.methods.shared import denoising
from pipeline.evaluation.methods.ssr import SelectBy
from pipeline.generation.sampler import model_identity
from tests.pipeline.evaluation import folders
from tests.pipeline.evaluation.rivals import apart, draw, requests, settings, write_ssr


@pytest.fixture
def cfg(tiny_models: Path, tmp_path: Path) -> EvaluateConfig:
    chosen = settings(tiny_models, root=str(tmp_path / "run"))
    write_ssr(tmp_path / "run/model", chosen.models)
    return chosen


def line(call: Callable[..., object], *args: Any) -> str:
    with pytest.raises(UserError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_models_fingerprint_is_of_config_and_weights(cfg: EvaluateConfig) -> None:
    """Another number of heads has the same tensors, and draws other pictures."""
    folder = Path(cfg.root) / "model"
    one = SelectBy("x", cfg, "mask")
    one.open()
    pictures, weights = draw(one, requests(1)), load_file(folder / "model.safetensors")
    first = shutil.copytree(folder, Path(cfg.root) / "first")
    write_ssr(folder, cfg.models, heads=1)
    same = load_file(folder / "model.safetensors")
    assert all(torch.equal(same[name], weights[name]) for name in weights)
    other = SelectBy("x", cfg, "mask")
    other.open()
    assert apart(draw(other, requests(1)), pictures) > 0
    assert other.settings["model"] != one.settings["model"]
    write_ssr(folder, cfg.models, seed=1)
    assert SelectBy("x", cfg, "mask").settings["model"] != one.settings["model"]
    (first / "README.md").write_text("told otherwise")
    assert SelectBy("x", cfg, "mask", str(first)).settings == one.settings


def test_two_encoders_are_told_apart_in_tables(cfg: EvaluateConfig) -> None:
    other = write_ssr(Path(cfg.root) / "other", cfg.models, seed=1)
    cfg.methods = ["ssr-text", f"released=ssr-text@{other}", "text-only", "base=text-only"]
    made = {method.name: method.title for method in make_methods(cfg)}
    assert made == {
        "ssr-text": "SSR, text query",
        "released": "SSR, text query (released)",
        "text-only": "Text only",
        "base": "Text only (base)",
    }


def test_a_hub_id_is_what_lies_behind_it(
    cfg: EvaluateConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Path(cfg.root) / "model"
    asked: list[Any] = []

    def snapshot_download(repo: str, allow_patterns: list[str], **_: Any) -> str:
        asked.append((repo, allow_patterns))
        return str(hub)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    before = model_identity("someone/ssr")
    assert before == model_identity(str(hub)), "wherever it lies"
    assert asked == [("someone/ssr", ["config.json", "model.safetensors", "README.md"])]
    write_ssr(hub, cfg.models, seed=1)
    assert model_identity("someone/ssr") != before


def test_a_model_that_was_exchanged_is_not_drawn_with(cfg: EvaluateConfig) -> None:
    method, folder = SelectBy("mine", cfg, "text"), Path(cfg.root) / "model"
    first = shutil.copytree(folder, Path(cfg.root) / "first")
    sent: SelectBy = pickle.loads(pickle.dumps(method))  # noqa: S301 (our own, as Ray sends it)
    write_ssr(folder, cfg.models, seed=1)
    said = line(sent.open)
    assert said.startswith("mine: the run's model is not what it was when the evaluation began")
    assert sent._sampler is None
    shutil.copytree(first, folder, dirs_exist_ok=True)
    sent.open()
    assert sent._sampler is not None


@pytest.mark.parametrize("by", ["text", "mask", "nothing"])
def test_what_is_no_model_is_refused_when_it_is_named(
    by: Any, cfg: EvaluateConfig, tmp_path: Path
) -> None:
    for name, reason in (
        (tmp_path / "run/modle", "no such folder, and not a hub id"),
        (tmp_path, "config.json is missing: this is not a saved SSR-Encoder"),
        (cfg.models.vision, "unknown key"),
        ("runs/modle", "no such folder, and not found on the hub"),
    ):
        said = line(SelectBy, "x", cfg, by, str(name))
        assert said.startswith("cannot load the SSR-Encoder: ") and reason in said
        assert str(name) in said
    config = tmp_path / "run/model/config.json"
    config.write_text(config.read_text().replace('"heads": 2', '"heads": "two"'))
    assert "heads" in line(SelectBy, "x", cfg, by)
    write_ssr(config.parent, cfg.models)
    (config.parent / "model.safetensors").unlink()
    assert "holds no weights" in line(SelectBy, "x", cfg, by)


def test_requests_that_it_cannot_draw_are_refused_before_any_is(
    cfg: EvaluateConfig, tmp_path: Path
) -> None:
    said = copy.deepcopy(folders.BENCH)
    kitchen, nothing = said["references"][0], "<|endoftext|>"
    kitchen["subjects"][2] = {"name": nothing, "phrase": "an apple"}
    kitchen["requests"].append({"subjects": ["cup", nothing], "prompts": ["a cup and an apple"]})
    cfg.bench = str(folders.write_multi_subject(tmp_path / "bench", said))
    bench = open_bench(cfg, side=32)
    assert line(SelectBy("ssr-text", cfg, "text").check, bench) == (
        "ssr-text: 1 of the bench's 5 requests ask for a subject whose name holds no word that the "
        "base model's tokenizer knows (kitchen-03-0); rename it, or leave ssr-text out of methods"
    )
    unmasked = line(SelectBy("ssr-mask", cfg, "mask").check, bench)
    assert "2 of the bench's 5 requests ask for a subject without a mask (kitchen-03-0," in unmasked
    SelectBy("all", cfg, "nothing").check(bench)


def test_masks_outside_of_what_clip_sees_are_refused_before_anything_is_drawn(
    cfg: EvaluateConfig, tmp_path: Path
) -> None:
    cfg.bench, cfg.references = str(folders.write_break_a_scene(tmp_path / "bench")), 1
    method, drawn = SelectBy("ssr-mask", cfg, "mask"), Path(cfg.bench) / "creature/mask0.png"
    method.open()
    for column, refused in ((0, True), (1, False), (12, False), (19, False), (20, True)):
        folders.write_mask(drawn, column)  # four of 24 columns, of which 4 to 19 are seen
        bench = open_bench(cfg, side=32)
        if refused:
            assert line(method.check, bench) == (
                "ssr-mask: the mask of creature, creature lies outside the picture's centre square,"
                " which is all that CLIP sees; crop the picture, or leave ssr-mask out of methods"
            )
            assert "outside the centre square" in line(method, bench.requests(0, 1))
        else:
            method.check(bench)
            method(bench.requests(0, 1))
    assert [which for which, _ in bench.masks()] == [
        "creature, creature",
        "creature, bowl",
        "creature, stone",
    ]
    cfg.references, cfg.bench = 3, "mini"
    for by in ("text", "mask", "nothing"):
        SelectBy("x", cfg, by).check(open_bench(cfg, side=32))  # type: ignore[arg-type]


def test_settings_cover_every_part_of_the_base_model(cfg: EvaluateConfig, tmp_path: Path) -> None:
    shutil.copytree(cfg.models.base, tmp_path / "sd")
    cfg.models.base = str(tmp_path / "sd")
    for file, part in (
        ("unet/diffusion_pytorch_model.safetensors", "base"),
        ("scheduler/scheduler_config.json", "base"),
        ("vae/diffusion_pytorch_model.safetensors", "vae"),
        ("vae/config.json", "vae"),
        ("text_encoder/model.safetensors", "text_encoder"),
        ("tokenizer/tokenizer_config.json", "text_encoder"),
    ):
        before, path = denoising(cfg), tmp_path / "sd" / file
        data = path.read_bytes()
        path.write_bytes(data[:-1] + (b" " if path.suffix == ".json" else bytes([data[-1] ^ 1])))
        after = denoising(cfg)
        assert [key for key in before if before[key] != after[key]] == [part], file
