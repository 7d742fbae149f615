"""The shipped mini models: whole, small, loadable by plain `from_pretrained`, as good as noted."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from transformers import Blip2ForConditionalGeneration, Blip2Processor, CLIPModel, CLIPTokenizer

from pipeline.miniworld import world
from pipeline.miniworld.foundation import blip2, clip, dino, judging, text, unet, vae
from pipeline.miniworld.foundation.corpus import build
from pipeline.miniworld.judge import Judge
from ssr_model.metrics import load_clip, load_dino

WEIGHTS = Path(world.__file__).parent / "weights"


def noted(model: str) -> dict[str, float]:
    scores: dict[str, float] = json.loads((WEIGHTS / "foundation.json").read_text())["models"][
        model
    ]["scores"]
    return scores


def test_every_file_is_the_one_that_was_trained_and_together_they_are_small() -> None:
    hashes = json.loads((WEIGHTS / "foundation.json").read_text())["sha256"]
    files = sorted(WEIGHTS.rglob("*.safetensors"))
    assert {str(file.relative_to(WEIGHTS)) for file in files} == set(hashes)
    for file in files:
        assert (
            hashlib.sha256(file.read_bytes()).hexdigest() == hashes[str(file.relative_to(WEIGHTS))]
        )
    assert sum(p.stat().st_size for p in WEIGHTS.rglob("*") if p.is_file()) <= 25e6


def test_the_autoencoder_keeps_the_picture() -> None:
    pipe = StableDiffusionPipeline.from_pretrained(WEIGHTS / "sd")
    assert vae.psnr(pipe.vae.float(), build("val", 60)) > 28.0
    assert len(pipe.tokenizer) == pipe.text_encoder.config.vocab_size
    assert pipe.tokenizer.model_max_length == text.CONTEXT


def test_the_text_encoder_of_the_pipeline_is_clips() -> None:
    pipe = StableDiffusionPipeline.from_pretrained(WEIGHTS / "sd")
    ours = CLIPModel.from_pretrained(WEIGHTS / "clip").text_model.state_dict()
    for name, value in pipe.text_encoder.state_dict().items():
        assert torch.equal(value.float(), ours[name.removeprefix("text_model.")].float()), name


def test_clip_knows_classes_and_keeps_colour() -> None:
    model = CLIPModel.from_pretrained(WEIGHTS / "clip").float().eval()
    tokenizer = CLIPTokenizer.from_pretrained(WEIGHTS / "clip")
    found = clip.scores(
        model, tokenizer, build("val", 300, subjects=1), build("val", 150, subjects=2)
    )
    assert found["class_of_one"] > noted("clip")["class_of_one"] - 0.05
    assert found["both_of_two"] > noted("clip")["both_of_two"] - 0.08
    assert min(found[f"mean_colour_r2_depth_{depth}"] for depth in (2, 4, 6)) > 0.8


def test_text_to_image_draws_what_is_named() -> None:
    pipe = StableDiffusionPipeline.from_pretrained(WEIGHTS / "sd").to(torch.float32)
    pipe.set_progress_bar_config(disable=True)
    judge = Judge.load(WEIGHTS / "judge")
    for sampling in unet.SAMPLINGS:
        found, _ = unet.scores(pipe, judge, 50, sampling)
        for name, share in found.items():
            assert share > noted("unet")[name] - 0.15, name


def test_the_captioner_names_what_is_there() -> None:
    model = Blip2ForConditionalGeneration.from_pretrained(WEIGHTS / "blip2").float().eval()
    processor = Blip2Processor.from_pretrained(WEIGHTS / "blip2")
    found = blip2.scores(model, processor, build("val", 100))
    assert found["exact_classes"] > noted("blip2")["exact_classes"] - 0.08


def test_the_judge_finds_what_is_there() -> None:
    found = judging.scores(Judge.load(WEIGHTS / "judge"), build("val", 100))
    assert found["exact_classes"] > 0.93
    assert np.isfinite(found["pixel_accuracy"])


def test_dino_tells_identities_apart() -> None:
    backbones = load_dino(str(WEIGHTS / "dino")), load_clip(str(WEIGHTS / "clip"))
    found = dino.scores(*backbones, build("val", 100))
    for name in ("dino_whole", "dino_cut_out", "dino_cut_out_texture", "spread"):
        assert found[name] > noted("dino")[name] - 0.08, name


def test_the_encoder_looks_at_what_the_query_names() -> None:
    """The shipped SSR-Encoder: the patch where it looks most lies on the asked subject."""
    from pipeline.config import GenerateConfig
    from pipeline.evaluation.benches import mini_bench
    from pipeline.generation.sampler import Sampler, model_folder
    from pipeline.storage import Storage

    with model_folder(Storage("."), "miniworld:ssr") as folder:
        sampler = Sampler.load(folder, GenerateConfig(device="cpu"))
    hits = []
    for reference in mini_bench(40, sampler.side):
        subject = reference.subjects[0]
        (looks,) = sampler.attention(reference.image, [subject.query])
        rows, columns = looks.shape
        row, column = np.unravel_index(looks.argmax(), looks.shape)
        height, width = subject.mask.shape[0] // rows, subject.mask.shape[1] // columns
        patch = subject.mask[row * height : (row + 1) * height, column * width :][:, :width]
        hits.append(bool(patch.any()))
    assert np.mean(hits) >= noted("ssr")["peak_target_text"] - 0.1
