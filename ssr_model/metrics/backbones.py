"""The frozen networks that metrics look with: pictures and texts in, vectors of unit length out.

Scores of different backbones are different metrics: DINO of a ViT-S/16 and of a ViT-S/8, or CLIP-T
of a B/32 and of an L/14, do not compare. So every result names its backbone, with the hash of its
weights and its preprocessing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ssr_model.images import Picture, as_rgb, check_image_processor
from ssr_model.text import check_tokenizer, token_ids
from ssr_model.vision import clip_crop, clip_input

_SIZES = {192: "Ti", 384: "S", 768: "B", 1024: "L", 1280: "H", 1536: "g"}


class FrozenModel:
    """A frozen vision model with its own image processor, on one device.

    name: what results call it. architecture: such as `ViT-B/32`. sha256: of its weights; of a
    single file it is that file's own.
    """

    kind: str

    def __init__(
        self, model: Any, image_processor: Any, name: str, sha256: str, batch_size: int = 32
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.image_processor = image_processor
        self.name, self.sha256, self.batch_size = name, sha256, batch_size
        self.threads = min(4, os.cpu_count() or 1)
        vision = getattr(model.config, "vision_config", model.config)
        size = _SIZES.get(vision.hidden_size, str(vision.hidden_size))
        self.architecture = f"ViT-{size}/{vision.patch_size}"

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Self:
        """Move the model. Published figures are of float32: half precision moves their digits."""
        self.model.to(device=device, dtype=dtype)
        return self

    def describe(self) -> dict[str, Any]:
        """What shapes its answers, as JSON: for results and for fingerprints of settings."""
        processor = {
            **self.image_processor.to_dict(),
            "image_processor_type": type(self.image_processor).__name__,  # the backend too
        }
        return {
            "name": self.name,
            "kind": self.kind,
            "architecture": self.architecture,
            "sha256": self.sha256,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "preprocessing": json.loads(json.dumps(processor)),  # lists, not tuples
        }

    def _batches(self, pictures: Sequence[Picture]) -> Iterator[Tensor]:
        """Pixel values (<= batch_size, channels, S, S), in order, on the model's device."""
        for crops in _ahead(self._crop, pictures, self.batch_size, self.threads):
            pixels = torch.from_numpy(np.stack(crops)).to(self.model.device)
            yield clip_input(self.image_processor, pixels).to(self.model.dtype)

    def _crop(self, picture: Picture) -> np.ndarray:
        return clip_crop(self.image_processor, as_rgb(picture))


class Backbone(FrozenModel):
    """One that gives vectors. width: of the vectors."""

    def __init__(
        self, model: Any, image_processor: Any, name: str, sha256: str, batch_size: int = 32
    ) -> None:
        super().__init__(model, image_processor, name, sha256, batch_size)
        self.width: int = getattr(model.config, "vision_config", model.config).hidden_size

    @property
    def blank(self) -> tuple[int, int, int]:
        """The colour (RGB, 0-255) that the image processor turns into zeros: it says nothing."""
        red, green, blue = (round(255 * mean) for mean in self.image_processor.image_mean)
        return red, green, blue

    @torch.no_grad()
    def images(self, pictures: Sequence[Picture]) -> Tensor:
        """Vectors (B, width) of pictures: float32 of unit length, on the CPU.

        Each picture's is its own, but for rounding: batches decide nothing.
        """
        rows = [torch.zeros(0, self.width)]
        rows += [self._unit(self._look(values)) for values in self._batches(pictures)]
        return torch.cat(rows)

    def _look(self, pixel_values: Tensor) -> Tensor:
        """Vectors (B, width) of any length, of (B, channels, S, S)."""
        raise NotImplementedError

    def _unit(self, vectors: Tensor) -> Tensor:
        vectors = vectors.float().cpu()
        lengths = vectors.norm(dim=-1, keepdim=True)
        if not (lengths.isfinite() & (lengths > 0)).all():
            raise ValueError(
                f"{self.name} gives vectors without a direction (zero, NaN or infinite): its "
                "weights are damaged, or overflow in this dtype; try float32."
            )
        return vectors / lengths


class ClipBackbone(Backbone):
    """A whole CLIP: its projected, normalised embeddings of images and texts."""

    kind = "clip"

    def __init__(
        self,
        model: Any,
        image_processor: Any,
        tokenizer: Any,
        name: str,
        sha256: str,
        batch_size: int = 32,
    ) -> None:
        super().__init__(model, image_processor, name, sha256, batch_size)
        check_image_processor(image_processor, model.config.vision_config)
        check_tokenizer(tokenizer, model.config.text_config)
        self.tokenizer = tokenizer
        self.width = model.config.projection_dim

    def _look(self, pixel_values: Tensor) -> Tensor:
        seen = self.model.vision_model(pixel_values).pooler_output
        return self.model.visual_projection(seen)

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Vectors (B, width) of texts: float32 of unit length, on the CPU.

        What is longer than the text encoder reads (77 tokens of the published ones) is cut.
        """
        rows = [torch.zeros(0, self.width)]
        for start in range(0, len(texts), self.batch_size):
            ids = token_ids(self.tokenizer, texts[start : start + self.batch_size])
            read = self.model.text_model(ids.to(self.model.device)).pooler_output
            rows.append(self._unit(self.model.text_projection(read)))
        return torch.cat(rows)


class DinoBackbone(Backbone):
    """A DINO or DINOv2: the CLS token after the last LayerNorm."""

    kind = "dino"

    def __init__(
        self, model: Any, image_processor: Any, name: str, sha256: str, batch_size: int = 32
    ) -> None:
        super().__init__(model, image_processor, name, sha256, batch_size)
        check_square(image_processor, model.config, "dinov2" in model.config.model_type)

    def _look(self, pixel_values: Tensor) -> Tensor:
        return self.model(pixel_values).last_hidden_state[:, 0]


def check_square(image_processor: Any, config: Any, any_size: bool) -> None:
    """Refuse an image processor that does not make what the vision model expects.

    any_size: whether it takes every square that its patches divide, and not its config's alone.
    """
    side = config.image_size
    picture = Image.new("RGB", (3 * side, 2 * side), (127, 127, 127))
    pixels = image_processor(picture, return_tensors="pt").pixel_values
    height, width = pixels.shape[-2:]
    fits = height == width and (height % config.patch_size == 0 if any_size else height == side)
    if not fits or pixels.shape[1] != config.num_channels:
        raise ValueError(
            f"the image processor makes {tuple(pixels.shape[1:])} and the model expects "
            f"{(config.num_channels, side, side)}: it loaded wrongly, or belongs to another model."
        )
    if not (image_processor.do_rescale and image_processor.do_normalize):
        raise ValueError(
            "the image processor does not rescale or normalise as this model's own does: it loaded "
            "wrongly."
        )


def _ahead(
    work: Callable[[Any], Any], items: Sequence[Any], size: int, threads: int
) -> Iterator[list[Any]]:
    """Batches of work(item), in order; a batch is worked on while the one before it is used."""
    with ThreadPoolExecutor(threads, thread_name_prefix="crop") as pool:
        under_way: list[Future[Any]] = []
        for start in range(0, len(items), size):
            following = [pool.submit(work, item) for item in items[start : start + size]]
            if under_way:
                yield [future.result() for future in under_way]
            under_way = following
        if under_way:
            yield [future.result() for future in under_way]
