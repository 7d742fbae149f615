"""Models and features of random numbers, in the layouts and architectures of real ones.

Speed does not depend on what weights say, so nothing is downloaded. `tiny` shows that a benchmark
runs; `mid` has Stable Diffusion 1.5's blocks at a fifth of its widths, for CPUs; `sd15` is Stable
Diffusion 1.5 with CLIP ViT-L/14.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from PIL import Image
from torch import nn
from transformers import (
    CLIPImageProcessorPil,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
)

from pipeline import models
from pipeline.config import ModelsConfig
from pipeline.shards import CLIP_PIXELS, Manifest, Shard, ShardWriter, encode_states, layout
from pipeline.storage import Storage
from ssr_model.config import SSRConfig
from ssr_model.frozen import load_unet_config

NOISE = {
    "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012,
    "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1,
}  # fmt: skip
DOWN, UP = "DownEncoderBlock2D", "UpDecoderBlock2D"


@dataclass(frozen=True)
class Size:
    """Shapes of one set of models."""

    unet: tuple[int, ...]
    """Widths of the U-Net's blocks; the last has no attention, as in Stable Diffusion 1.5."""
    vae: tuple[int, ...]
    """Widths of the VAE's blocks; each but the first halves the picture."""
    text: tuple[int, int, int, int]
    """Width, layers, heads and tokens of the text encoder."""
    vision: tuple[int, int, int, int]
    """Width, layers, heads and patch, in pixels, of CLIP's vision tower."""
    clip: int
    """Side of CLIP's input, pixels."""
    image: int
    """Side of the picture, pixels."""
    depths: tuple[int, ...]
    """The scales."""

    @property
    def latent(self) -> tuple[int, int, int]:
        """(C, h, w)."""
        side = self.image // 2 ** (len(self.vae) - 1)
        return 4, side, side


SIZES = {
    "tiny": Size(
        (32, 64), (16, 16, 16), (32, 2, 4, 24), (48, 6, 4, 4), clip=32, image=32, depths=(2, 4, 6)
    ),
    "mid": Size(
        (64, 128, 256, 256), (24, 48, 96, 96), (192, 4, 4, 77), (192, 12, 4, 14),
        clip=112, image=128, depths=(2, 4, 6, 8, 10, 12),
    ),
    "sd15": Size(
        (320, 640, 1280, 1280), (128, 256, 512, 512), (768, 12, 12, 77), (1024, 24, 16, 14),
        clip=224, image=512, depths=(4, 8, 12, 16, 20, 24),
    ),
}  # fmt: skip
VOCABULARY = 49_408  # of Stable Diffusion 1.5's text encoder


@dataclass
class Models:
    """Every model of the method but the adapter, on one device."""

    unet: Any
    vae: Any
    text_encoder: Any
    vision: Any
    image_processor: Any
    scheduler: Any


def make(size: Size, vocabulary: int = VOCABULARY, device: str = "cpu") -> Models:
    """The models, float32, in eval mode, without gradients."""
    torch.manual_seed(0)
    width, layers, heads, tokens = size.text
    seen, depth, seeing, patch = size.vision
    small = {"norm_num_groups": 8} if min(size.vae) % 32 else {}
    text = CLIPTextConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=4 * width,
        num_hidden_layers=layers, num_attention_heads=heads, max_position_embeddings=tokens,
        bos_token_id=vocabulary - 2, eos_token_id=vocabulary - 1, pad_token_id=vocabulary - 1,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=seen, intermediate_size=4 * seen, num_hidden_layers=depth,
        num_attention_heads=seeing, image_size=size.clip, patch_size=patch,
    )  # fmt: skip
    blocks = len(size.unet)
    cross = ["CrossAttn"] * (blocks - 1) + [""]
    with torch.device(device):
        made = Models(
            UNet2DConditionModel(
                sample_size=size.latent[1], block_out_channels=size.unet, cross_attention_dim=width,
                down_block_types=tuple(f"{kind}DownBlock2D" for kind in cross),
                up_block_types=tuple(f"{kind}UpBlock2D" for kind in reversed(cross)),
            ),
            AutoencoderKL(
                block_out_channels=size.vae, layers_per_block=2, sample_size=size.image,
                down_block_types=(DOWN,) * len(size.vae), up_block_types=(UP,) * len(size.vae),
                **small,
            ),
            CLIPTextModel(text),
            CLIPVisionModel(vision),
            _image_processor(size),
            DDIMScheduler(**NOISE),
        )  # fmt: skip
    for model in (made.unet, made.vae, made.text_encoder, made.vision):
        model.requires_grad_(False).eval()
    return made


def adapter_config(size: Size, given: Models, depths: tuple[int, ...], **fields: Any) -> SSRConfig:
    """The adapter's shape for these models."""
    return SSRConfig.from_models(
        given.vision.config, given.text_encoder.config, given.unet, depths=depths, **fields
    )


def save(size: Size, folder: Path) -> ModelsConfig:
    """Write the models to a folder, with the mini world's tokenizer, and name them."""
    tokenizer = models.load_tokenizer("miniworld:sd")
    tokenizer.model_max_length = size.text[3]
    made = make(size, len(tokenizer))
    for name in ("unet", "vae", "text_encoder", "scheduler"):
        getattr(made, name).save_pretrained(folder / "sd" / name)
    tokenizer.save_pretrained(folder / "sd" / "tokenizer")
    (folder / "sd" / "model_index.json").write_text(
        json.dumps({"_class_name": "StableDiffusionPipeline"})
    )
    made.vision.save_pretrained(folder / "clip")
    made.image_processor.save_pretrained(folder / "clip")
    return ModelsConfig(base=str(folder / "sd"), vision=str(folder / "clip"))


@dataclass(frozen=True)
class Shapes:
    """What a row of features has of some models."""

    latent: tuple[int, int, int]
    states: tuple[int, int]
    pixels: tuple[int, int, int]
    depths: tuple[int, ...]

    @classmethod
    def of(cls, named: ModelsConfig, depths: tuple[int, ...]) -> Shapes:
        """Read off the models' configs."""
        unet = load_unet_config(models.resolve(named.base))
        vision = models.load_vision_config(named.vision)
        side, patches = unet["sample_size"], (vision.image_size // vision.patch_size) ** 2
        return cls(
            (unet["in_channels"], side, side),
            (1 + patches, vision.hidden_size),
            (vision.image_size, vision.image_size, 3),
            depths,
        )


def write_features(
    root: Path, named: ModelsConfig, depths: tuple[int, ...], rows: int, codec: str = "float16"
) -> Manifest:
    """A sealed curation of `rows` random training rows, as these models would give."""
    storage, (base, vision) = Storage(root), (named.base, named.vision)
    tokenizer, shapes = models.load_tokenizer(base), Shapes.of(named, depths)
    tensors = layout(
        codec, tokens=tokenizer.model_max_length, latent=shapes.latent, depths=depths,
        states=shapes.states, pixels=shapes.pixels,
    )  # fmt: skip
    path = "features/train-00000.parquet"
    with storage.publish(path) as sink:
        writer = ShardWriter(sink, tensors, row_group_bytes=8 * 2**20)
        for columns in _columns(shapes, tokenizer, rows, codec):
            writer.write(columns)
        writer.close()
    shard = Shard(
        path=path, split="train", rows=rows, row_groups=writer.row_groups, bytes=sink.bytes,
        sha256=sink.sha256,
    )  # fmt: skip
    encoders = {
        "vision": models.identity(vision),
        "vae": models.identity(base, "vae"),
        "text": models.identity(base, "text_encoder"),
    }
    told = {t.name: {"shape": list(t.shape), "dtype": t.dtype} for t in tensors}
    manifest = Manifest([shard], list(depths), told, encoders, codec)
    manifest.save(storage)
    return manifest


def _columns(shapes: Shapes, tokenizer: Any, rows: int, codec: str) -> Iterator[dict[str, Any]]:
    rng = np.random.default_rng(0)
    colours, classes = ("red", "green", "blue", "white"), ("fish", "cup", "tree", "boat", "star")
    for start in range(0, rows, 64):
        count = min(64, rows - start)
        pairs = [
            [
                f"a {a} {b}"
                for a, b in zip(rng.choice(colours, 2), rng.choice(classes, 2), strict=True)
            ]
            for _ in range(count)
        ]
        captions = [f"{a} and {b} on sand" for a, b in pairs]
        ids = tokenizer(captions, padding="max_length", truncation=True)["input_ids"]
        columns: dict[str, Any] = {
            "key": [f"{start + i:08d}" for i in range(count)],
            "url": ["http://example.com"] * count,
            "caption": captions,
            "aesthetic": [6.5] * count,
            "predictor": ["v2"] * count,
            "subjects": pairs,
            "token_ids": np.asarray(ids, np.int32),
            "latent_mean": rng.standard_normal((count, *shapes.latent), np.float32),
            "latent_logvar": rng.standard_normal((count, *shapes.latent), np.float32) * 0.1 - 4.0,
        }
        if codec == "pixels":
            shape = (count, *shapes.pixels)
            columns[CLIP_PIXELS] = rng.integers(0, 256, shape, np.uint8)
        else:
            drawn = {
                d: rng.standard_normal((count, *shapes.states), np.float32) for d in shapes.depths
            }
            given = {depth: torch.from_numpy(value) for depth, value in drawn.items()}
            columns |= {name: value.numpy() for name, value in encode_states(codec, given).items()}
        yield columns


def pictures(size: Size, count: int) -> list[bytes]:
    """JPEGs as a crawl stores them, as large in bytes as photographs."""
    files = []
    for _ in range(count):
        file = io.BytesIO()
        noise = Image.effect_noise((size.image, size.image), 60).convert("RGB")
        noise.save(file, format="JPEG", quality=90)
        files.append(file.getvalue())
    return files


def parameters(model: nn.Module) -> int:
    """How many numbers a model has."""
    return sum(tensor.numel() for tensor in model.parameters())


def _image_processor(size: Size) -> Any:
    side = {"height": size.clip, "width": size.clip}
    return CLIPImageProcessorPil(size={"shortest_edge": size.clip}, crop_size=side)
