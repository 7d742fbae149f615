"""Models by name: what is loaded, in which form, and what is refused before it does harm."""

import json
import shutil
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch

from pipeline import models
from pipeline.errors import UserError


def test_every_part_loads_in_fp32_and_eval_mode(tiny_models: Path) -> None:
    base, vision = str(tiny_models / "sd"), str(tiny_models / "clip")
    for module in (
        models.load_text_encoder(base),
        models.load_vae(base),
        models.load_unet(base),
        models.load_vision(vision),
    ):
        assert not module.training
        assert {weight.dtype for weight in module.parameters()} == {torch.float32}
    assert models.load_unet(base, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert models.load_scheduler(base).config.prediction_type == "v_prediction"


def test_the_tokenizer_fits_its_text_encoder(tiny_models: Path) -> None:
    base = str(tiny_models / "sd")
    tokenizer, encoder = models.load_tokenizer(base), models.load_text_encoder(base)
    assert len(tokenizer) == encoder.config.vocab_size
    assert tokenizer.model_max_length == encoder.config.max_position_embeddings


def test_the_image_processor_is_the_pil_one(tiny_models: Path) -> None:
    processor = models.load_image_processor(str(tiny_models / "clip"))
    assert type(processor).__name__ == "CLIPImageProcessorPil"


def test_the_pipeline_draws(tiny_models: Path) -> None:
    pipe = models.load_pipeline(str(tiny_models / "sd"))
    assert type(pipe.scheduler).__name__ == "DDIMScheduler"
    assert pipe.safety_checker is None
    image = pipe("a cup", num_inference_steps=1, output_type="np").images[0]
    assert image.shape[-1] == 3


def test_a_tokenizer_without_its_files_is_refused(tiny_models: Path, tmp_path: Path) -> None:
    """transformers gives one with two entries and no error."""
    shutil.copytree(tiny_models / "sd", tmp_path / "sd")
    for name in ("vocab.json", "merges.txt", "tokenizer.json"):
        (tmp_path / "sd" / "tokenizer" / name).unlink(missing_ok=True)
    with pytest.raises(UserError, match="tokenizer"):
        models.load_tokenizer(str(tmp_path / "sd"))


def test_a_tokenizer_of_another_length_is_refused(tiny_models: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_models / "sd", tmp_path / "sd")
    file = tmp_path / "sd" / "tokenizer" / "tokenizer_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "model_max_length": 1000}))
    with pytest.raises(UserError, match="length is 1000"):
        models.load_tokenizer(str(tmp_path / "sd"))


@pytest.mark.parametrize("name", ["miniworld:nothing", "no-such-folder", "./a/b", "a/b/c"])
def test_names_that_mean_nothing_are_one_line(name: str) -> None:
    with pytest.raises(UserError) as caught:
        models.resolve(name)
    assert "\n" not in str(caught.value)


def test_names_that_mean_something(tiny_models: Path, tmp_path: Path) -> None:
    assert models.resolve(str(tiny_models / "sd")) == str(tiny_models / "sd")
    assert models.resolve("openai/clip-vit-large-patch14") == "openai/clip-vit-large-patch14"
    with pytest.raises(UserError, match="the folder has no"):
        models.resolve(str(tmp_path))


def test_a_folder_of_another_layout_is_one_line(tiny_models: Path) -> None:
    with pytest.raises(UserError, match="cannot load UNet2DConditionModel") as caught:
        models.load_unet(str(tiny_models / "clip"))
    assert "\n" not in str(caught.value)


def test_identity_is_of_the_weights_not_of_the_place(tiny_models: Path, tmp_path: Path) -> None:
    here = models.identity(str(tiny_models / "sd"), "vae")
    shutil.copytree(tiny_models / "sd", tmp_path / "sd")
    there = models.identity(str(tmp_path / "sd"), "vae")
    assert here["sha256"] == there["sha256"]
    assert here["sha256"] != models.identity(str(tiny_models / "sd"), "unet")["sha256"]
    weights = next((tmp_path / "sd" / "vae").glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    assert models.identity(str(tmp_path / "sd"), "vae")["sha256"] != here["sha256"]
    with pytest.raises(UserError, match="holds no weights"):
        models.identity(str(tiny_models / "sd"), "tokenizer")


def test_identity_is_of_all_that_is_read_and_of_nothing_else(
    tiny_models: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_models / "sd", tmp_path / "sd")
    sd = tmp_path / "sd"
    parts = ("vae", "unet", "text_encoder")

    def told() -> list[str]:
        return [models.identity(str(sd), part)["sha256"] for part in parts]

    first = told()
    (sd / "vae" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"a variant")
    (sd / "safety_checker").mkdir()
    (sd / "safety_checker" / "config.json").write_text("{}")
    assert told() == first
    for place, file in enumerate(
        ("vae/config.json", "scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json")
    ):
        before = told()
        (sd / file).write_text((sd / file).read_text() + " ")
        changed = [a != b for a, b in zip(before, told(), strict=True)]
        assert changed == [part == parts[place] for part in parts], file


@pytest.mark.parametrize("kinds", [["safetensors"], ["bin"], ["safetensors", "bin"], []])
def test_identity_of_a_hub_id_is_of_what_its_loader_would_take(
    kinds: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub, cache = tmp_path / "hub", tmp_path / "cache"
    for name in ("config.json", "vocab.txt", "README.md", *(f"model.{kind}" for kind in kinds)):
        hub.mkdir(exist_ok=True)
        (hub / name).write_text(f"what {name} says")
        (hub / name.replace("model.", "model.fp16.")).write_text("a variant")

    def snapshot_download(
        repo: str, revision: str | None, allow_patterns: list[str], ignore_patterns: list[str]
    ) -> str:
        assert (repo, revision) == ("someone/dino", "main")
        cache.mkdir(exist_ok=True)
        for file in hub.iterdir():
            wanted = any(fnmatch(file.name, pattern) for pattern in allow_patterns)
            if wanted and not any(fnmatch(file.name, pattern) for pattern in ignore_patterns):
                shutil.copy(file, cache)
        return str(cache)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    if not kinds:
        with pytest.raises(UserError, match=r"holds no weights \(\*.safetensors, \*.bin\)"):
            models.identity("someone/dino", revision="main")
        return
    told = models.identity("someone/dino", revision="main")
    assert told["name"] == "someone/dino"
    fetched = {file.name for file in cache.iterdir()}
    assert fetched == {"config.json", "vocab.txt", f"model.{kinds[0]}"}
    assert told["sha256"] == models.identity(str(hub))["sha256"], "as a folder"
    (hub / f"model.{kinds[0]}").write_text("other weights")
    assert models.identity("someone/dino", revision="main")["sha256"] != told["sha256"]


def test_weights_cut_short_are_one_line(tiny_models: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_models / "sd", tmp_path / "sd")
    for part, load in (("text_encoder", models.load_text_encoder), ("unet", models.load_unet)):
        weights = next((tmp_path / "sd" / part).glob("*.safetensors"))
        weights.write_bytes(weights.read_bytes()[:1000])
        with pytest.raises(UserError, match=f"sd/{part}") as caught:
            load(str(tmp_path / "sd"))
        assert "\n" not in str(caught.value)


def test_devices() -> None:
    assert models.device("cpu") == torch.device("cpu")
    assert models.device("auto").type in ("cpu", "cuda", "mps", "xpu")
    with pytest.raises(UserError, match="unknown"):
        models.device("gpu0")
    if not torch.accelerator.is_available():
        with pytest.raises(UserError, match="not there"):
            models.device("cuda")
