"""The training of the mini models: texts, resume, and every recipe for a few steps."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from transformers import (
    Blip2ForConditionalGeneration,
    CLIPModel,
    CLIPTextModel,
    CLIPTokenizer,
)

from pipeline.miniworld import world
from pipeline.miniworld.foundation import clip, corpus, text, unet, vae
from pipeline.miniworld.foundation.fitting import fit, learning_rate, seconds_spent
from ssr_model.metrics import load_dino


def test_every_word_is_one_token_and_any_text_can_be_read() -> None:
    tokenizer = text.build_tokenizer()
    for word in text.words():
        assert len(tokenizer(word)["input_ids"]) == 3, word  # with the two special tokens
    assert tokenizer.decode(tokenizer("zebra")["input_ids"], skip_special_tokens=True) == "zebra"


def test_the_longest_caption_fits_the_context() -> None:
    tokenizer = text.build_tokenizer()
    captions = [world.caption(world.scene(seed, "val", 3), True) for seed in range(400)]
    assert max(len(tokenizer(c)["input_ids"]) for c in captions) <= text.CONTEXT


def test_facts_bind_colours_to_their_class() -> None:
    one = set(clip.attributes("a red and white fish and a blue cup on sand"))
    other = set(clip.attributes("a blue fish and a red and white cup on sand"))
    assert one != other
    assert len(one & other) == 6  # two classes, three colours and the ground: the words
    assert max(one | other) < clip.ATTRIBUTES


def test_patch_labels_need_a_clear_majority() -> None:
    classes = np.zeros((1, 32, 32), np.int64)
    classes[0, :4, :4] = 5
    classes[0, :4, 4:6] = 5  # half a patch
    labels = clip.patch_labels(classes)[0]
    assert labels[0] == 5
    assert labels[1] == -1
    assert labels[2] == 0


def test_the_rate_warms_up_and_falls_to_a_hundredth() -> None:
    rates = [learning_rate(step, 100, 1.0, 10) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1.0)
    assert rates[100] == pytest.approx(0.01)


def test_a_broken_off_training_ends_in_the_same_weights(tmp_path: Path) -> None:
    def module() -> torch.nn.Linear:
        torch.manual_seed(0)
        return torch.nn.Linear(4, 2)

    def run(work: Path, stop: int | None = None) -> torch.nn.Linear:
        model = module()

        def step(number: int, rng: np.random.Generator) -> dict[str, torch.Tensor]:
            if number == stop:
                raise KeyboardInterrupt
            x = torch.from_numpy(rng.normal(size=(8, 4))).float() + torch.randn(8, 4)
            return {"loss": (model(x) - x[:, :2]).square().mean()}

        fit(
            "toy", model, step, steps=30, peak=0.1, work=work, warmup=3, ema_decay=0.9,
            save_every=5, say=lambda line: None,
        )  # fmt: skip
        return model

    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "broken", stop=17)
    assert sorted(p.name for p in (tmp_path / "broken").iterdir()) == ["toy.pt"]
    resumed = run(tmp_path / "broken")
    for ours, theirs in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert seconds_spent("toy", tmp_path / "broken") >= 0


def test_the_corpus_is_kept_and_read_again(tmp_path: Path) -> None:
    cache = tmp_path / "scenes.npz"
    made = corpus.build("foundation", 12, cache)
    read = corpus.build("foundation", 12, cache)
    assert np.array_equal(made.images, read.images)
    ids = made.class_map(np.arange(12))
    for scene, labels, regions in zip(made.scenes, ids, made.regions, strict=True):
        for place, spec in enumerate(scene.subjects):
            assert (labels[regions == place + 1] == world.CLASSES.index(spec.cls)).all()


def test_every_part_of_a_subject_weighs_the_same_however_small() -> None:
    made = corpus.build("foundation", 40)
    extra = unet.weights_by_part(made, 8) - 1
    by_size = unet.weights_by_size(made, 8) - 1
    parts = torch.tensor([2 * len(scene.subjects) for scene in made.scenes])
    capped = extra.amax(dim=(1, 2, 3)) == unet.LARGEST_WEIGHT - 1
    assert 0 < capped.sum() < len(made)
    even = extra.mean(dim=(1, 2, 3)) / parts
    assert torch.allclose(even[~capped], torch.tensor(unet.PART_WEIGHT), atol=1e-4)
    assert (even[capped] < unet.PART_WEIGHT).all()
    assert torch.equal(extra > 0, by_size > 0)  # the ground weighs one in both


def test_a_longer_first_training_of_the_unet_makes_the_second_anew(tmp_path: Path) -> None:
    shipped = Path(world.__file__).parent / "weights"
    autoencoder = AutoencoderKL.from_pretrained(shipped / "sd" / "vae").float().eval()
    text_encoder = CLIPTextModel.from_pretrained(shipped / "sd" / "text_encoder").float().eval()
    known = (corpus.build("foundation", 40), autoencoder, text_encoder, text.build_tokenizer())
    trained: list[list[str]] = []
    for steps in ((2, 2), (2, 2), (3, 2)):
        said: list[str] = []
        unet.train(*known, tmp_path, steps, torch.device("cpu"), said.append)
        trained.append([line.split(":")[0] for line in said if " steps/s" in line])
    assert trained == [["unet", "unet_parts"], [], ["unet", "unet_parts"]]


def test_a_change_of_basis_leaves_every_decoded_pixel() -> None:
    torch.manual_seed(0)
    autoencoder = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=3,
        norm_num_groups=4,
        sample_size=16,
    ).eval()
    images = torch.rand(32, 3, 16, 16) * 2 - 1

    def decoded() -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            posterior = autoencoder.encode(images).latent_dist
            return autoencoder.decode(posterior.mean).sample, posterior.std

    before, _ = decoded()
    uneven = torch.linalg.eigvalsh(vae.sensitivity(autoencoder, images))
    vae.in_pixel_metric(autoencoder, images, power=0.5)
    after, deviation = decoded()
    assert torch.allclose(after, before, atol=1e-3)
    scaling = autoencoder.config.scaling_factor
    assert torch.allclose(deviation * scaling, torch.tensor(vae.POSTERIOR_STD))
    with torch.no_grad():
        latents = autoencoder.encode(images).latent_dist.mean * scaling
    assert float(latents.std()) == pytest.approx(1.0, abs=1e-3)
    assert latents.mean(dim=(0, 2, 3)).abs().max() < 1e-3
    even = torch.linalg.eigvalsh(vae.sensitivity(autoencoder, images))
    assert even.max() / even.min() < 0.1 * uneven.max() / uneven.min()


@pytest.mark.timeout(1000)
def test_the_command_trains_every_model_and_does_nothing_twice(tmp_path: Path) -> None:
    names = ("vae", "clip-text", "clip-vision", "judge", "unet", "unet-parts", "blip2", "dino")
    size = ["--scenes", "80", "--held-out", "8", "--threads", "1", "--device", "cpu"]
    where = ["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    steps = [part for name in names for part in (f"--{name}-steps", "2")]
    command = [sys.executable, "-m", "pipeline.miniworld.foundation", *size, *where, *steps]
    first = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert first.returncode == 0, first.stderr[-2000:]
    out = tmp_path / "out"
    notes = json.loads((out / "foundation.json").read_text())
    assert set(notes["models"]) == {"vae", "clip", "judge", "unet", "blip2", "dino"}
    assert set(notes["sha256"]) == {str(p.relative_to(out)) for p in out.rglob("*.safetensors")}
    assert len(CLIPTokenizer.from_pretrained(out / "clip")) == len(text.build_tokenizer())
    CLIPModel.from_pretrained(out / "clip")
    Blip2ForConditionalGeneration.from_pretrained(out / "blip2")
    load_dino(str(out / "dino"))
    before = (out / "foundation.json").stat().st_mtime_ns
    again = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0
    assert again.stdout.count("is there") == 6
    assert (out / "foundation.json").stat().st_mtime_ns == before
