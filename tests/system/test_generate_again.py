"""Pictures of jobs/generate.py made again from themselves alone, ControlNets among them, on tiny
random models; and what is no picture of ours.
"""

from __future__ import annotations

import copy
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from pipeline.config import ModelsConfig
from pipeline.errors import UserError
from pipeline.generation import png
from tests.system.generating import (
    config,
    draw,
    pixels,
    recipe,
    write_encoder,
    write_photos,
)
from tests.untrained import save_controlnet, tiny_parts

pytestmark = [pytest.mark.system, pytest.mark.timeout(900)]
PROMPT = "a cup and a fish on snow"


@pytest.fixture(scope="module")
def parts(tiny_models: Path) -> ModelsConfig:
    return tiny_parts(tiny_models)


@pytest.fixture(scope="module")
def controlnet(parts: ModelsConfig, tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_controlnet(tmp_path_factory.mktemp("nets") / "edges", parts)


@pytest.fixture(scope="module")
def root(parts: ModelsConfig, controlnet: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with pictures of held-out references, and of the user's own: two subjects with a mask,
    scales, regions, another size and a negative prompt; the same with a ControlNet.
    """
    folder = tmp_path_factory.mktemp("run")
    root = write_encoder(folder, parts)
    draw(config(root, parts, batch=1))
    photo, mask = write_photos(folder)
    own = config(
        root, parts, image=[photo, photo], query=["a cup", ""], mask=["", mask],
        scales=[0.5, 1.5], region=["0,0,0.5,1", "0.5,0,1,1"], negative_prompt="blue",
        prompt=PROMPT, width=40, pictures=2, seed=3, batch=1,
    )  # fmt: skip
    draw(own)
    draw(replace(own, control=photo, controlnet=controlnet, control_scale=0.75, seed=8))
    return root


def single(root: Path, pattern: str) -> Path:
    (found,) = (p for p in root.glob(f"generate/{pattern}.png") if "again" not in p.name)
    return found


@pytest.mark.parametrize(
    "pattern",
    [
        "00-text-only", "00-text-query-b", "01-mask-query-a", "01-two-subjects",
        "a-cup-*-seed4-??????", "a-cup-*-seed8-??????", "a-cup-*-seed8-*-text-only",
    ],
)  # fmt: skip
def test_a_picture_is_made_again(
    pattern: str,
    root: Path,
    parts: ModelsConfig,
    controlnet: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """From the PNG alone: at another root, with nothing there but the encoder."""
    path = single(root, pattern)
    needed = controlnet if recipe(path)["control"] else None
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model").symlink_to(root / "model")
    cfg = config(tmp_path / "run", parts, from_=str(path), controlnet=needed, steps=9)
    made = draw(cfg)
    assert made.pictures == 1 and Image.open(tmp_path / "run" / made.grid).width > 500
    again = tmp_path / "run" / "generate" / f"{path.stem}-again.png"
    assert recipe(again) == recipe(path)
    assert png.sources(again.read_bytes()) == png.sources(path.read_bytes())
    assert (pixels(again) == pixels(path)).all()
    assert "the same, pixel for pixel" in capsys.readouterr().out


def test_a_control_image_is_followed(root: Path) -> None:
    plain, with_net = (single(root, f"a-cup-*-seed{n}-??????") for n in (4, 9))
    assert recipe(with_net)["control_scale"] == 0.75 and recipe(plain)["control"] is None
    said = png.made_by(with_net.read_bytes())
    assert said and said["controlnet"]["name"] == "edges"
    assert len(png.sources(with_net.read_bytes())) == 3, "two references and the control image"
    floor = single(root, "a-cup-*-seed8-*-text-only")
    assert (pixels(floor) != pixels(single(root, "a-cup-*-seed3-*-text-only"))).any()


def test_a_picture_that_is_no_longer_drawn_so(
    root: Path, parts: ModelsConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its pixels were changed, its recipe was not: what is said is how far apart they are."""
    path = single(root, "00-text-only")
    picture = Image.open(path).convert("RGB")
    red, green, blue = picture.getpixel((0, 0))  # type: ignore[misc]
    picture.putpixel((0, 0), ((red + 100) % 256, green, blue))
    changed = tmp_path / "changed.png"
    changed.write_bytes(png.encode(picture, png.made_by(path.read_bytes())))
    draw(config(root, parts, from_=str(changed)))
    assert re.search(r"not the same: pixels differ by (100|156) of 255", capsys.readouterr().out)
    larger = picture.resize((64, 64))
    changed.write_bytes(png.encode(larger, png.made_by(path.read_bytes())))
    with pytest.raises(UserError, match="64x64, and was drawn 32x32: it was edited"):
        draw(config(root, parts, from_=str(changed)))


def test_other_models_are_named(
    root: Path, parts: ModelsConfig, controlnet: str, tmp_path: Path
) -> None:
    path = single(root, "a-cup-*-seed8-??????")
    ask = {"from_": str(path), "controlnet": controlnet}
    other = write_encoder(tmp_path / "other", parts) / "model"
    (other / "config.json").write_text((other / "config.json").read_text() + " ")
    base = shutil.copytree(parts.base, tmp_path / "my-sd")
    (base / "unet" / "config.json").write_text(
        (base / "unet" / "config.json").read_text().replace("}", " }")
    )
    net = save_controlnet(tmp_path / "depth", parts)
    (tmp_path / "depth" / "config.json").write_text(
        (tmp_path / "depth" / "config.json").read_text() + " "
    )
    for settings, said in (
        ({"model": str(other)}, r"SSR-Encoder \(sha256 \w{12}\), not by \(.*give --model: "),
        ({"models": replace(parts, base=str(base))}, r"base model sd \(.*my-sd \(.*--models.base"),
        ({"models": replace(parts, vision="miniworld:clip")}, r"CLIP clip .*by miniworld:clip"),
        ({"controlnet": net}, r"ControlNet edges .*not by depth .*give --controlnet"),
        ({"controlnet": None}, r"drawn with the ControlNet edges \(.*--controlnet"),
    ):
        cfg = replace(config(root, parts, **ask), **settings)  # type: ignore[arg-type]
        with pytest.raises(UserError, match=said) as caught:
            draw(cfg)
        assert "\n" not in str(caught.value)
    # the same weights under another name are the same
    moved = shutil.copytree(parts.base, tmp_path / "moved")
    draw(replace(config(root, parts, **ask), models=replace(parts, base=str(moved))))


def test_settings_beside_a_picture_are_refused(root: Path, parts: ModelsConfig) -> None:
    path = str(single(root, "00-text-only"))
    beside = {"image": [path], "prompt": "a cup", "seed": 3, "pictures": 2}
    with pytest.raises(UserError, match="leave out --image, --prompt, --pictures, --seed"):
        draw(config(root, parts, from_=path, **beside))


def test_what_is_no_picture_of_ours(root: Path, parts: ModelsConfig, tmp_path: Path) -> None:
    whole = single(root, "01-two-subjects").read_bytes()
    said = png.made_by(whole)
    assert said is not None
    picture, sources = png.picture(whole), png.sources(whole)
    deep = PngInfo()
    deep.add_text("ssr", "[" * 100_000)
    picture.save(tmp_path / "deep.png", pnginfo=deep)
    Image.new("RGB", (32, 32)).save(tmp_path / "plain.png")
    Image.new("RGB", (32, 32)).save(tmp_path / "photo.jpg")
    (tmp_path / "cut.png").write_bytes(whole[:-200])

    def write(name: str, change: dict[str, Any], given: list[bytes] = sources) -> None:
        lie = copy.deepcopy(said)
        assert lie is not None
        lie["recipe"].update(change)
        (tmp_path / f"{name}.png").write_bytes(png.encode(picture, lie, sources=given))

    subject = said["recipe"]["subjects"][0]
    write("exchanged", {}, sources[::-1])
    write("stripped", {}, [])
    write("crowd", {"subjects": [subject] * 17}, sources[:1] * 17)
    write("large", {"size": [65536, 65536]})
    write("other", {"size": [64, 64]})
    write("number", {"guidance": 10**400})
    write("long", {"prompt": "a cup " * 10_000})
    for name, reason in {
        "no.png": "no such picture",
        "photo.jpg": "does not say how it was made",
        "plain.png": "does not say how it was made",
        "deep.png": "does not say how it was made",
        "cut.png": "broken|not a readable",
        "exchanged.png": "not the one it was drawn from",
        "stripped.png": "2 subjects, 0 pictures",
        "crowd.png": "17 subjects",
        "large.png": "at most 4096 a side",
        "other.png": "is 32x32, and was drawn 64x64",
        "number.png": "OverflowError",
        "long.png": "characters",
    }.items():
        with pytest.raises(UserError, match=reason) as caught:
            draw(config(root, parts, from_=str(tmp_path / name)))
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    for grid, one in ((root / "grid.png", "00-text-only.png"), (single(root, "*seed3*grid"), "a-")):
        with pytest.raises(UserError, match=f"it is a grid of .*such as {one}"):
            draw(config(root, parts, from_=str(grid)))
