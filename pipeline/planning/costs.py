"""What one image costs of Stable Diffusion 1.5 at 512 pixels with CLIP ViT-L/14: FLOP and bytes.

The operations are counted (on the meta device, with diffusers' and transformers' own modules, by
benchmarks/train_gpu.py); a multiply-add is two. The bytes are the shard format's.
"""

from __future__ import annotations

import re
from typing import Literal

from pipeline.shards import LATENT_LOGVAR, LATENT_MEAN, TOKEN_IDS, layout, vision_columns
from pipeline.shards import Tensor as Column

# --- counted: GFLOP a sample ---
UNET_ONE_SCALE, UNET_SIX_SCALES = 1688.0, 1785.0  # forward, and backward to the adapter alone
VAE, CLIP, TEXT, ALIGNER = 1117.0, 162.0, 13.3, 5.7

# --- shapes ---
LATENT, STATES, PIXELS, TOKENS = (4, 64, 64), (257, 1024), (224, 224, 3), 77
IMAGE_SIZE = 512
TRAINABLES = 25_590_000
"""Whose gradients, in float32, the workers exchange at every step."""

PEAK_TFLOPS = {
    "h100": 989.0, "h200": 989.0, "h800": 989.0, "h20": 148.0, "b200": 2250.0, "a100": 312.0,
    "l40s": 362.0, "l4": 121.0, "a10": 125.0, "a10g": 70.0, "rtx4090": 165.0,
}  # fmt: skip
"""Dense bf16 peaks, as their maker publishes them."""

Layout = Literal["float16", "int8", "pixels", "images"]
"""The codecs of the shards; "images" stands for none: VAE and CLIP run in every step."""
LAYOUTS: tuple[Layout, ...] = ("float16", "int8", "pixels", "images")


_SLOWER = {("h100", "pcie"): 756.0, ("h800", "pcie"): 756.0, ("h100", "nvl"): 835.0,
           ("h200", "nvl"): 835.0}  # fmt: skip
"""Cards that share a kind's name, but not its clock."""
_UNKNOWN = {"laptop", "d"}  # of a desktop card's name, and another chip


def peak_tflops(device: str) -> float | None:
    """Dense bf16 peak of a GPU by the name that it gives itself; None = not known.

    Kinds are whole words of it: an L40 is no L4, and an RTX A1000 no A100.
    """
    words = re.findall("[a-z0-9]+", device.lower().replace("rtx 4090", "rtx4090"))
    kind = next((word for word in map(_superchip, words) if word in PEAK_TFLOPS), None)
    if kind is None or _UNKNOWN & set(words):
        return None
    return next((_SLOWER[kind, w] for w in words if (kind, w) in _SLOWER), PEAK_TFLOPS[kind])


def _superchip(word: str) -> str:
    """The GPU of a GH200 is an H200's."""
    return "h200" if word == "gh200" else word


def columns(codec: str, scales: int, flip: bool = False) -> list[Column]:
    """The tensor columns of a shard of these models; none of the layout "images"."""
    if codec == "images":
        return []
    return layout(
        codec, tokens=TOKENS, latent=LATENT, depths=range(1, scales + 1), states=STATES,
        pixels=PIXELS, flip=flip,
    )  # fmt: skip


def stored_bytes(codec: str, scales: int, flip: bool = False) -> int:
    """Bytes of a row's tensors."""
    return sum(column.nbytes for column in columns(codec, scales, flip))


def runs(codec: str, scales: int, stored: int) -> list[int]:
    """Bytes of a row that a training stage of `scales` of the `stored` scales reads, by stretches
    that lie side by side in a row group.
    """
    names = vision_columns(codec, range(stored - scales + 1, stored + 1))
    wanted = {TOKEN_IDS, LATENT_MEAN, LATENT_LOGVAR, *names}
    found, before = list[int](), False
    for column in columns(codec, stored):
        if column.name in wanted:
            if not before:
                found.append(0)
            found[-1] += column.nbytes
        before = column.name in wanted
    return found


def row_bytes(codec: str, scales: int, stored: int) -> int:
    """Bytes that a training row of `scales` of the `stored` scales is read with."""
    return sum(runs(codec, scales, stored))


def step_gflop(codec: str, scales: int, queries: int = 1) -> float:
    """GFLOP of a training sample: U-Net, adapter, the texts, and what shards do not hold."""
    per_scale = (UNET_SIX_SCALES - UNET_ONE_SCALE) / 5
    unet = UNET_ONE_SCALE + (scales - 1) * per_scale
    online = {"pixels": CLIP, "images": CLIP + VAE}
    return unet + ALIGNER + (1 + queries) * TEXT + online.get(codec, 0.0)


def feature_gflop(codec: str, flip: bool = False) -> float:
    """GFLOP of an image's features: the VAE, and CLIP where the codec stores its states."""
    encoders = {"images": 0.0, "pixels": VAE}.get(codec, VAE + CLIP)
    return encoders * (2 if flip else 1)
