"""A vetted body -> pixels: 8-bit colour, upright, one frame; where asked for, only as many as the
stored image needs.

img2dataset's resizer decodes with OpenCV, which ignores EXIF and keeps gray, 16-bit, CMYK and
palette images as they are; and it averages over areas, which costs more than the decoding. What
OpenCV gets right is left to it; the rest goes through Pillow. ICC profiles are not applied, as in
img2dataset: colours of the few wide-gamut images come out a little pale.
"""

from __future__ import annotations

import io
import math

import cv2
import numpy as np
import simplejpeg
from PIL import Image

from pipeline.curation.downloading.vetting import FORMATS, Header, undecodable
from pipeline.curation.fetching.fetch import FetchError

_MIRRORED_X, _MIRRORED_Y = (2, 3, 6, 7), (3, 4, 7, 8)  # EXIF orientations, after any turn
_LONGEST = 1 << 15  # pixels; a side that cv2.warpAffine takes is shorter by two at least
_STRIP = 512  # rows that Pillow converts at a time: of 50 megapixels every copy is 200 MB


def decode(body: bytes, header: Header) -> np.ndarray:
    """The whole image, [height, width, 3 or 4] uint8, BGR(A). Raises FetchError.

    Causes: truncated, undecodable.
    """
    try:
        if header.plain:
            pixels = cv2.imdecode(np.frombuffer(body, np.uint8), cv2.IMREAD_UNCHANGED)
        else:
            image = Image.open(io.BytesIO(body), formats=FORMATS)
            pixels = _upright(_colour(image), header.orientation)
    except Exception as error:
        raise FetchError(undecodable(body), f"{type(error).__name__}: {error}"[:200]) from None
    if pixels is None:
        raise FetchError(undecodable(body))
    return pixels


def reduced(body: bytes, header: Header, side: int) -> np.ndarray | None:
    """A JPEG for a centre crop of `side` pixels, [height, width, 3] uint8, BGR, upright; None
    where it has to be decoded whole.

    The result's shorter side is at most twice `side`, so that a bilinear resize of it loses
    nothing: at exactly two it is the mean of 2 x 2 pixels. Larger images are brought to exactly
    twice, and cropped there; those beyond four times are decoded at a half, quarter or eighth,
    which libjpeg-turbo does in the frequency domain. Never below twice: see docs.
    """
    short = min(header.width, header.height)
    if not header.jpeg or short <= side:
        return None
    factor = next((f for f in (8, 4, 2) if short >= 2 * side * f), 1)
    if short > 2 * side and max(header.width, header.height) // factor + 2 >= _LONGEST:
        return None
    stored = header.width, header.height
    width, height = reversed(stored) if header.orientation >= 5 else stored
    try:
        pixels = simplejpeg.decode_jpeg(
            body, "BGR", min_width=-(-width // factor), min_height=-(-height // factor)
        )
    except ValueError:  # not quite sound: OpenCV has the last word
        return None
    pixels = _upright(pixels, header.orientation)
    return _doubled(pixels, header, side) if short > 2 * side else pixels


def _doubled(pixels: np.ndarray, header: Header, side: int) -> np.ndarray:
    """The centre crop at twice its size, exactly where img2dataset would cut it.

    `pixels` are all of the image at 1, 1/2, 1/4 or 1/8. Their last row and column, as stored, may
    be the image's only in part; where the image was turned, they may be the first. A resize would
    stretch them to fit, and be off by up to a pixel: so the map is given.
    """
    mirrored = header.orientation in _MIRRORED_X, header.orientation in _MIRRORED_Y
    factor = 2 ** round(math.log2(header.width / pixels.shape[1]))
    there = np.zeros((2, 3))  # pixel of the result -> where it lies in `pixels`
    for axis, length in enumerate((header.width, header.height)):
        size = round(length * side / min(header.width, header.height))
        step = length / (2 * size * factor)
        surplus = pixels.shape[1 - axis] - length / factor if mirrored[axis] else 0.0
        there[axis, axis] = step
        there[axis, 2] = ((size - side) // 2 * 2 + 0.5) * step - 0.5 + surplus
    return cv2.warpAffine(
        pixels,
        there,
        (2 * side, 2 * side),
        flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_REPLICATE,
    )


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Undo what the camera noted as its EXIF orientation, 1 to 8."""
    if orientation in (5, 6, 7, 8):
        pixels = np.swapaxes(pixels, 0, 1)
    if orientation in _MIRRORED_X:
        pixels = pixels[:, ::-1]
    if orientation in _MIRRORED_Y:
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def _colour(image: Image.Image) -> np.ndarray:
    """The first frame through Pillow, on white where it is transparent."""
    image.seek(0)
    image.load()
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    for top in range(0, image.height, _STRIP):
        below = min(top + _STRIP, image.height)
        strip = _opaque(image.crop((0, top, image.width, below)))
        cv2.cvtColor(np.asarray(strip), cv2.COLOR_RGB2BGR, dst=pixels[top:below])
    return pixels


def _opaque(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode == "I":
        deep = np.asarray(image).astype(np.uint32)
        image = Image.fromarray((deep >> 8).clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        layered = image.convert("RGBA")
        ground = Image.new("RGBA", layered.size, (255, 255, 255, 255))
        image = Image.alpha_composite(ground, layered)
    return image.convert("RGB")
