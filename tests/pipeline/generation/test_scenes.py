"""What is drawn is known before any model is loaded: names and recipes."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from pipeline.config import GenerateConfig
from pipeline.generation.recipe import Reference
from pipeline.generation.scenes import HeldOut, Own

CUP = Reference(Image.new("RGB", (8, 8), "red"), query="cup", name="mine", scale=0.5)
CONTROL = Image.new("RGB", (8, 8), "blue")


def own(reference: Reference = CUP, control: Image.Image | None = None, **given: Any) -> Own:
    cfg = GenerateConfig(**{"prompt": "A cup, on snow!", "seed": 4, **given})
    return Own(cfg, [reference], control, 32)


def test_every_held_out_picture_is_a_recipe() -> None:
    scene = HeldOut(GenerateConfig(references=3, seed=5, scale=0.5, negative_prompt="blue"), 32)
    drawn = dict(scene.wanted)
    assert len(drawn) == len(scene.wanted) == 15
    assert [drawn[f"0{i}-text-only"].seed for i in range(3)] == [5, 6, 7]
    assert all(r.negative_prompt == "blue" and r.size is None for r in drawn.values())
    assert drawn["01-text-only"].subjects == ()
    (a,), (b,) = drawn["01-text-query-a"].subjects, drawn["01-text-query-b"].subjects
    assert a.image is b.image and a.query != b.query and a.scale == 0.5
    (masked,) = drawn["01-mask-query-a"].subjects
    assert masked.query is None and masked.mask is not None
    assert masked.mask.size == masked.image.size and np.asarray(masked.mask).max() == 255
    first, other = drawn["01-two-subjects"].subjects
    assert first.query == a.query and other.image is not first.image
    assert other.query and other.query in drawn["01-two-subjects"].prompt


def test_pictures_of_ones_own_have_consecutive_seeds_and_the_same_noise_without_subjects() -> None:
    scene = own(control=CONTROL, pictures=2, width=48)
    (one, first), (floor, without), (two, second), _ = scene.wanted
    assert one.startswith("a-cup-on-snow-seed4-") and floor == f"{one}-text-only"
    assert two == one.replace("seed4", "seed5") and scene.path == f"generate/{one}-grid.png"
    assert (first.seed, without.seed, second.seed) == (4, 4, 5)
    assert without.subjects == () and without.control is CONTROL
    assert first.size == without.size == (48, 32)


def test_what_shapes_a_picture_gives_it_a_name_of_its_own() -> None:
    names = [
        own(**given).names[0]
        for given in (
            {}, {"steps": 9}, {"guidance": 2.0}, {"negative_prompt": "blue"}, {"height": 48},
            {"control": CONTROL}, {"seed": 6}, {"prompt": "A cup on snow"},
            {"reference": Reference(CUP.image, query="mug", name="mine", scale=0.5)},
            {"reference": Reference(CUP.image, query="cup", name="mine", region=(0, 0, 1, 0.5))},
        )
    ]  # fmt: skip
    assert len(set(names)) == len(names)
    assert own().names == own(pictures=3).names[:1] == own(batch=2, device="cpu").names
