"""The user's own references: pictures, and per picture a text query or a mask, read with care."""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from pipeline.config import GenerateConfig
from pipeline.config.shared import MAX_PIXELS
from pipeline.errors import UserError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "AVIF", "TIFF")
"""What is decoded: of the others some start programs, as EPS does Ghostscript."""


@dataclass(frozen=True)
class OwnReference:
    """A picture of the user's and what to take from it: a text query, or a mask, or both."""

    name: str
    image: Image.Image
    """RGB, upright."""
    query: str | None
    mask: Image.Image | None
    """Mode L at the image's size, 255 on the subject."""

    def sha256(self) -> str:
        """Of what is selected: the picture's pixels, the query, the mask."""
        parts = [repr(self.image.size).encode(), self.image.tobytes(), (self.query or "").encode()]
        parts.append(b"" if self.mask is None else self.mask.tobytes())
        return hashlib.sha256(b"\0".join(parts)).hexdigest()


def read_references(cfg: GenerateConfig) -> list[OwnReference]:
    """The references that cfg.image, cfg.query and cfg.mask name.

    Raises UserError for counts that do not match, a reference with neither query nor mask, no
    prompt, files that are missing, unreadable or too large, and masks that select nothing.
    """
    for name in ("query", "mask"):
        given = len(getattr(cfg, name))
        if given not in (0, len(cfg.image)):
            raise UserError(
                f"{name}: {given} given for {len(cfg.image)} image(s); give one per image, in the "
                "same order, '' for none"
            )
    if not (cfg.prompt or "").strip():
        raise UserError('prompt: missing; say what to draw, for example --prompt "a cup on snow"')
    queries = cfg.query or [""] * len(cfg.image)
    masks = cfg.mask or [""] * len(cfg.image)
    return [_read(*each) for each in zip(cfg.image, queries, masks, strict=True)]


def _read(path: str, query: str, mask: str) -> OwnReference:
    if not query.strip() and not mask:
        raise UserError(
            f"{path}: neither a query nor a mask says what to take; give --query or --mask"
        )
    picture = on_white(open_picture(path))
    return OwnReference(
        name=Path(path).stem,
        image=picture,
        query=query.strip() or None,
        mask=_read_mask(mask, picture.size) if mask else None,
    )


def _read_mask(path: str, size: tuple[int, int]) -> Image.Image:
    chosen = fitted_mask(open_picture(path), size, path)
    return Image.fromarray(chosen.astype(np.uint8) * 255)


def on_white(image: Image.Image) -> Image.Image:
    """RGB; what is transparent is white."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    ground = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(ground, image.convert("RGBA")).convert("RGB")


def fitted_mask(mask: Image.Image, size: tuple[int, int], path: str) -> NDArray[np.bool_]:
    """The white of a mask for an image of `size` (w, h): (h, w).

    Raises UserError, which names `path`, for another shape and where nothing is white.
    """
    if abs(mask.width * size[1] - mask.height * size[0]) > max(*mask.size, *size):
        raise UserError(
            f"{path}: the mask is {mask.width}x{mask.height}, its image {size[0]}x{size[1]}; "
            "give a mask of the same shape"
        )
    chosen: NDArray[np.bool_] = (
        np.asarray(mask.convert("L").resize(size, Image.Resampling.NEAREST)) > 127
    )
    if not chosen.any():
        raise UserError(f"{path}: the mask is black all over; paint the subject white")
    return chosen


def open_picture(path: str, file: BinaryIO | None = None) -> Image.Image:
    """The decoded picture, turned upright; its size is checked in the header, before decoding.

    `file` has the bytes where `path` is only what messages call it.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(file or path, formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise UserError(_too_large(path, f"{image.width}x{image.height} pixels"))
                image.load()
                return ImageOps.exif_transpose(image)
    except Image.DecompressionBombError:
        raise UserError(_too_large(path, "a decompression bomb")) from None
    except FileNotFoundError:
        raise UserError(f"{path}: no such image; check the path") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder; name one image") from None
    except PermissionError:
        raise UserError(f"{path}: permission denied; check its rights") from None
    except (OSError, ValueError, SyntaxError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(
            f"{path}: not a readable image ({reason}); give a jpg, png or webp"
        ) from None


def _too_large(path: str, what: str) -> str:
    return f"{path}: {what}, more than {MAX_PIXELS:,} pixels are not read; make it smaller"
