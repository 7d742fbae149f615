"""Headers before pixels; everything that passes decodes to 8-bit colour, upright."""

from __future__ import annotations

import io
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from pipeline.config import DownloadConfig
from pipeline.curation.fetch import FetchError
from pipeline.curation.vetting import undecodable, vet
from pipeline.miniworld.serving import huge_png

CFG = DownloadConfig(min_image_size=16, max_pixels=1_000_000)


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def two_halves() -> Image.Image:
    """Red above, blue below; 40 x 32."""
    pixels = np.zeros((32, 40, 3), np.uint8)
    pixels[:16, :, 0] = 255
    pixels[16:, :, 2] = 255
    return Image.fromarray(pixels)


def decoded(data: bytes) -> np.ndarray:
    """As img2dataset's resizer sees it, in RGB."""
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    assert image.dtype == np.uint8
    assert image.ndim == 3
    return np.ascontiguousarray(image[:, :, 2::-1])


def cause(body: bytes) -> str:
    with pytest.raises(FetchError) as caught:
        vet(body, CFG)
    return caught.value.cause


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_ordinary_images_pass_untouched(form: str) -> None:
    body = encoded(two_halves(), form)
    assert vet(body, CFG) is body


@pytest.mark.parametrize("form", ["GIF", "BMP"])
def test_other_formats_are_turned_into_colour(form: str) -> None:
    pixels = decoded(vet(encoded(two_halves(), form), CFG))
    assert np.array_equal(pixels, np.asarray(two_halves()))


@pytest.mark.parametrize(
    ("orientation", "turn"),
    [
        (2, Image.Transpose.FLIP_LEFT_RIGHT),
        (3, Image.Transpose.ROTATE_180),
        (6, Image.Transpose.ROTATE_90),
        (8, Image.Transpose.ROTATE_270),
    ],
)
def test_exif_orientation_is_applied(orientation: int, turn: Image.Transpose) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    for form in ("JPEG", "PNG", "WEBP"):
        body = encoded(two_halves().transpose(turn), form, exif=exif)
        pixels = decoded(vet(body, CFG)).astype(int)
        assert np.abs(pixels - np.asarray(two_halves())).mean() < 8


def test_broken_exif_costs_nothing() -> None:
    body = encoded(two_halves(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\xff\xffgarbage")
    assert vet(body, CFG) is body


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1", "CMYK", "I;16"])
def test_every_mode_becomes_three_channels(mode: str) -> None:
    if mode == "I;16":
        gray = np.asarray(two_halves().convert("L")).astype(np.uint16) * 257
        image, form = Image.fromarray(gray), "PNG"
    else:
        image = two_halves().convert(mode)
        form = "JPEG" if mode == "CMYK" else "PNG"
    pixels = decoded(vet(encoded(image, form), CFG)).astype(int)
    expected = np.asarray(
        image.convert("RGB") if mode != "I;16" else two_halves().convert("L").convert("RGB")
    )
    assert np.abs(pixels - expected).mean() < 8


def test_transparency_lies_on_white() -> None:
    image = two_halves().convert("P")
    body = encoded(image, "PNG", transparency=image.getpixel((0, 0)))
    assert (decoded(vet(body, CFG))[:16] == 255).all()


def test_too_many_pixels_are_never_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(self: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", load)
    assert cause(huge_png(30_000)) == "too_many_pixels"


def test_small_ones_and_what_is_no_image() -> None:
    assert cause(encoded(two_halves().resize((40, 8)), "PNG")) == "too_small"
    for body in (
        b"<html></html>",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"\xff\xd8\xff",
        b"%PDF",
    ):
        assert cause(body) == "not_an_image"


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF"])
def test_truncated_is_told_from_undecodable(form: str) -> None:
    body = encoded(two_halves(), form)
    assert undecodable(body[: len(body) * 2 // 3]) == "truncated"
    assert undecodable(body) == "undecodable"
