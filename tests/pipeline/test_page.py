"""Foreign text and pictures as a page may show them."""

import base64
import io
from pathlib import Path

import pytest
from PIL import Image

from pipeline import page
from pipeline.storage import Storage


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


def test_what_a_browser_does_not_show_is_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a shard that a stranger wrote: Pillow would hand an EPS to Ghostscript."""
    for form in ("EPS", "TIFF", "BMP"):
        data = io.BytesIO()
        Image.new("RGB", (300, 300)).save(data, format=form)
        for look in (page.size, lambda found: page.thumbnail(found, most_bytes=0)):
            with pytest.raises(OSError, match="cannot identify"):
                look(data.getvalue())
    monkeypatch.setattr(page, "MAX_PIXELS", 8 * 8 - 1)
    with pytest.raises(ValueError, match="8x8 pixels"):
        page.thumbnail(picture(8), most_bytes=0)


def test_numbers_are_those_that_a_float_holds() -> None:
    assert all(page.is_number(value) for value in (0, -1.5, 10**20, True + 0))
    for value in (float("nan"), float("inf"), -float("inf"), 10**400, True, None, "1", [1]):
        assert not page.is_number(value)


def test_a_picture_is_embedded_whole_or_not_at_all(tmp_path: Path) -> None:
    storage, data = Storage(tmp_path), picture(8)
    storage.write_bytes("a.png", data)
    storage.write_bytes("b.png", b"<svg/>")
    assert page.picture(storage, "a.png") == page.embedded(data)
    assert page.picture(storage, "a.png", len(data)) is not None
    for path, most in (("a.png", len(data) - 1), ("b.png", 100), ("none.png", 100)):
        assert page.picture(storage, path, most) is None
