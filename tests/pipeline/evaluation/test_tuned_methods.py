"""Textual Inversion and DreamBooth-LoRA on the mini models: what they learn, and give back."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.config import EvaluateConfig, LearningConfig, ModelsConfig, TuningConfig, parse
from pipeline.errors import UserError
from pipeline.evaluation.benches import (
    BenchSubject,
    Reference,
    Request,
    Selection,
    mini_bench,
    open_bench,
)
from pipeline.evaluation.benches.mini import MiniBench
from pipeline.evaluation.methods import dreambooth, make_methods, tuning
from pipeline.evaluation.methods.dreambooth import DreamBoothLoRA
from pipeline.evaluation.methods.text_only import TextOnly
from pipeline.evaluation.methods.textual_inversion import TextualInversion, new_words
from pipeline.generation.sampler import load_base
from ssr_model.text import tokenize
from tests.pipeline.evaluation import folders

METHODS = [TextualInversion, DreamBoothLoRA]


def settings(steps: int = 2, lr: float = 1e-1, **changes: Any) -> EvaluateConfig:
    learning = LearningConfig(steps, lr, batch_size=2)
    tuned = TuningConfig(textual_inversion=learning, dreambooth=learning)
    return replace(EvaluateConfig(steps=2, device="cpu", tuning=tuned), **changes)


@pytest.fixture
def tiny(tiny_models: Path) -> ModelsConfig:
    """A random base model, a hundredth of the mini one, where nothing has to be learned."""
    return ModelsConfig(base=str(tiny_models / "sd"))


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    """For either subject of one reference, and for both together."""
    single = MiniBench(1, 32).requests(0, 2)
    reference = single[0].reference
    both = tuple(Selection(reference, i) for i in (0, 1))
    prompt = " and ".join(subject.phrase for subject in reference.subjects)
    return [*single, Request("both", both, prompt, seed=5)]


def opened(method: Any, cfg: EvaluateConfig) -> Any:
    made = method("x", cfg)
    made.open()
    return made


def pixels(drawn: Any) -> list[np.ndarray]:
    return [np.asarray(each.image).astype(int) for each in drawn]


def text_only(method: Any, requests: list[Request]) -> list[np.ndarray]:
    """What the method's own pipeline draws of the prompts."""
    plain = TextOnly("plain", method.cfg)
    plain._pipe = method._pipe
    return pixels(plain(requests))


def weights(pipe: Any) -> dict[str, torch.Tensor]:
    parts = {"unet": pipe.unet, "vae": pipe.vae, "text_encoder": pipe.text_encoder}
    return {f"{p}.{k}": v for p, part in parts.items() for k, v in part.state_dict().items()}


@pytest.mark.parametrize("method", METHODS)
def test_the_pipeline_is_given_back_as_it_was(method, requests, tiny) -> None:
    made = opened(method, settings(models=tiny))
    pipe, tokenizer, vocabulary = made._pipe, made._pipe.tokenizer, len(made._pipe.tokenizer)
    before = {name: tensor.clone() for name, tensor in weights(pipe).items()}
    drawn_before, random = text_only(made, requests), torch.get_rng_state()
    drawn = made(requests)
    assert torch.equal(random, torch.get_rng_state()), "nor is anything of the process's changed"
    after = weights(pipe)
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert pipe.tokenizer is tokenizer and len(tokenizer) == vocabulary
    for was, now in zip(drawn_before, text_only(made, requests), strict=True):
        assert (was == now).all()
    for was, learned in zip(drawn_before, pixels(drawn), strict=True):
        assert (was != learned).any()


@pytest.mark.parametrize("method", METHODS)
def test_pictures_do_not_depend_on_order_company_or_run(method, requests, tiny) -> None:
    cfg = settings(models=tiny)
    drawn = pixels(opened(method, cfg)(requests))
    torch.manual_seed(99)
    again = opened(method, cfg)
    backwards = pixels(again(requests[::-1]))[::-1]
    assert all((a == b).all() for a, b in zip(drawn, backwards, strict=True))
    (alone,) = pixels(again(requests[1:2]))
    assert np.abs(alone - drawn[1]).max() <= 2, "another batch, another rounding"
    other = pixels(opened(method, replace(cfg, seed=1))(requests))
    assert all((a != b).any() for a, b in zip(drawn, other, strict=True))


@pytest.mark.parametrize("prediction", ["v_prediction", "epsilon"])
def test_a_word_is_learned(requests, prediction: str) -> None:
    """At fixed noise and timesteps the loss on the reference falls, and no tensor but one moves."""
    made = opened(TextualInversion, settings(steps=40, lr=2e-2))
    pipe, selection = made._pipe, requests[0].selections[0]
    pipe.scheduler.register_to_config(prediction_type=prediction)
    with new_words(pipe, ["fish", "boat"]) as words:
        pictures = tuning.lessons(pipe, selection.reference, [0], ["a <v1> fish"], False)
        untouched = words["<v2>"].detach().clone()
        before = loss_of(pipe, pictures)
        made._learn(selection, "<v1> fish", words["<v1>"])
        assert loss_of(pipe, pictures) < 0.98 * before
        assert torch.equal(words["<v2>"], untouched)


@pytest.mark.parametrize("prediction", ["v_prediction", "epsilon"])
def test_a_lora_is_learned(requests, prediction: str) -> None:
    made = opened(DreamBoothLoRA, settings(steps=40, lr=2e-3))
    made._pipe.scheduler.register_to_config(prediction_type=prediction)
    selections = requests[0].selections
    pictures = made._lessons(selections)
    before = loss_of(made._pipe, pictures)
    with made._learned(selections):
        assert loss_of(made._pipe, pictures) < 0.9 * before
    assert loss_of(made._pipe, pictures) == before


def loss_of(pipe: Any, pictures: list[tuning.Lesson]) -> float:
    with torch.no_grad():
        return float(tuning.denoising_loss(pipe, pictures, 32, torch.Generator().manual_seed(3)))


def test_new_words_change_no_other_word(requests) -> None:
    pipe = load_base(settings())
    texts = ["a cup on snow", "an orange fish", "<v1>", ""]
    ids = tokenize(pipe.tokenizer, texts[:2])
    states = pipe.text_encoder(ids)[0]
    table = pipe.text_encoder.get_input_embeddings().weight
    with new_words(pipe, ["cup", "toy boat"]) as words:
        assert torch.equal(tokenize(pipe.tokenizer, texts[:2]), ids)
        assert torch.equal(pipe.text_encoder(ids)[0], states)
        said = tokenize(pipe.tokenizer, ["a <v1> and <v2>"])[0]
        a, v1, joint, v2 = said[1:5].tolist()
        assert (v1, v2) == (len(table), len(table) + 1) and max(a, joint) < len(table)
        for word, name in (("<v1>", "cup"), ("<v2>", "boat")):
            (token,) = pipe.tokenizer(name, add_special_tokens=False).input_ids
            assert torch.equal(words[word], table[token]), "it begins as its class"
        plain = tokenize(pipe.tokenizer, ["a cup and boat"])
        assert torch.equal(pipe.text_encoder(said[None])[0], pipe.text_encoder(plain)[0])


def test_new_words_are_new() -> None:
    """A base model that knows one already, as after another Textual Inversion."""
    pipe = load_base(settings())
    pipe.tokenizer.add_tokens(["<v1>", "<v3>"])
    pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer))
    ids = tokenize(pipe.tokenizer, ["a <v1>"])
    states = pipe.text_encoder(ids)[0]
    with new_words(pipe, ["cup", "boat"]) as words:
        assert list(words) == ["<v2>", "<v4>"]
        assert torch.equal(tokenize(pipe.tokenizer, ["a <v1>"]), ids)
        assert torch.equal(pipe.text_encoder(ids)[0], states)
        said = tokenize(pipe.tokenizer, ["<v2> <v4>"])[0]
        assert said[1:3].tolist() == [len(pipe.tokenizer) - 2, len(pipe.tokenizer) - 1]


@pytest.mark.parametrize("method", METHODS)
def test_prompts_without_a_place_for_the_word_are_refused_first(
    method, tiny, tmp_path: Path
) -> None:
    made = method("x", settings(models=tiny))
    made.check(MiniBench(5, 32))
    said = copy.deepcopy(folders.BENCH)
    folder = folders.write_multi_subject(tmp_path, said)
    made.check(open_bench(EvaluateConfig(bench=str(folder)), side=32))
    said["references"][0]["requests"][0]["prompts"][1] = "a mug on the beach"
    folders.write_multi_subject(tmp_path, said)
    with pytest.raises(UserError, match="kitchen-01-0: the prompt 'a mug on the beach' says nei"):
        made.check(open_bench(EvaluateConfig(bench=str(folder)), side=32))


def test_dreambooth_calls_a_picture_by_what_is_learned_of_it(requests) -> None:
    made = opened(DreamBoothLoRA, settings())
    first, second = requests[0].reference.subjects
    (one,) = made._lessons(requests[1].selections)
    (both,) = made._lessons(requests[2].selections)
    assert one.texts == [f"a sks {second.name}"]
    assert both.texts == [f"a sks {first.name} and a ktn {second.name}"]
    elsewhere = Selection(mini_bench(2, 32)[1], 0)
    apart = made._lessons((requests[0].selections[0], elsewhere))
    assert [each.texts for each in apart] == [
        [f"a sks {first.name}"],
        [f"a ktn {elsewhere.subject.name}"],
    ]


def test_lessons_are_central_squares_and_masks_their_weights() -> None:
    pipe = load_base(settings())
    noise = np.random.default_rng(0).integers(0, 255, (64, 96, 3), dtype=np.uint8)
    left, right = np.zeros((64, 96), bool), np.zeros((64, 96), bool)
    left[:, 16:32], right[:32, 64:80] = True, True  # of the central 64 x 64
    edge = np.zeros((64, 96), bool)
    edge[:, :16] = True
    images = (Image.fromarray(noise), Image.fromarray(noise[:, 16:80]))
    subjects = [
        BenchSubject("cup", "a cup", (left, None)),
        BenchSubject("boat", "a boat", (right, right[:, 16:80])),
        BenchSubject("key", "a key", (edge, None)),
    ]
    reference = Reference("r", images, subjects)
    wide, square = tuning.lessons(pipe, reference, [0, 1], ["a"], masked=True)
    assert wide.mean.shape == (12, 8, 8) and square.mean.std() > 0.3
    assert (wide.mean - square.mean).abs().mean() < 0.05, "resampling looks beyond the edge"
    expected = torch.zeros(1, 8, 8)
    expected[:, :, :2], expected[:, :4, 6:] = 1, 1
    assert torch.equal(wide.weight, expected)
    assert (square.weight == 1).all(), "one of the masks is not known there"
    assert all((w.weight == 1).all() for w in tuning.lessons(pipe, reference, [2], ["a"], False))
    with pytest.raises(UserError, match=r"r: the subject lies outside .*; set tuning.masked"):
        tuning.lessons(pipe, reference, [2], ["a"], masked=True)


def test_what_is_masked_out_is_not_learned(requests) -> None:
    """Pictures that agree where the mask is are the same lesson."""
    pipe = load_base(settings())
    (lesson,) = tuning.lessons(pipe, requests[0].reference, [0], ["a <v1>"], masked=True)
    elsewhere = torch.where(lesson.weight > 0, lesson.mean, torch.randn_like(lesson.mean))
    losses = [
        loss_at(pipe, replace(lesson, mean=mean, weight=weight, deviation=0 * lesson.mean))
        for weight in (lesson.weight, torch.ones_like(lesson.weight))
        for mean in (lesson.mean, elsewhere)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and losses[2] != losses[3]


def loss_at(pipe: Any, lesson: tuning.Lesson) -> float:
    """With a U-Net that predicts nothing, so that only the target counts."""

    class Blank:
        def __call__(self, noisy: torch.Tensor, *_: Any, **__: Any) -> list[torch.Tensor]:
            return [torch.zeros_like(noisy)]

    pipe.unet, unet = Blank(), pipe.unet
    try:
        return loss_of(pipe, [lesson])
    finally:
        pipe.unet = unet


@pytest.mark.parametrize("method", METHODS)
def test_a_training_that_diverges_is_refused_and_leaves_nothing(method, requests, tiny) -> None:
    made = opened(method, settings(steps=6, lr=1e30, models=tiny))
    before = text_only(made, requests)
    with pytest.raises(UserError, match=r"not finite in step . of 6 .*; lower tuning's lr, 1e\+30"):
        made(requests)
    with pytest.raises(UserError, match="the prompt 'snow' says neither"):  # before it is trained
        made([*requests, replace(requests[0], key="wordless", prompt="snow")])
    assert all((a == b).all() for a, b in zip(before, text_only(made, requests), strict=True))


def test_bad_settings_are_refused(monkeypatch, requests) -> None:
    for name in ("textual-inversion", "dreambooth-lora"):
        with pytest.raises(UserError, match=f"{name} takes no weights"):
            make_methods(EvaluateConfig(methods=[f"{name}@runs/x"]))
        (made,) = make_methods(EvaluateConfig(methods=[name]))
        assert made.learns and made.native and made.settings["learning"]["steps"] > 0
    with pytest.raises(UserError, match=r"tuning.textual_inversion.steps is 0"):
        settings(steps=0)
    with pytest.raises(UserError, match=r"tuning.textual_inversion.lr is 0.0; it must be above 0"):
        TuningConfig(textual_inversion=LearningConfig(10, 0.0, 1))
    with pytest.raises(UserError, match=r"tuning.dreambooth_rank is 0"):
        TuningConfig(dreambooth_rank=0)
    crowd = requests[0].outline.subjects * 5
    with pytest.raises(UserError, match="4 subjects at once at most, and a request asks for 5"):
        dreambooth.called(crowd)
    monkeypatch.setattr(dreambooth, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs peft; pip install 'ssr-on-ray\[tuning\]'"):
        make_methods(EvaluateConfig(methods=["dreambooth-lora"]))


def test_settings_are_given_on_the_command_line() -> None:
    words = ["--tuning.textual_inversion.steps", "7", "--tuning.dreambooth.lr", "0.5"]
    given, preset = parse(EvaluateConfig, words).tuning, parse(EvaluateConfig, []).tuning
    assert given.textual_inversion == replace(preset.textual_inversion, steps=7)
    assert given.dreambooth == replace(preset.dreambooth, lr=0.5)
    assert TuningConfig().textual_inversion == LearningConfig(3000, 2e-3, 4)
    assert TuningConfig().dreambooth == LearningConfig(500, 1e-4, 1)
