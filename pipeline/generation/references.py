"""The user's own references: pictures, and per picture a text query or a mask, read with care."""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from pipeline.config import GenerateConfig
from pipeline.errors import UserError

MAX_PIXELS = 50_000_000
"""Largest picture that is decoded: a small file may unpack to any size."""


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
    image = open_picture(path).convert("RGBA")
    on_white = Image.new("RGBA", image.size, "white")
    picture = Image.alpha_composite(on_white, image).convert("RGB")
    return OwnReference(
        name=Path(path).stem,
        image=picture,
        query=query.strip() or None,
        mask=_read_mask(mask, picture.size) if mask else None,
    )


def _read_mask(path: str, size: tuple[int, int]) -> Image.Image:
    mask = open_picture(path).convert("L")
    if abs(mask.width * size[1] - mask.height * size[0]) > max(*mask.size, *size):
        raise UserError(
            f"{path}: the mask is {mask.width}x{mask.height}, its image {size[0]}x{size[1]}; "
            "give a mask of the same shape"
        )
    chosen = np.asarray(mask.resize(size, Image.Resampling.NEAREST)) > 127
    if not chosen.any():
        raise UserError(f"{path}: the mask is black all over; paint the subject white")
    return Image.fromarray(chosen.astype(np.uint8) * 255)


def open_picture(path: str) -> Image.Image:
    """The decoded picture, turned upright; its size is checked in the header, before decoding."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
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
