"""PNG bytes that carry how the picture was made."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

_KEY = "ssr"
"""Name of the text chunk that holds the settings as JSON."""


def encode(
    image: Image.Image, made_by: Mapping[str, Any] | None = None, quick: bool = False
) -> bytes:
    """The picture as PNG; `made_by` (JSON-able) goes into a text chunk of it.

    quick: in a fraction of the time and about a tenth larger, for pictures by the thousand.
    """
    info = PngInfo()
    if made_by is not None:
        info.add_text(_KEY, json.dumps(made_by, sort_keys=True, default=str))
    buffer = io.BytesIO()
    effort: dict[str, Any] = {"compress_level": 1} if quick else {"optimize": True}
    image.save(buffer, format="PNG", pnginfo=info, **effort)
    return buffer.getvalue()


def made_by(data: bytes) -> dict[str, Any] | None:
    """What `encode` was told, or None for a picture of other origin."""
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            found = json.loads(image.info.get(_KEY, "null"))
    except (OSError, ValueError, SyntaxError):
        return None
    return found if isinstance(found, dict) else None
