"""From the page's values to a recipe: cards, regions, limits, and every refusal."""

from __future__ import annotations

import base64
import io
import json
import socket
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.config.serve import LimitsConfig, ServeConfig
from pipeline.errors import UserError
from pipeline.serving.page_card import Card, opened, read_card, shown, uploaded
from pipeline.serving.page_examples import examples, gallery
from pipeline.serving.page_form import FOUR_NUMBERS, PER_SUBJECT, Form, region

LIMITS = LimitsConfig()
HALF = Image.fromarray(np.repeat([[0, 255]], [2, 2], axis=1).repeat(6, axis=0).astype(np.uint8))
"""4 x 6, its right half white."""


def picture(size: tuple[int, int] = (4, 6), mode: str = "RGB") -> Image.Image:
    width, height = size
    ramp = np.arange(width * height * 3, dtype=np.uint32).reshape(height, width, 3) % 256
    return Image.fromarray(ramp.astype(np.uint8)).convert(mode)


def url(image: Image.Image, kind: str) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format=kind)
    return f"data:image/{kind};base64," + base64.b64encode(buffer.getvalue()).decode()


def card(**changes: str) -> str:
    return Card(**{"name": "cup", "image": shown(picture()), "query": "cup", **changes}).write()


def form(*subjects: tuple[Any, ...], **changes: Any) -> Form:
    empty = (Card().write(), 1, "everywhere", "")
    said = {"prompt": "a cup", "negative_prompt": "", "seed": 3.0, "steps": 5, "guidance": 7.5,
            "guidance_rescale": 0.7, "width": 0, "height": None, "control": Card().write(),
            "control_scale": 1, **changes}  # fmt: skip
    slots = [*subjects, *[empty] * (4 - len(subjects))]
    return Form.of([value for slot in slots for value in slot] + list(said.values()), 4)


def test_a_whole_form() -> None:
    recipe = form(
        (card(), 0.8, "left half", ""),
        (Card().write(), 1, "everywhere", ""),  # an empty one between is passed over
        (card(query="", mask=shown(HALF)), 1.2, FOUR_NUMBERS, "0.1,0.2,0.3,0.9"),
    ).recipe(ServeConfig())
    word, mask = recipe.subjects
    assert (word.query, word.mask, word.scale, word.region) == ("cup", None, 0.8, (0, 0, 0.5, 1))
    assert word.name == "cup" and word.image.tobytes() == picture().tobytes()
    assert mask.query is None and mask.mask is not None and mask.region == (0.1, 0.2, 0.3, 0.9)
    assert mask.mask.tobytes() == HALF.tobytes()
    assert (recipe.seed, recipe.steps, recipe.guidance_rescale) == (3, 5, 0.7)
    assert type(recipe.seed) is type(recipe.steps) is int
    assert PER_SUBJECT == 4
    assert (recipe.size, recipe.control, recipe.control_scale) == (None, None, 1.0)


def test_another_size_and_a_control_image() -> None:
    given = {"width": 48, "height": 32.0, "control": card(query=""), "control_scale": 0.5}
    recipe = form(**given).recipe(ServeConfig())
    assert recipe.size == (48, 32) and all(type(side) is int for side in recipe.size)
    assert recipe.control is not None and recipe.control.tobytes() == picture().tobytes()
    assert recipe.control_scale == 0.5


@pytest.mark.parametrize(
    "subject, changes, message",
    [
        ((card(), 1, "everywhere", ""), {"prompt": " "}, "prompt: missing"),
        ((card(), 1, "everywhere", ""), {"prompt": "a" * 1001}, "prompt: more than 1000"),
        ((card(), 1, "everywhere", ""), {"negative_prompt": "a" * 1001}, "negative_prompt: more"),
        ((card(), 1, "everywhere", ""), {"seed": None}, "seed: missing"),
        ((card(), 1, "everywhere", ""), {"seed": 0.5}, "seed: missing"),
        ((card(), 1, "everywhere", ""), {"seed": -1}, "seed: -1"),
        ((card(), 1, "everywhere", ""), {"steps": 101}, "steps: 101 is not within 0 to 100"),
        ((card(), 1, "everywhere", ""), {"seed": float("inf")}, "seed: inf"),
        ((card(), 1, "everywhere", ""), {"steps": "5"}, "steps: missing"),
        ((card(), 1, "everywhere", ""), {"guidance": 101}, "guidance: 101"),
        ((card(), 1, "everywhere", ""), {"height": 32}, "size: one side is missing"),
        ((card(), 1, "everywhere", ""), {"width": 1032, "height": 32}, "width: 1032 is not within"),
        ((card(), 1, "everywhere", ""), {"width": 32, "height": 0}, "size: one side"),
        ((card(), 1, "everywhere", ""), {"width": 32, "height": "x"}, "height: missing"),
        ((card(), 1, "everywhere", ""), {"control_scale": 11}, "control_scale: 11"),
        ((card(), 1, "everywhere", ""), {"control": "{"}, "value is broken"),
        ((card(), 1, "everywhere", ""), {"control": card(image="http://a/b.png")}, "not an upload"),
        ((card(), 1, "nowhere", ""), {}, "subject 1: region: not one"),
        ((card(), 11, "everywhere", ""), {}, "subject 1: scale: 11"),
        ((card(), float("nan"), "everywhere", ""), {}, "subject 1: scale: nan"),
        ((card(), 1, FOUR_NUMBERS, ""), {}, "subject 1: region: missing"),
        ((card(), 1, FOUR_NUMBERS, "0,0,2,1"), {}, "subject 1: region: 0, 0, 2, 1 is no part"),
        ((card(query=""), 1, "everywhere", ""), {}, "neither a query nor a mask"),
        ((card(image=""), 1, "everywhere", ""), {}, "subject 1: no picture"),
        ((card(query="a" * 1001), 1, "everywhere", ""), {}, "subject 1: query: more than"),
        ((card(mask=shown(Image.new("L", (4, 6)))), 1, "everywhere", ""), {}, "black all over"),
        ((card(mask=shown(HALF.resize((9, 2)))), 1, "everywhere", ""), {}, "the mask is 9x2"),
        (("{", 1, "everywhere", ""), {}, "value is broken"),
    ],
)  # fmt: skip
def test_what_cannot_be_drawn(subject: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        form(subject, **changes).recipe(ServeConfig())


def test_regions_by_name() -> None:
    assert region("everywhere", "ignored") is None
    assert region("bottom half", "") == (0, 0.5, 1, 1)


def test_an_upload_is_turned_upright_bounded_and_kept_without_loss() -> None:
    exif = Image.Exif()
    exif[274] = 6  # turned by a quarter
    buffer = io.BytesIO()
    picture((30, 20)).save(buffer, format="JPEG", exif=exif)
    data = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
    kept = uploaded("C/my cup.jpg", data, LIMITS)
    assert (kept.name, kept.query, kept.mask) == ("my cup", "", "")
    assert "query" not in json.loads(kept.write_picture())  # it may have been typed meanwhile
    assert kept.picture(LIMITS).size == (20, 30)
    large = uploaded("a.png", url(picture((2000, 100)), "png"), LIMITS).picture(LIMITS)
    assert large.size == (1024, 51)
    again = uploaded("a\x1b[2J", url(picture(), "png"), LIMITS)
    assert again.name == "a[2J"
    assert again.image.startswith("data:image/png")
    assert again.picture(LIMITS).tobytes() == picture().tobytes()
    with pytest.raises(UserError, match="give a jpg, png or webp"):
        uploaded("a", url(picture(), "tiff"), LIMITS)


@pytest.mark.parametrize("said", ["/etc/passwd", "file:///etc/passwd", "data:text/html,x", ""])
def test_a_picture_is_an_upload_and_nothing_else(said: str) -> None:
    with pytest.raises(UserError, match="not an uploaded picture"):
        opened(said, "a.png", LIMITS)


def test_an_address_is_not_followed() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        address = "http://{}:{}/a.png".format(*server.getsockname())
        for said in (address, f"data:{address};base64", f"data:;base64,{address}"):
            with pytest.raises(UserError):
                uploaded("a.png", said, LIMITS)
        with pytest.raises(BlockingIOError):
            server.accept()


def test_uploads_that_are_broken_or_too_large() -> None:
    small = LimitsConfig(upload_mib=1, pixels=23)
    with pytest.raises(UserError, match="the upload is broken"):
        opened("data:image/png;base64,####", "a.png", LIMITS)
    with pytest.raises(UserError, match="not a readable image"):
        opened("data:image/png;base64," + base64.b64encode(b"no picture").decode(), "a", LIMITS)
    with pytest.raises(UserError, match="4x6 pixels, more than 23"):
        opened(shown(picture()), "a.png", small)
    with pytest.raises(UserError, match="more than 1 MiB"):
        opened("data:;base64," + "A" * 2**21, "a.png", small)


@pytest.mark.parametrize("said", ["[]", '{"image": 1}', '{"path": "/etc/passwd"}', "1", 5, ["x"]])
def test_a_card_of_other_shape_is_refused(said: Any) -> None:
    with pytest.raises(UserError, match="value is broken"):
        read_card(said)
    assert read_card(None) == read_card("{}") == Card()


def test_examples_are_held_out_scenes_at_the_models_size() -> None:
    found = examples(32)
    for example in found:
        for chosen in example.subjects:
            asked = chosen.card.reference(LIMITS)
            assert asked.image.size == (32, 32)
            assert bool(asked.query) != (asked.mask is not None)
    assert {len(example.subjects) for example in found} == {1, 2}
    assert any(example.subjects[0].card.mask for example in found)
    assert gallery(32).count("data-example=") == len(found)
    assert json.loads(found[0].subjects[0].card.write())["query"] in found[0].prompt
