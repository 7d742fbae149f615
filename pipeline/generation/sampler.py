"""A trained SSR-Encoder on its base model, ready to draw: the one place that runs the denoising."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
    """Draws pictures with DDIM and classifier-free guidance, with or without subjects."""

    def __init__(self, pipe: StableDiffusionPipeline, ssr: SSREncoder, cfg: SamplingConfig) -> None:
        check_sampling(cfg)
        self._pipe, self._ssr, self._cfg = pipe, ssr, cfg
        ssr.attach(pipe)

    @classmethod
    def load(cls, folder: str, cfg: SamplingConfig) -> Sampler:
        """From the folder (or hub id) of a trained SSR-Encoder and the models it was trained on."""
        from ssr_model.conditioning import SSREncoder

        pipe = load_base(cfg)
        where, parts = models.device(cfg.device), cfg.models
        vision = (
            models.load_vision(parts.vision, parts.revision),
            models.load_image_processor(parts.vision, parts.revision),
        )
        with _as_user_error("cannot load the SSR-Encoder: "):
            ssr = SSREncoder.from_pretrained(folder, vision=vision, base=pipe, device=where)
        return cls(pipe, ssr, cfg)

    @property
    def side(self) -> int:
        """Side of the pictures that are drawn, pixels."""
        return side_of(self._pipe)

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
        condition: dict[str, Any] = {}
        if subjects is not None:
            with _as_user_error():
                condition = self._ssr.condition([list(each) for each in subjects])
        return denoise(self._pipe, self._cfg, prompts, seeds, **condition)

    def attention(self, image: Image.Image, queries: Sequence[str]) -> NDArray[np.float32]:
        """Where the aligner looks for each query, (queries, h, w): one value per patch."""
        with _as_user_error():
            maps = self._ssr.attention_maps(image, list(queries))
        return np.stack([each.mean.numpy() for each in maps])

    def seen(self, image: Image.Image) -> Image.Image:
        """The part of a reference that the encoder sees: CLIP crops the central square."""
        return image.crop(self.seen_box(image))

    def seen_box(self, image: Image.Image) -> tuple[int, int, int, int]:
        """Where that part lies, and what attention covers: (left, top, right, bottom), pixels."""
        from ssr_model.images import seen_box

        return seen_box(self._ssr.image_processor, image.size)


def check_sampling(cfg: SamplingConfig) -> None:
    """Refuse what no picture can be drawn with."""
    if cfg.steps < 1:
        raise UserError(f"steps: {cfg.steps} is less than 1; choose 20 to 50")
    if not 0 <= cfg.guidance_rescale <= 1:
        raise UserError(f"guidance_rescale: {cfg.guidance_rescale} is not within 0 to 1")


def load_base(cfg: SamplingConfig) -> StableDiffusionPipeline:
    """The base model's pipeline, on the device of the settings."""
    import diffusers.utils.logging  # noqa: F401  (imported, so that it can be silenced)

    check_sampling(cfg)
    quiet_libraries()
    where = models.device(cfg.device)
    pipe = models.load_pipeline(cfg.models.base, cfg.models.revision)
    pipe.to(where)
    return pipe


def side_of(pipe: StableDiffusionPipeline) -> int:
    """Side of the pictures that a pipeline draws, pixels."""
    return int(pipe.unet.config.sample_size * pipe.vae_scale_factor)


def denoise(
    pipe: StableDiffusionPipeline,
    cfg: SamplingConfig,
    prompts: Sequence[str],
    seeds: Sequence[int],
    **condition: Any,
) -> list[Image.Image]:
    """One picture per prompt and seed, all in one batch; `condition` is the pipeline's own.

    The noise of a picture depends on its own seed only: not on the batch, the method or the device,
    so pictures of one seed can be compared across methods.
    """
    import torch

    result = pipe(
        prompt=list(prompts),
        num_inference_steps=cfg.steps,
        guidance_scale=cfg.guidance,
        guidance_rescale=cfg.guidance_rescale,
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        **condition,
    )
    return list(result.images)


@contextmanager
def _as_user_error(what: str = "") -> Iterator[None]:
    """ssr_model refuses models and subjects (an unknown word, a mask outside the crop) by
    ValueError.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        raise UserError(what + " ".join(str(error).split())) from error


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


def model_identity(model: str) -> str:
    """sha256 over the config and the weights of a trained SSR-Encoder, a folder or a hub id.

    Raises UserError where there is none; of its files only the config is read for what it says.
    """
    from ssr_model.weights import fetch, read_config

    with _as_user_error("cannot load the SSR-Encoder: "):
        folder = fetch(model)
        read_config(folder)
    return models.identity(str(folder))["sha256"]
