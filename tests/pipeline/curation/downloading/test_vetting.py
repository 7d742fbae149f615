"""Headers before pixels: what an image says of itself, and what is refused for it."""

from __future__ import annotations

import pytest
from PIL import Image, PngImagePlugin

from pipeline.config import DownloadConfig
from pipeline.curation.downloading.vetting import Header, undecodable, vet
from pipeline.curation.fetching.fetch import FetchError
from pipeline.miniworld.serving import huge_png
from tests.hostile import scan_bomb
from tests.pipeline.curation.downloading.pictures import encoded, two_halves

CFG = DownloadConfig(min_image_size=16, max_pixels=1_000_000)


def cause(body: bytes) -> str:
    with pytest.raises(FetchError) as caught:
        vet(body, CFG)
    return caught.value.cause


@pytest.mark.parametrize(("form", "jpeg"), [("JPEG", True), ("PNG", False), ("WEBP", False)])
def test_ordinary_images_need_nothing(form: str, jpeg: bool) -> None:
    assert vet(encoded(two_halves(), form), CFG) == Header(40, 32, 1, jpeg, plain=True)


@pytest.mark.parametrize("orientation", [6, 8])
def test_a_turned_camera_swaps_the_sides(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    for form in ("JPEG", "PNG", "WEBP"):
        header = vet(encoded(two_halves(), form, exif=exif), CFG)
        assert (header.width, header.height, header.plain) == (32, 40, False)


def test_broken_exif_costs_nothing() -> None:
    body = encoded(two_halves(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\xff\xffgarbage")
    assert vet(body, CFG).plain


def test_an_orientation_that_does_not_exist_is_none() -> None:
    exif = Image.Exif()
    exif[0x0112] = 9
    assert vet(encoded(two_halves(), "JPEG", exif=exif), CFG).orientation == 1


def test_large_transparent_images_are_kept_from_float_arithmetic() -> None:
    side = 2100
    body = encoded(Image.new("RGBA", (side, side)), "PNG", compress_level=1)
    assert not vet(body, DownloadConfig(max_pixels=side * side)).plain
    assert vet(encoded(Image.new("RGBA", (40, 40)), "PNG"), CFG).plain


def test_too_many_pixels_are_never_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(self: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", load)
    assert cause(huge_png(30_000)) == "too_many_pixels"


def test_many_scans_are_never_decoded() -> None:
    assert cause(scan_bomb(64, 200)) == "too_many_scans"
    # nor are they hidden by what libjpeg passes over: fill bytes, markers without a length
    first, *scans = scan_bomb(64, 200).split(b"\xff\xda")
    hidden = b"\xff\xff\xd0\xff\x01\xff\xff\xda".join([first + b"\xff\xda" + scans[0], *scans[1:]])
    assert cause(hidden) == "too_many_scans"
    assert vet(scan_bomb(64, 50), CFG).jpeg
    assert vet(encoded(two_halves(), "JPEG", progressive=True), CFG).jpeg


def test_a_scans_marker_by_chance_is_none() -> None:
    body = encoded(two_halves(), "JPEG", exif=b"Exif\0\0" + b"\xff\xda" * 500)
    assert vet(body, CFG).plain
    assert vet(encoded(two_halves(), "JPEG") + b"\xff\xda" * 500, CFG).plain  # a film behind it


def test_small_ones_and_what_is_no_image() -> None:
    assert cause(encoded(two_halves().resize((40, 8)), "PNG")) == "too_small"
    default = DownloadConfig(image_size=33)  # smaller than what is stored: refused by default
    with pytest.raises(FetchError, match="too_small"):
        vet(encoded(two_halves(), "PNG"), default)
    assert vet(encoded(two_halves(), "PNG"), DownloadConfig(image_size=33, min_image_size=32))
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
