"""Foreign text and pictures as a page may show them."""

import base64
import io

import pytest
from PIL import Image

from pipeline import page


def test_what_turns_text_around_is_spelled_out() -> None:
    assert page.visible("a \u202egpj.exe") == "a ‹U+202E›gpj.exe"
    assert page.visible("zero\u200bwidth\x07\n") == "zero‹U+200B›width‹U+0007›‹U+000A›"
    assert page.visible("half \ud800 a pair").encode() == "half ‹U+D800› a pair".encode()


def test_text_of_all_languages_stays_as_it_is() -> None:
    for text in ("قطة جميلة", "می\u200cخواهم", "a 👩\u200d👧 on grass", "Ωμέγα – “x”"):
        assert page.visible(text) == text


def test_long_text_is_cut_and_says_so() -> None:
    shown = page.visible("x" * 10_000, 100)
    assert shown == "x" * 100 + "… (10,000 characters)"


def picture(side: int, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((side, side), 90).convert("RGB").save(buffer, format=kind)
    return buffer.getvalue()


def test_large_pictures_become_small_ones() -> None:
    small = page.thumbnail(picture(1024))
    data = base64.b64decode(small.partition(",")[2])
    assert small.startswith("data:image/jpeg;base64,") and len(data) < 40_000
    assert Image.open(io.BytesIO(data)).size == (256, 256)
    tiny = picture(32)
    assert base64.b64decode(page.thumbnail(tiny).partition(",")[2]) == tiny


def test_what_is_no_picture_is_refused() -> None:
    for data in (b"", b"<svg onload=alert(1)>", b"<html>" * 10_000):
        with pytest.raises((ValueError, OSError)):
            page.thumbnail(data)
