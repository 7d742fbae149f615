"""A trained SSR-Encoder on its base model, ready to draw: the one place that runs the denoising."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline import models
from pipeline.errors import UserError
from pipeline.progress import quiet_libraries
from pipeline.storage import Storage

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline
    from PIL import Image

    from pipeline.config import EvaluateConfig, GenerateConfig
    from ssr_model.conditioning import SSREncoder, Subject

    SamplingConfig = EvaluateConfig | GenerateConfig


class Sampler:
    """Draws pictures with DDIM and classifier-free guidance, with or without subjects.

    The noise of a picture depends on its own seed only: not on the batch, the method or the
    device, so pictures of one seed can be compared across methods.
    """

    def __init__(self, pipe: StableDiffusionPipeline, ssr: SSREncoder, cfg: SamplingConfig) -> None:
        if cfg.steps < 1:
            raise UserError(f"steps: {cfg.steps} is less than 1; choose 20 to 50")
        if not 0 <= cfg.guidance_rescale <= 1:
            raise UserError(f"guidance_rescale: {cfg.guidance_rescale} is not within 0 to 1")
        self._pipe, self._ssr, self._cfg = pipe, ssr, cfg
        ssr.attach(pipe)

    @classmethod
    def load(cls, folder: str, cfg: SamplingConfig) -> Sampler:
        """From the folder (or hub id) of a trained SSR-Encoder and the models it was trained on."""
        import diffusers.utils.logging  # noqa: F401  (imported, so that it can be silenced)

        from ssr_model.conditioning import SSREncoder

        quiet_libraries()
        where, parts = models.device(cfg.device), cfg.models
        vision = (
            models.load_vision(parts.vision, parts.revision),
            models.load_image_processor(parts.vision, parts.revision),
        )
        pipe = models.load_pipeline(parts.base, parts.revision)
        pipe.to(where)
        try:
            ssr = SSREncoder.from_pretrained(folder, vision=vision, base=pipe, device=where)
        except (OSError, ValueError) as error:
            raise UserError(
                f"cannot load the SSR-Encoder: {' '.join(str(error).split())}"
            ) from error
        return cls(pipe, ssr, cfg)

    @property
    def side(self) -> int:
        """Side of the pictures that are drawn, pixels."""
        return int(self._pipe.unet.config.sample_size * self._pipe.vae_scale_factor)

    def draw(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        subjects: Sequence[Sequence[Subject]] | None = None,
    ) -> list[Image.Image]:
        """One picture per prompt, all in one batch.

        Args:
            prompts, seeds: as many of each.
            subjects: the subjects of each prompt, the same number for all; none = text only, which
                is exactly the base model.
        """
        import torch

        condition: dict[str, Any] = {}
        if subjects is not None:
            with _as_user_error():
                condition = self._ssr.condition([list(each) for each in subjects])
        noise = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        result = self._pipe(
            prompt=list(prompts),
            num_inference_steps=self._cfg.steps,
            guidance_scale=self._cfg.guidance,
            guidance_rescale=self._cfg.guidance_rescale,
            generator=noise,
            **condition,
        )
        return list(result.images)

    def attention(self, image: Image.Image, queries: Sequence[str]) -> NDArray[np.float32]:
        """Where the aligner looks for each query, (queries, h, w): one value per patch."""
        with _as_user_error():
            maps = self._ssr.attention_maps(image, list(queries))
        return np.stack([each.mean.numpy() for each in maps])

    def seen(self, image: Image.Image) -> Image.Image:
        """The part of a reference that the encoder sees: CLIP crops the central square."""
        from ssr_model.images import seen_box

        return image.crop(seen_box(self._ssr.image_processor, image.size))


@contextmanager
def _as_user_error() -> Iterator[None]:
    """ssr_model refuses subjects (an unknown word, a mask outside the crop) by ValueError."""
    try:
        yield
    except ValueError as error:
        raise UserError(" ".join(str(error).split())) from error


@contextmanager
def model_folder(storage: Storage, model: str | None) -> Iterator[str]:
    """A place `SSREncoder.from_pretrained` reads: `model` itself, or a local copy of root/model."""
    if model is not None and "://" not in model:
        yield model
        return
    source = storage.sub("model") if model is None else Storage(model)
    if not source.exists("config.json"):
        raise UserError(f"{source.url()}: no trained model there; run jobs/train.py first")
    if source.local:
        yield source.url()
        return
    with tempfile.TemporaryDirectory(prefix="ssr-model-") as folder:
        source.download_tree("", folder)
        yield folder


def model_identity(folder: str) -> str:
    """sha256 over the trained weights in a local folder; a hub id stands for itself."""
    files = sorted(Path(folder).glob("*.safetensors"))
    digest = hashlib.sha256()
    for file in files:
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest() if files else folder
