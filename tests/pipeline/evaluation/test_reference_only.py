"""Reference-only control, against its loop written out over the U-Net's own blocks."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.config import EvaluateConfig, ModelsConfig
from pipeline.errors import UserError
from pipeline.evaluation.benches import Request
from pipeline.evaluation.methods import make_methods
from pipeline.evaluation.methods.reference_only import ReferenceOnly
from pipeline.evaluation.methods.text_only import TextOnly
from pipeline.generation.sampler import load_base
from tests.pipeline.evaluation import rivals
from tests.pipeline.evaluation.rivals import NOISE, apart, draw, of_one_photo, of_two, requests


def settings(**chosen: Any) -> EvaluateConfig:
    """The mini world's own models: a random U-Net's self-attention tells pictures little apart."""
    return EvaluateConfig(models=ModelsConfig(base="miniworld:sd"), steps=3, **chosen)


@pytest.fixture(scope="module")
def opened() -> Iterator[ReferenceOnly]:
    method = ReferenceOnly("reference-only", settings())
    method.open()
    yield method
    method.close()


@torch.no_grad()
def by_hand(cfg: EvaluateConfig, asked: Request) -> np.ndarray:
    """One picture: a pass that writes what every self-attention is given, a pass that reads it."""
    pipe = load_base(cfg)
    blocks = [m for m in pipe.unet.modules() if type(m).__name__ == "BasicTransformerBlock"]
    bank: dict[Any, torch.Tensor] = {}
    writing = False

    def self_attention(block: Any) -> Any:
        plain = block.attn1.forward

        def forward(x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            if writing:
                bank[block] = x.clone()
                return plain(x)
            both = plain(x, encoder_hidden_states=torch.cat([x, bank[block]], dim=1))
            styled = both.clone()
            if len(x) == 2:
                styled[:1] = plain(x[:1])
            return cfg.fidelity * styled + (1 - cfg.fidelity) * both

        return forward

    for block in blocks:
        block.attn1.forward = self_attention(block)
    guided = cfg.guidance > 1
    text, empty = pipe.encode_prompt(asked.prompt, "cpu", 1, guided)
    text = torch.cat([empty, text]) if guided else text
    generator = torch.Generator("cpu").manual_seed(asked.seed)
    side, channels = pipe.unet.config.sample_size, pipe.unet.config.in_channels
    x = torch.randn((1, channels, side, side), generator=generator)
    pixels = np.asarray(asked.reference.image, np.float32) / 127.5 - 1
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    reference = pipe.vae.encode(image).latent_dist.sample(generator=generator)
    reference = reference * pipe.vae.config.scaling_factor
    pipe.scheduler.set_timesteps(cfg.steps)
    for t in pipe.scheduler.timesteps:
        noise = torch.randn(x.shape, generator=generator)
        noisy = pipe.scheduler.add_noise(reference, noise, t[None])
        writing = True
        pipe.unet(noisy.repeat(len(text), 1, 1, 1), t, encoder_hidden_states=text)
        writing = False
        out = pipe.unet(x.repeat(len(text), 1, 1, 1), t, encoder_hidden_states=text).sample
        if guided:
            out = out[:1] + cfg.guidance * (out[1:] - out[:1])
        x = pipe.scheduler.step(out, t, x).prev_sample
    decoded = pipe.vae.decode(x / pipe.vae.config.scaling_factor).sample[0]
    return ((decoded / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).numpy() * 255).round()


@pytest.mark.parametrize(
    "chosen",
    [{"fidelity": 1.0}, {"fidelity": 0.5}, {"fidelity": 0.0}, {"guidance": 1.0}],
    ids=["fidelity 1", "fidelity 0.5", "fidelity 0", "no guidance"],
)
def test_it_is_the_loop_written_out(chosen: dict[str, float]) -> None:
    method = ReferenceOnly("reference-only", settings(**chosen))
    method.open()
    (asked,) = requests(1)
    assert apart(draw(method, [asked])[0], by_hand(method.cfg, asked)) <= NOISE


def test_it_is_the_same_loop_where_noise_is_predicted(tiny_models: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_models / "sd", tmp_path / "sd")
    scheduler = tmp_path / "sd/scheduler/scheduler_config.json"
    scheduler.write_text(scheduler.read_text().replace('"v_prediction"', '"epsilon"'))
    method = ReferenceOnly("reference-only", rivals.settings(tmp_path))
    method.open()
    assert method._pipe.scheduler.config.prediction_type == "epsilon"
    (asked,) = requests(1)
    assert apart(draw(method, [asked])[0], by_hand(method.cfg, asked)) <= NOISE


def test_fidelity_and_reference_matter(opened: ReferenceOnly) -> None:
    asked = requests(2)
    floor = TextOnly("text-only", opened.cfg)
    floor.open()
    pictures = draw(opened, asked)
    assert apart(pictures, draw(floor, asked)) > 10
    other = asked[0]
    swapped = Request(other.key, asked[1].selections, other.prompt, other.seed)
    assert apart(draw(opened, [swapped])[0], pictures[0]) > 10
    strict = ReferenceOnly("strict", settings(fidelity=1.0))
    strict.open()
    assert apart(draw(strict, asked), pictures) > 10
    assert strict.settings != opened.settings


def test_a_picture_does_not_depend_on_its_batch(opened: ReferenceOnly) -> None:
    first, second, third = requests(3)
    asked = [first, of_two(second, third), third, of_two(first, second)]
    together = draw(opened, asked)
    for picture, each in zip(together, asked, strict=True):
        assert apart(picture, draw(opened, [each])[0]) <= NOISE


def test_two_references_condition_and_one_photo_does_once(opened: ReferenceOnly) -> None:
    first, second = requests(2)
    one, both = draw(opened, [first, of_two(first, second)])
    assert apart(one, both) > 10
    assert apart(draw(opened, [of_one_photo(first)])[0], one) == 0


def test_the_unet_is_given_back(opened: ReferenceOnly) -> None:
    asked, floor = requests(2), TextOnly("text-only", opened.cfg)
    floor.open()
    before = draw(floor, asked)
    method = ReferenceOnly("reference-only", settings())
    method.open()
    pipe = method._pipe
    floor._pipe = pipe
    assert apart(draw(floor, asked), before) == 0, "nothing is shown"
    draw(method, asked)
    assert apart(draw(floor, asked), before) == 0, "nothing is kept"
    processors = pipe.unet.attn_processors
    method.close()
    assert not pipe.unet._forward_pre_hooks and method._pipe is None
    assert {type(each).__name__ for each in pipe.unet.attn_processors.values()} == {
        "AttnProcessor2_0"
    }
    assert pipe.unet.attn_processors.keys() == processors.keys()
    assert apart(draw(floor, asked), before) == 0
    method.close()


def test_a_failed_call_leaves_nothing_behind(opened: ReferenceOnly) -> None:
    asked, floor = requests(1), TextOnly("text-only", opened.cfg)
    before = draw(opened, asked)
    floor.open()
    plain = draw(floor, asked)
    passes: list[object] = []

    def fail(*_: object) -> None:  # half-way through the second pass, which reads
        passes.append(None)
        if len(passes) == 2:
            raise RuntimeError("out of memory")

    hook = opened._pipe.unet.mid_block.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        draw(opened, asked)
    hook.remove()
    floor._pipe = opened._pipe
    assert apart(draw(floor, asked), plain) == 0
    assert apart(draw(opened, asked), before) == 0


def test_a_reference_of_another_shape_is_cropped(opened: ReferenceOnly) -> None:
    (asked,) = requests(1)
    square = asked.reference.image
    wide = square.crop((-16, 0, 48, 32))  # black at both sides
    chosen = asked.selections[0]
    reference = type(chosen.reference)(
        chosen.reference.key, (wide,), chosen.reference.subjects, chosen.reference.ground
    )
    widened = Request(asked.key, (type(chosen)(reference, 0),), asked.prompt, asked.seed)
    assert apart(draw(opened, [widened]), draw(opened, [asked])) == 0


def test_what_it_does_not_take_is_refused() -> None:
    for fidelity in (-0.1, 1.5):
        with pytest.raises(UserError, match="not within 0 to 1"):
            ReferenceOnly("reference-only", settings(fidelity=fidelity))
    with pytest.raises(UserError, match="reference-only takes no weights"):
        make_methods(settings(methods=["reference-only@somewhere"]))
