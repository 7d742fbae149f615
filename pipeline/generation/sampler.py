"""A trained SSR-Encoder on its base model, ready to draw: the one place that runs the denoising."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline import models
from pipeline.errors import UserError
from pipeline.generation.recipe import Denoising, Recipe, check_denoising
from pipeline.progress import quiet_libraries
from pipeline.storage import Storage

if TYPE_CHECKING:
    import torch
    from diffusers import StableDiffusionControlNetPipeline, StableDiffusionPipeline
    from PIL import Image

    from pipeline.config.shared import ModelsConfig, Precision
    from ssr_model.conditioning import SSREncoder, Subject


class BaseConfig(Protocol):
    """Where the base model is, and where it goes."""

    models: ModelsConfig
    device: str


class Sampler:
    """Draws pictures with DDIM and classifier-free guidance, with or without subjects.

    denoising: of `draw`; a recipe brings its own. controlled: a ControlNet pipeline on the parts of
    `pipe`, for recipes with a control image.
    """

    def __init__(
        self,
        pipe: StableDiffusionPipeline,
        ssr: SSREncoder,
        denoising: Denoising | None = None,
        controlled: StableDiffusionControlNetPipeline | None = None,
    ) -> None:
        if denoising is not None:
            check_denoising(denoising)
        self._pipe, self._ssr, self._denoising = pipe, ssr, denoising
        self._controlled = controlled
        ssr.attach(pipe)
        if controlled is not None:
            ssr.attach(controlled)

    @classmethod
    def load(
        cls,
        folder: str,
        cfg: BaseConfig,
        denoising: Denoising | None = None,
        precision: Precision = "float32",
        controlnet: str | None = None,
    ) -> Sampler:
        """From the folder (or hub id) of a trained SSR-Encoder and the models it was trained on.

        precision: of all of them. controlnet: hub id or folder of a ControlNet.
        """
        import torch

        from ssr_model.conditioning import SSREncoder

        dtype: torch.dtype = getattr(torch, precision)
        where, parts = models.device(cfg.device), cfg.models
        pipe = load_base(cfg, dtype)
        controlled = None
        if controlnet is not None:
            controlled = models.with_controlnet(pipe, controlnet, dtype)
            controlled.to(where)
        vision = (
            models.load_vision(parts.vision, parts.revision, dtype).to(where),
            models.load_image_processor(parts.vision, parts.revision),
        )
        with _as_user_error("cannot load the SSR-Encoder: "):
            ssr = SSREncoder.from_pretrained(
                folder, vision=vision, base=pipe, device=where, dtype=dtype
            )
        return cls(pipe, ssr, denoising, controlled)

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
        if self._denoising is None:
            raise ValueError("this sampler was given no denoising of its own: make recipes")
        return denoise(self._pipe, self._denoising, prompts, seeds, **condition)

    def make(
        self, recipes: Sequence[Recipe], on_step: Callable[[int], None] | None = None
    ) -> list[Image.Image]:
        """One picture per recipe, all in one batch; the recipes are `alike`.

        on_step: told after each denoising step how many are done; what it raises ends the batch.

        Raises UserError for what a recipe asks and the models do not have: an unknown word, a mask
        outside of what CLIP sees, a control image without a ControlNet, sides that do not fit.
        """
        first = recipes[0]
        if any(recipe.alike != first.alike for recipe in recipes):
            raise ValueError("recipes of one batch are alike")
        asked: dict[str, Any] = {"negative_prompt": [recipe.negative_prompt for recipe in recipes]}
        pipe: Any = self._pipe
        if first.size is not None:
            self.check_size(first.size)
            asked["width"], asked["height"] = first.size
        if first.control is not None:
            if self._controlled is None:
                raise UserError("control: no ControlNet was loaded; name one with --controlnet")
            pipe = self._controlled
            width, height = first.size or (self.side, self.side)
            asked["image"] = [
                r.control.resize((width, height)) for r in recipes if r.control is not None
            ]
            asked["controlnet_conditioning_scale"] = first.control_scale
        if first.subjects:
            with _as_user_error():
                rows = [[subject.subject() for subject in recipe.subjects] for recipe in recipes]
                asked |= self._ssr.condition(rows)
        if on_step is not None:
            asked["callback_on_step_end"] = _after_each_step(on_step)
        prompts, seeds = [r.prompt for r in recipes], [r.seed for r in recipes]
        return denoise(pipe, first, prompts, seeds, **asked)

    def check_size(self, size: tuple[int, int]) -> None:
        """Refuse sides that the base model cannot draw: each is a multiple of `step`."""
        if any(side % self.step for side in size):
            raise UserError(
                f"size: {size[0]}x{size[1]}; this base model draws sides that are multiples of "
                f"{self.step} pixels"
            )

    @property
    def step(self) -> int:
        """What the sides of its pictures are multiples of, pixels: every block of the U-Net halves
        the latents.
        """
        halvings = len(self._pipe.unet.config.block_out_channels) - 1
        return int(self._pipe.vae_scale_factor * 2**halvings)

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


def load_base(cfg: BaseConfig, dtype: torch.dtype | None = None) -> StableDiffusionPipeline:
    """The base model's pipeline, on the device of the settings; dtype none = float32."""
    import diffusers.utils.logging  # noqa: F401  (imported, so that it can be silenced)

    quiet_libraries()
    where = models.device(cfg.device)
    pipe = models.load_pipeline(cfg.models.base, cfg.models.revision, dtype)
    pipe.to(where)
    return pipe


def side_of(pipe: StableDiffusionPipeline) -> int:
    """Side of the pictures that a pipeline draws, pixels."""
    return int(pipe.unet.config.sample_size * pipe.vae_scale_factor)


def denoise(
    pipe: StableDiffusionPipeline,
    cfg: Denoising,
    prompts: Sequence[str],
    seeds: Sequence[int],
    **condition: Any,
) -> list[Image.Image]:
    """One picture per prompt and seed, all in one batch; `condition` is the pipeline's own.

    The noise of a picture depends on its own seed only: not on the batch, the method or the device,
    so pictures of one seed can be compared across methods. Raises UserError for more steps than the
    base model knows.
    """
    import torch

    known = int(pipe.scheduler.config.num_train_timesteps)
    if cfg.steps > known:
        raise UserError(f"steps: {cfg.steps} are more than the {known} of the base model; 50 do")
    result = pipe(
        prompt=list(prompts),
        num_inference_steps=cfg.steps,
        guidance_scale=cfg.guidance,
        guidance_rescale=cfg.guidance_rescale,
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        **condition,
    )
    return list(result.images)


def _after_each_step(on_step: Callable[[int], None]) -> Callable[..., dict[str, Any]]:
    """As diffusers' pipelines call it."""

    def told(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        on_step(step + 1)
        return kwargs

    return told


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
        yield models.resolve(model) if model.startswith(models.SHIPPED) else model
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
