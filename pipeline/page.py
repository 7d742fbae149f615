"""What a page is made of: parts that may be absent, pictures inside it, text that does no harm."""

from __future__ import annotations

import base64
import io
import unicodedata
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import pyarrow as pa
from PIL import Image

from pipeline.config.shared import MAX_PIXELS
from pipeline.errors import UserError
from pipeline.storage import Storage

MOST_BYTES = 8_000_000
"""Of a picture that is put into a page as it is."""
_PART_FAULTS = (
    UserError,
    OSError,
    ValueError,
    KeyError,
    IndexError,
    TypeError,
    AttributeError,
    ArithmeticError,
    RecursionError,
    pa.ArrowException,
    Image.DecompressionBombError,
)
_MEDIA = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpeg", b"RIFF": "webp"}
_FORMATS = [kind.upper() for kind in _MEDIA.values()]
_HUGE = 1e300
_JOINERS = "\u200c\u200d"  # Persian and emoji are written with them


@contextmanager
def whatever_is_there() -> Iterator[None]:
    """Parts that are absent or broken are left out: a report must never fail a finished job."""
    with suppress(*_PART_FAULTS):
        yield


def read_json(storage: Storage, path: str) -> dict[str, Any]:
    """A JSON object; {} where there is none."""
    with whatever_is_there():
        if storage.exists(path):
            found = storage.read_json(path)
            return found if isinstance(found, dict) else {}
    return {}


def paths(storage: Storage, prefix: str) -> list[str]:
    """Files under a folder; [] where it is absent."""
    with whatever_is_there():
        return storage.list(prefix)
    return []


def embedded(data: bytes) -> str:
    """A data: URL; raises ValueError for bytes that are no picture a browser shows."""
    kind = next((name for magic, name in _MEDIA.items() if data.startswith(magic)), None)
    if kind is None:
        raise ValueError("not a png, jpg or webp")
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def picture(storage: Storage, path: str, most_bytes: int = MOST_BYTES) -> str | None:
    """A picture as it lies there, as a data: URL; None where there is none, or a larger one."""
    with whatever_is_there():
        if storage.exists(path) and storage.size(path) <= most_bytes:
            return embedded(storage.read_bytes(path))
    return None


def size(data: bytes) -> tuple[int, int]:
    """Width and height of a picture, pixels."""
    with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
        return image.size


def thumbnail(data: bytes, side: int = 256, most_bytes: int = 24_000) -> str:
    """A data: URL of a picture at most `side` pixels wide and high; small ones stay as they are."""
    if len(data) <= most_bytes:
        return embedded(data)
    with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width}x{image.height} pixels")
        image.draft("RGB", (side, side))
        small = image.convert("RGB")
        small.thumbnail((side, side))
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=80)
    return embedded(buffer.getvalue())


def flat(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested settings by their dotted names."""
    found: list[tuple[str, Any]] = []
    for key, value in settings.items():
        nested = isinstance(value, Mapping)
        found += flat(value, f"{prefix}{key}.") if nested else [(f"{prefix}{key}", value)]
    return found


def is_number(value: Any) -> bool:
    """Whether it is a number, and one that a float holds: JSON has others."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and abs(value) < _HUGE  # no NaN is


def visible(text: Any, most: int = 160) -> str:
    """Foreign text as one may look at it: what is invisible or turns text around is spelled out
    (`‹U+202E›`), and what is long is cut. Escaping for HTML is the template's.
    """
    whole = str(text)
    shown = "".join(
        f"‹U+{ord(letter):04X}›" if _hidden(letter) else letter for letter in whole[:most]
    )
    return shown if len(whole) <= most else f"{shown}… ({len(whole):,} characters)"


def _hidden(letter: str) -> bool:
    kind = unicodedata.category(letter)
    return kind in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp") and letter not in _JOINERS
