"""The user's own references: pictures, and per picture a text query or a mask, read with care."""

from __future__ import annotations

import io
import struct
import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from pipeline.config import GenerateConfig
from pipeline.config.shared import MAX_PIXELS
from pipeline.errors import UserError
from pipeline.generation.recipe import LARGEST_SIDE, Reference, Region, read_region
from pipeline.jpeg_scans import has_many_scans

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "AVIF", "TIFF")
"""What is decoded: of the others some start programs, as EPS does Ghostscript."""
UPLOADED = ("JPEG", "PNG", "WEBP")
"""What is decoded of strangers: each format is a library of native code more."""


def read_references(cfg: GenerateConfig) -> tuple[Reference, ...]:
    """The references that cfg.image names, with the query, mask, scale and region of each.

    Raises UserError for counts that do not match, a reference with neither query nor mask, files
    that are missing, unreadable or too large, and masks that select nothing.
    """
    for name in ("query", "mask", "scales", "region"):
        given = len(getattr(cfg, name))
        if given not in (0, len(cfg.image)):
            nothing = "" if name == "scales" else ", '' for none"
            raise UserError(
                f"{name}: {given} given for {len(cfg.image)} image(s); give one per image, in the "
                f"same order{nothing}"
            )
    return tuple(
        reference(
            open_picture(path),
            Path(path).stem,
            query=cfg.query[i] if cfg.query else None,
            mask=open_picture(cfg.mask[i]) if cfg.mask and cfg.mask[i] else None,
            mask_name=cfg.mask[i] if cfg.mask else "",
            scale=cfg.scales[i] if cfg.scales else cfg.scale,
            region=read_region(cfg.region[i]) if cfg.region else None,
        )
        for i, path in enumerate(cfg.image)
    )


def reference(
    image: Image.Image,
    name: str,
    query: str | None = None,
    mask: Image.Image | None = None,
    mask_name: str = "mask",
    scale: float = 1.0,
    region: Region | None = None,
) -> Reference:
    """A decoded picture as a reference: RGB, of bounded size, its mask fitted to it.

    name, mask_name: what messages call them. Raises UserError for what selects nothing.
    """
    picture = bounded(image)
    chosen = None
    if mask is not None:
        chosen = fitted_mask(mask, picture.size, mask_name)
    return Reference(
        image=picture,
        query=(query or "").strip() or None,
        mask=None if chosen is None else Image.fromarray(chosen.astype(np.uint8) * 255),
        name=name,
        scale=scale,
        region=region,
    )


def bounded(image: Image.Image) -> Image.Image:
    """RGB, what is transparent white, no side longer than LARGEST_SIDE."""
    picture = on_white(image)
    picture.thumbnail((LARGEST_SIDE, LARGEST_SIDE), Image.Resampling.LANCZOS)
    return picture


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


def open_picture(
    path: str,
    file: BinaryIO | None = None,
    pixels: int = MAX_PIXELS,
    formats: tuple[str, ...] = FORMATS,
) -> Image.Image:
    """The decoded picture, turned upright; its size is checked in the header, before decoding.

    `file` has the bytes where `path` is only what messages call it; more than `pixels` are refused,
    and of such a file a JPEG of more scans than any encoder makes. formats: as Pillow calls them.
    """
    body = None if file is None else file.read()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path if body is None else io.BytesIO(body), formats=formats) as image:
                if image.width * image.height > pixels:
                    size = f"{image.width}x{image.height} pixels"
                    raise UserError(_too_large(path, size, pixels))
                if body and image.format in ("JPEG", "MPO") and has_many_scans(body):
                    raise UserError(f"{path}: a JPEG of too many scans; save it anew")
                image.load()
                return upright(eight_bits(image))
    except Image.DecompressionBombError:
        raise UserError(_too_large(path, "a decompression bomb", pixels)) from None
    except FileNotFoundError:
        raise UserError(f"{path}: no such image; check the path") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder; name one image") from None
    except PermissionError:
        raise UserError(f"{path}: permission denied; check its rights") from None
    except (OSError, ValueError, SyntaxError) as error:
        reason = " ".join(str(error).split())[:120]
        if isinstance(error, UnidentifiedImageError):  # it shows the file object
            reason = "of no known format"
        raise UserError(
            f"{path}: not a readable image ({reason}); give a jpg, png or webp"
        ) from None


def eight_bits(image: Image.Image) -> Image.Image:
    """With values from 0 to 255: of 16 bits the upper eight, where Pillow would clip them to white.

    Raises ValueError where the picture does not tell its range, or has colours that are not known.
    """
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F", "LAB"):
        raise ValueError(
            f"mode {image.mode} does not tell its range: save it with 8 bits per colour"
        )
    return image


def upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF says. Raises ValueError for EXIF that cannot be written anew."""
    try:
        return ImageOps.exif_transpose(image)
    except (struct.error, TypeError, AttributeError, LookupError, ArithmeticError) as error:
        raise ValueError(f"broken EXIF: {error}") from None


def _too_large(path: str, what: str, pixels: int) -> str:
    return f"{path}: {what}, more than {pixels:,} pixels are not read; make it smaller"
