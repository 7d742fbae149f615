"""Reference images, masks over their patches, and regions of the picture that is drawn."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from ssr_model.config import MaskForm

_PROCESSOR_NOISE = 0.05  # between backends, of pixels with a deviation of about one

Picture = Image.Image | np.ndarray
Mask = Image.Image | np.ndarray | Tensor


def as_rgb(image: Picture) -> Image.Image:
    """A PIL image, or an array (H, W, 3) of uint8 or of floats in [0, 1], as an upright RGB
    image. What is transparent becomes white; 16-bit grey is brought to 8.
    """
    if isinstance(image, Image.Image):
        return _upright_rgb(image)
    if not isinstance(image, np.ndarray):
        raise ValueError(
            f"an image must be a PIL image or a NumPy array, not {type(image).__name__}."
        )
    if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"an image array must be (height, width, 3), not {image.shape}.")
    if image.dtype == np.uint8:
        return Image.fromarray(image)
    if not np.issubdtype(image.dtype, np.floating):
        raise ValueError(f"an image array must be uint8 or float, not {image.dtype}.")
    if not np.isfinite(image).all():
        raise ValueError("the image holds NaN or infinite values.")
    if image.min() < 0 or image.max() > 1:
        raise ValueError(
            f"a float image must lie in [0, 1], not [{image.min():.3g}, {image.max():.3g}]."
        )
    return Image.fromarray((image * 255).round().astype(np.uint8))


def _upright_rgb(image: Image.Image) -> Image.Image:
    if 0 in image.size:
        raise ValueError(f"an image must not be empty; this one is {image.size}.")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):  # PIL would clip them to 0-255, whatever their range is
        raise ValueError(
            f"an image of PIL's mode {image.mode!r} does not tell its range: give 8 bits, or an "
            "array (height, width, 3)."
        )
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def as_mask(mask: Mask, size: tuple[int, int], may_be_empty: bool = False) -> Tensor:
    """A mask as (H, W) float32 in [0, 1], 1 = subject.

    mask: PIL image (white = subject), or an array or tensor of bool, of 0/1, of 0-255, or of floats
    in [0, 1].
    size: (width, height) of its image; a mask of another size is a ValueError.
    may_be_empty: whether a mask that selects nothing is one; otherwise it is a ValueError.
    """
    values = _values(mask, "mask", may_be_empty)
    if values.shape != (size[1], size[0]):
        raise ValueError(
            f"the mask is {tuple(values.shape)} (height, width) and its image "
            f"{(size[1], size[0])}: give a mask of the image's own size."
        )
    return values


def _values(mask: Mask, what: str, may_be_empty: bool = False) -> Tensor:
    """(H, W) float32 in [0, 1] of any kind of mask; one that selects nothing is a ValueError,
    unless it may.
    """
    if isinstance(mask, Image.Image):
        mask = np.asarray(mask.convert("L"))
    if not isinstance(mask, (np.ndarray, Tensor)):
        raise ValueError(
            f"a {what} must be a PIL image, an array or a tensor, not {type(mask).__name__}."
        )
    if isinstance(mask, np.ndarray) and mask.dtype.kind not in "biuf":
        raise ValueError(f"a {what} must hold numbers, not {mask.dtype}.")
    values = torch.as_tensor(np.ascontiguousarray(mask) if isinstance(mask, np.ndarray) else mask)
    values = values.detach().cpu()
    if values.ndim != 2 or 0 in values.shape:
        raise ValueError(f"a {what} must be (height, width), not {tuple(values.shape)}.")
    integral = not values.dtype.is_floating_point
    values = values.float()
    if integral and 1 < values.max() < 128:
        raise ValueError(
            f"a {what} of integers holds 0 and 1, or 0 to 255; this one reaches "
            f"{int(values.max())}: of a map of labels give one label's pixels."
        )
    if integral and values.max() > 1:
        values = values / 255
    if not values.isfinite().all() or values.min() < 0 or values.max() > 1:
        raise ValueError(f"a {what} must lie in [0, 1] (or 0-255 as integers).")
    if not may_be_empty and not values.any():
        raise ValueError(f"the {what} selects nothing: it is zero everywhere.")
    return values


def as_region(region: Mask | None, grid: tuple[int, int]) -> Tensor:
    """Share of each cell of a grid (rows, columns) that lies in a region: float32 in [0, 1].

    region: a mask of any size, laid over the whole picture; None = all of it.
    """
    if region is None:
        return torch.ones(grid)
    return F.adaptive_avg_pool2d(_values(region, "region")[None], grid)[0]


def seen_box(image_processor: Any, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """What CLIP sees of an image: (left, top, right, bottom) in the image's own pixels.

    size: (width, height). The image processor resizes the shortest side, then crops the centre.
    """
    width, height = size
    target, crop = image_processor.size, image_processor.crop_size
    if not getattr(image_processor, "do_center_crop", False) or crop is None:
        return 0, 0, width, height
    edge = target.get("shortest_edge")
    if edge:
        scale_x = scale_y = min(width, height) / edge
    else:
        scale_x, scale_y = width / target["width"], height / target["height"]
    seen_w = min(width, max(1, round(crop["width"] * scale_x)))
    seen_h = min(height, max(1, round(crop["height"] * scale_y)))
    left, top = (width - seen_w) // 2, (height - seen_h) // 2
    return left, top, left + seen_w, top + seen_h


def mask_tokens(
    mask: Tensor,
    box: tuple[int, int, int, int],
    grid: tuple[int, int],
    form: MaskForm,
    cls: bool,
) -> Tensor:
    """A mask over CLIP's image tokens, (1 + rows * columns,), from pixels (H, W) in [0, 1].

    box: `seen_box`; grid: `patch_grid`; cls: whether the CLS token may be looked at.
    form: `reweight` takes the covered share of each patch; `bias` (released) resizes bilinearly
    with antialiasing, which spills over to neighbouring patches.
    """
    left, top, right, bottom = box
    seen = mask[top:bottom, left:right]
    if form == "reweight":
        patches = F.adaptive_avg_pool2d(seen[None], grid)
    else:
        patches = F.interpolate(
            seen[None, None], size=grid, mode="bilinear", antialias=True, align_corners=False
        ).clamp(0, 1)
    if not patches.any():
        raise ValueError("the mask lies outside the centre square, which is all that CLIP sees.")
    return torch.cat([torch.full((1,), float(cls)), patches.flatten()])


def check_image_processor(image_processor: Any, vision_config: Any) -> None:
    """Refuse an image processor that does not make what the vision model expects.

    A folder without preprocessor_config.json gives the library's defaults and no error.
    """
    side, channels = vision_config.image_size, vision_config.num_channels
    ramp = np.linspace(0, 255, 2 * side * 3 * side, dtype=np.uint8).reshape(2 * side, 3 * side)
    pixels = image_processor(Image.fromarray(ramp).convert("RGB"), return_tensors="pt").pixel_values
    if tuple(pixels.shape[1:]) != (channels, side, side):
        raise ValueError(
            f"the image processor makes {tuple(pixels.shape[1:])} and the vision model expects "
            f"{(channels, side, side)}: it loaded wrongly, or belongs to another model."
        )
    # of a square the whole is seen, cropped or not: CLIP's steps, written out
    waves = np.indices((2 * side, 2 * side)).astype(np.float32) * np.pi / side
    square = np.stack([np.sin(waves[0]), np.cos(waves[1]), np.sin(waves.sum(0))], axis=-1)
    picture = Image.fromarray(((square + 1) * 127.5).astype(np.uint8))
    small = np.asarray(picture.resize((side, side), Image.Resampling.BICUBIC), np.float32) / 255
    # a CLIP's mean and deviation are its own, but it has some
    mean, deviation = np.array(image_processor.image_mean), np.array(image_processor.image_std)
    expected = (small - mean) / deviation if (deviation != 1).any() else np.inf
    found = image_processor(picture, return_tensors="pt").pixel_values[0].permute(1, 2, 0).numpy()
    apart = float(np.abs(found - expected).mean())
    if not apart < _PROCESSOR_NOISE:
        raise ValueError(
            f"the image processor's pixels are {apart:.3g} away from those of a CLIP: it does not "
            "resize, rescale or normalise as one does, so it loaded wrongly."
        )
