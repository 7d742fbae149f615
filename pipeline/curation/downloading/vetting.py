"""A fetched body, judged by its header alone: what it is, and whether it may be decoded at all."""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass

from PIL import Image

from pipeline.config import DownloadConfig
from pipeline.curation.fetching.fetch import FetchError
from pipeline.jpeg_scans import has_many_scans

# Parsers that may touch foreign bytes; what else Pillow knows (EPS, PSD, ...) stays out of reach.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "AVIF")
_ORIENTATION = 0x0112
# img2dataset lays RGBA on white in float64, at 48 bytes a pixel and more; Pillow takes 12.
_MAX_MATTED = 1 << 22


@dataclass(frozen=True)
class Header:
    """What an image says of itself."""

    width: int
    """Pixels, as a viewer sees it: turned by its EXIF orientation."""
    height: int
    """Pixels."""
    orientation: int
    """EXIF orientation, 1 to 8; 1 = upright."""
    jpeg: bool
    """A JPEG of three channels."""
    plain: bool
    """OpenCV decodes it to 8-bit colour as a viewer sees it, up to alpha."""


def vet(body: bytes, cfg: DownloadConfig) -> Header:
    """Read the header; no pixel is decoded. Raises FetchError.

    Causes: not_an_image, too_many_pixels (rule), too_many_scans (rule), too_small (rule).
    """
    # Our own limits follow; Pillow's would warn at one size and raise at another.
    Image.MAX_IMAGE_PIXELS = None
    try:
        image = Image.open(io.BytesIO(body), formats=FORMATS)
        header = _header(image, body)
    except Exception as error:  # parsers of foreign bytes raise what they like
        raise FetchError("not_an_image", f"{type(error).__name__}: {error}"[:200]) from None
    size = f"{header.width}x{header.height}"
    if header.width * header.height > cfg.max_pixels:
        raise FetchError("too_many_pixels", size, rule=True)
    if min(header.width, header.height) < cfg.smallest:
        raise FetchError("too_small", size, rule=True)
    if image.format in ("JPEG", "MPO") and has_many_scans(body):
        raise FetchError("too_many_scans", size, rule=True)
    return header


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


def _header(image: Image.Image, body: bytes) -> Header:
    width, height = image.size
    orientation = _orientation(image)
    if orientation >= 5:
        width, height = height, width
    jpeg = image.format in ("JPEG", "MPO") and image.mode == "RGB"
    return Header(width, height, orientation, jpeg, orientation == 1 and _plain(image, body))


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, from the header alone: Image.getexif decodes a PNG to look for it."""
    exif = Image.Exif()
    try:
        exif.load(image.info.get("exif") or b"")
        found = int(exif.get(_ORIENTATION, 1))
    except Exception:  # broken EXIF in a sound image is common
        return 1
    return found if 1 <= found <= 8 else 1


def _plain(image: Image.Image, body: bytes) -> bool:
    if image.format in ("JPEG", "MPO"):
        return image.mode == "RGB"
    if image.mode == "RGBA" and image.width * image.height > _MAX_MATTED:
        return False
    animated = getattr(image, "is_animated", False)
    if image.format == "PNG":
        # Pillow shows 16-bit colour as RGB too: the header's bit depth tells
        deep = body[24] != 8
        return image.mode in ("RGB", "RGBA") and not (deep or animated or _keyed(image))
    return image.format == "WEBP" and image.mode in ("RGB", "RGBA") and not animated


def _keyed(image: Image.Image) -> bool:
    """Whether one colour of a PNG stands for nothing."""
    return "transparency" in image.info
