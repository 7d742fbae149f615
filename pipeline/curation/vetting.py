"""A fetched body -> bytes that the resizer may decode: checked by its header, upright, 8-bit RGB.

Nothing is decoded before its header has passed, and only what img2dataset's resizer (OpenCV, which
ignores EXIF and keeps gray, 16-bit and palette images as they are) would get wrong is re-encoded.
"""

from __future__ import annotations

import io
import struct

import numpy as np
from PIL import Image, ImageOps

from pipeline.config import DownloadConfig
from pipeline.curation.fetch import FetchError

# Parsers that may touch foreign bytes; what else Pillow knows (EPS, PSD, ...) stays out of reach.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "AVIF")
_ORIENTATION = 0x0112


def vet(body: bytes, cfg: DownloadConfig) -> bytes:
    """Bytes of an image that decodes to 8-bit RGB or RGBA, upright. Raises FetchError.

    Causes: not_an_image, too_many_pixels (rule), too_small (rule), truncated, undecodable.
    """
    # Our own limits follow; Pillow's would warn at one size and raise at another.
    Image.MAX_IMAGE_PIXELS = None
    try:
        image = Image.open(io.BytesIO(body), formats=_FORMATS)
        width, height = image.size
        turned = _orientation(image) not in (0, 1)
    except Exception as error:  # parsers of foreign bytes raise what they like
        raise FetchError("not_an_image", f"{type(error).__name__}: {error}"[:200]) from None
    if width * height > cfg.max_pixels:
        raise FetchError("too_many_pixels", f"{width}x{height}", rule=True)
    if min(width, height) < cfg.min_image_size:
        raise FetchError("too_small", f"{width}x{height}", rule=True)
    if not turned and _plain(image, body):
        return body
    try:
        return _normalised(image)
    except Exception as error:
        cause = undecodable(body)
        raise FetchError(cause, f"{type(error).__name__}: {error}"[:200]) from None


def undecodable(body: bytes) -> str:
    """Why a body that its header calls an image does not decode: truncated or undecodable."""
    tail = body[-64:]
    if body[:2] == b"\xff\xd8":
        whole = b"\xff\xd9" in tail
    elif body[:4] == b"\x89PNG":
        whole = b"IEND" in tail
    elif body[:4] == b"RIFF" and len(body) >= 8:
        whole = len(body) >= struct.unpack("<I", body[4:8])[0] + 8
    elif body[:4] == b"GIF8":
        whole = b"\x3b" in tail
    else:
        whole = True
    return "undecodable" if whole else "truncated"


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, from the header alone: Image.getexif decodes a PNG to look for it."""
    exif = Image.Exif()
    try:
        exif.load(image.info.get("exif") or b"")
        return int(exif.get(_ORIENTATION, 1))
    except Exception:  # broken EXIF in a sound image is common
        return 1


def _plain(image: Image.Image, body: bytes) -> bool:
    """Whether OpenCV decodes it to 8-bit colour as it is."""
    if image.format in ("JPEG", "MPO"):
        return image.mode == "RGB"
    if image.format == "PNG":
        # Pillow shows 16-bit colour as RGB too: the header's bit depth tells
        return image.mode in ("RGB", "RGBA") and body[24] == 8 and "transparency" not in image.info
    return (
        image.format == "WEBP"
        and image.mode in ("RGB", "RGBA")
        and not getattr(image, "is_animated", False)
    )


def _normalised(image: Image.Image) -> bytes:
    image.seek(0)
    if image.mode.startswith("I;16") or image.mode == "I":
        image = Image.fromarray(
            (np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8)
        )
    upright = ImageOps.exif_transpose(image)
    if upright.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in upright.info:
        layered = upright.convert("RGBA")
        ground = Image.new("RGBA", layered.size, (255, 255, 255, 255))
        upright = Image.alpha_composite(ground, layered)
    out = io.BytesIO()
    upright.convert("RGB").save(out, "BMP")
    return out.getvalue()
