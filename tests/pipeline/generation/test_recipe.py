"""A recipe survives its picture; what anybody may have written into a PNG is checked."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from pipeline.errors import UserError
from pipeline.generation import png
from pipeline.generation.recipe import Recipe, Reference, read_region, rebuild


def noise(seed: int, *size: int) -> Image.Image:
    shape = (*reversed(size), 3)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, shape, dtype=np.uint8))


def full() -> Recipe:
    mask = Image.new("L", (30, 20))
    mask.paste(255, (5, 5, 12, 12))
    return Recipe(
        prompt="a cup and a fish “on” snow",
        subjects=(
            Reference(noise(0, 24, 24), query="a cup", name="cup", scale=0.5),
            Reference(noise(1, 30, 20), mask=mask, name="fish", region=(0.5, 0.0, 1.0, 1.0)),
        ),
        negative_prompt="blue",
        seed=7,
        steps=3,
        guidance=4.0,
        guidance_rescale=0.25,
        size=(32, 48),
        control=noise(2, 40, 40),
        control_scale=0.75,
    )


def test_a_recipe_comes_out_of_its_picture() -> None:
    recipe = full()
    data = png.encode(noise(3, 32, 48), {"recipe": recipe.describe()}, sources=recipe.pictures())
    said = png.made_by(data)
    assert said is not None
    again = rebuild(said["recipe"], png.sources(data))
    assert again.describe() == recipe.describe() and again.alike == recipe.alike
    for one, other in zip(recipe.subjects, again.subjects, strict=True):
        assert (np.asarray(one.image) == np.asarray(other.image)).all()
        assert (one.mask is None) == (other.mask is None)
        assert one.subject().scale == other.subject().scale
    assert np.asarray(again.subjects[1].mask).sum() == 255 * 49, "and what is under the mask"
    with Image.open(io.BytesIO(data)) as picture:  # any program still reads it
        picture.verify()


def test_a_region_covers_its_part_of_the_picture() -> None:
    region = Reference(noise(0, 8, 8), query="a", region=(0.5, 0.25, 1.0, 1.0)).subject().region
    cells = np.asarray(region)
    assert cells.mean() == 0.5 * 0.75 and cells[64:, 128:].all()
    assert read_region("") is None and read_region("0,0, 0.5,1") == (0.0, 0.0, 0.5, 1.0)


def test_what_shapes_the_denoising_is_what_batches_are_alike_in() -> None:
    from dataclasses import replace

    recipe = full()
    same = (recipe.without_subjects(), {"seed": 8, "prompt": "x", "negative_prompt": ""})
    assert replace(recipe, **same[1]).alike == recipe.alike
    for other in ({"steps": 4}, {"guidance": 1.0}, {"size": None}, {"control": None}):
        assert replace(recipe, **other).alike != recipe.alike
    assert same[0].alike != recipe.alike and not same[0].subjects


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"steps": 0}, "steps"),
        ({"steps": "3"}, "broken"),
        ({"seed": -1}, "seed"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": None}, "broken"),
        ({"guidance": "inf"}, "guidance"),
        ({"subjects": []}, "broken"),
        ({"control": None}, "broken"),
        ({"size": [0, 0]}, "size"),
        ({"size": [32, 2**40]}, "size: .* at most 4096 a side"),
        ({"size": [1]}, "broken"),
        ({"control": "0" * 64}, "control image is not the one"),
    ],
)
def test_a_recipe_of_unknown_origin_is_checked(change: dict[str, object], reason: str) -> None:
    recipe = full()
    with pytest.raises(UserError, match=reason) as caught:
        rebuild({**recipe.describe(), **change}, recipe.pictures())
    assert "\n" not in str(caught.value)


def test_a_reference_of_unknown_origin_is_checked() -> None:
    recipe = full()
    said = json.loads(json.dumps(recipe.describe()))
    first, second, control = recipe.pictures()
    with pytest.raises(UserError, match="not the one it was drawn from"):
        rebuild(said, [png.encode(noise(9, 24, 24)), second, control])
    with pytest.raises(UserError, match="broken"):
        rebuild(said, [first[:40], second, control])
    with pytest.raises(UserError, match=r"broken.*2000x600 pixels are too many"):
        rebuild(said, [png.encode(Image.new("RGB", (2000, 600))), second, control])
    said["subjects"][1]["region"] = [0.5, 0, 0.5, 1]
    with pytest.raises(UserError, match="region"):
        rebuild(said, [first, second, control])
    assert png.sources(b"") == png.sources(b"\x89PNG\r\n\x1a\n\xff") == []


@pytest.mark.parametrize("text", ["1,2", "a,b,c,d", "0,0,2,1", "0.5,0,0.5,1"])
def test_a_bad_region_is_one_line(text: str) -> None:
    with pytest.raises(UserError, match="region"):
        read_region(text)
