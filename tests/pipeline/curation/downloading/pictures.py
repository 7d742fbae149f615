"""Pictures as the web sends them."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image


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
