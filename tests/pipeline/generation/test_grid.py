import io

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from pipeline.generation import grid, png


def checkers(side: int = 4) -> Image.Image:
    pixels = np.indices((side, side)).sum(0) % 2 * 255
    return Image.fromarray(pixels.astype(np.uint8)).convert("RGB")


def test_small_pictures_are_enlarged_crisply() -> None:
    big = grid.enlarge(checkers(), 18)
    assert big.size == (16, 16), "a whole factor"
    pixels = np.asarray(big)
    assert set(np.unique(pixels)) == {0, 255}, "no pixel between the two colours"
    assert (pixels[::4, ::4] == np.asarray(checkers())).all()


def test_large_pictures_keep_their_shape() -> None:
    assert grid.enlarge(Image.new("RGB", (400, 100)), 80).size == (80, 20)


def test_grid_places_every_picture_under_its_title() -> None:
    red, blue = Image.new("RGB", (32, 32), "red"), Image.new("RGB", (32, 32), "blue")
    rows = [
        [grid.Cell(red, "one", "a"), grid.Cell(blue, "two")],
        [grid.Cell(), grid.Cell(red, "a caption so long that it takes several lines, or more")],
    ]
    sheet = grid.draw(["First", "Second"], rows, "Heading", "note", side=64)
    pixels = np.asarray(sheet)
    is_red, is_blue = (pixels == (255, 0, 0)).all(-1), (pixels == (0, 0, 255)).all(-1)
    assert is_red.sum() == 2 * 64 * 64 and is_blue.sum() == 64 * 64
    half = sheet.width // 2
    assert is_red[:, :half].sum() == 64 * 64 and is_blue[:, :half].sum() == 0
    assert np.argwhere(is_red[:, half:])[:, 0].min() > np.argwhere(is_blue)[:, 0].max()


def test_grid_refuses_ragged_rows() -> None:
    with pytest.raises(ValueError, match="row 0 has 1 cells for 2 titles"):
        grid.draw(["a", "b"], [[grid.Cell()]])


def test_png_says_how_it_was_made() -> None:
    data = png.encode(checkers(), {"prompt": "a cup on snow", "seed": 3})
    assert png.made_by(data) == {"prompt": "a cup on snow", "seed": 3}
    assert png.made_by(png.encode(checkers())) is None
    assert png.made_by(b"no picture") is None
    quick = png.encode(checkers(), {"seed": 3}, quick=True)
    assert png.made_by(quick) == {"seed": 3}
    assert np.array_equal(Image.open(io.BytesIO(quick)), checkers())


def test_what_others_wrote_into_a_png_does_no_harm() -> None:
    for text in ("[" * 100_000, "{", "3", '"text"'):
        info = PngInfo()
        info.add_text("ssr", text)
        buffer = io.BytesIO()
        checkers().save(buffer, format="PNG", pnginfo=info)
        assert png.made_by(buffer.getvalue()) is None
