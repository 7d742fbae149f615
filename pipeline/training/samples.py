"""Grids of samples while training goes on: the reference, where the encoder looks, what is drawn.

Drawn of the same held-out rows from the same noise every time, so that grids compare over time and
between runs. Everything but the VAE is there already: features and references come from the shards,
so neither images nor CLIP are needed.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from pipeline.config import TrainConfig
from pipeline.errors import UserError
from pipeline.generation import grid
from pipeline.progress import say
from pipeline.training.inputs import Inputs, Preparer
from pipeline.training.learner import Learner
from pipeline.training.vision import hidden_states
from ssr_model.maps import overlay
from ssr_model.text import real_tokens

_TITLES = (
    "Held-out picture",
    "Where the encoder looks for A",
    "A drawn",
    "Its words alone, same noise",
    "Where it looks for B",
    "B drawn",
)
_QUERIES = 2


def two_queries(prepare: Preparer) -> Preparer:
    """The same preparer, with the first two subjects of a row as its queries."""
    prepare = copy.copy(prepare)
    prepare.query, prepare.queries = "subject", _QUERIES
    prepare.forget()
    return prepare


class Samples:
    """Draws grids of a learner's weights; rank 0 alone has one.

    What cannot be drawn is said once and never tried again: it is no reason to end a run.

    Args:
        cfg: the run's settings.
        learner: whose weights draw: the moving average, if there is one.
        rows: gives the rows of the grid, with two queries each, as `two_queries` prepares them.
    """

    def __init__(
        self, cfg: TrainConfig, learner: Learner, rows: Callable[[], list[Inputs]]
    ) -> None:
        self.cfg, self.learner = cfg, learner
        self._rows: Callable[[], list[Inputs]] | None = rows
        self._pipe: Any = None
        self._inputs: Inputs | None = None

    def __call__(self, step: int) -> Image.Image | None:
        """The grid of now, for its heading at `step`; None where none can be drawn.

        The generators of torch stand afterwards where they stood.
        """
        if self._rows is None:
            return None
        device = self.learner.world.device
        try:
            with torch.random.fork_rng([] if device.type == "cpu" else [device]):
                self._open()
                assert self._inputs is not None
                with self.learner.best():
                    return self._draw(self._inputs.to(device), step)
        except UserError as error:
            reason = str(error)
        except torch.OutOfMemoryError:
            reason = "the device's memory is full; lower sample_rows"
        self._rows = self._pipe = self._inputs = None
        say(f"warning: no more grids of samples: {reason}")
        return None

    def _open(self) -> None:
        if self._inputs is None:
            assert self._rows is not None
            found = self._rows()
            if not found:
                raise UserError("there are no held-out rows to draw; curate with test_rows")
            self._inputs = found[0]
        if self._pipe is None:
            self._pipe = _pipeline(self.learner)

    @torch.no_grad()
    def _draw(self, inputs: Inputs, step: int) -> Image.Image:
        cfg, frozen = self.cfg, self.learner.frozen
        half = cfg.precision == "bf16"
        with torch.autocast(self.learner.world.device.type, torch.bfloat16, enabled=half):
            states = hidden_states(inputs.features, self.learner.stage.depths, frozen.vision)
            dtype = torch.bfloat16 if half else torch.float32
            features = {depth: value.to(dtype) for depth, value in states.items()}
            pictures = self._decode(inputs.latent_mean.float())
            looks, drawn = [], []
            for ids in inputs.query_ids.unbind(1):
                z_q = self.learner.texts(ids)
                looks.append(self._looks(ids, z_q, features))
                tokens = self.learner.adapter.encoder(z_q, features).tokens
                drawn.append(self._sample(z_q, tokens, inputs.noise))
            alone = self._sample(self.learner.texts(inputs.query_ids[:, 0]), None, inputs.noise)
        rows = []
        for i, picture in enumerate(pictures):
            a, b = (self._told(ids) for ids in inputs.query_ids[i])
            cells = [
                grid.Cell(picture, self._told(inputs.prompt_ids[i])),
                grid.Cell(overlay(picture, looks[0][i]), f"A: “{a}”", "a"),
                grid.Cell(drawn[0][i], f"“{a}”", "a"),
                grid.Cell(alone[i], f"“{a}”"),
                grid.Cell(overlay(picture, looks[1][i]), f"B: “{b}”", "b"),
                grid.Cell(drawn[1][i], f"“{b}”", "b"),
            ]
            rows.append(cells if a != b else [*cells[:4], grid.Cell(), grid.Cell()])
        weights = ", weights averaged over time" if self.learner.ema else ""
        note = (
            f"{cfg.sample_denoising} DDIM steps, guidance {cfg.sample_guidance:g} rescaled by "
            f"{cfg.sample_guidance_rescale:g}{weights}"
        )
        return grid.draw(_TITLES, rows, f"{self.learner.stage.name}, step {step:,}", note)

    def _sample(self, z_q: Tensor, tokens: Tensor | None, noise: Tensor) -> list[Image.Image]:
        """The query as the prompt, with the subject or (no tokens) without."""
        guidance = self.cfg.sample_guidance
        empty = self._pipe.tokenizer(
            "",
            padding="max_length",
            truncation=True,  # the read-ahead thread uses the same tokenizer, which keeps it
            max_length=z_q.shape[1],
            return_tensors="pt",
        ).input_ids.to(noise.device)
        factor = self._pipe.vae_scale_factor
        with self.learner.module.showing(tokens, guided=guidance > 1):
            return list(
                self._pipe(
                    prompt_embeds=z_q,
                    negative_prompt_embeds=self.learner.texts(empty).expand_as(z_q),
                    latents=noise.clone(),
                    height=noise.shape[2] * factor,
                    width=noise.shape[3] * factor,
                    num_inference_steps=self.cfg.sample_denoising,
                    guidance_scale=guidance,
                    guidance_rescale=self.cfg.sample_guidance_rescale,
                ).images
            )

    def _looks(self, ids: Tensor, z_q: Tensor, features: dict[int, Tensor]) -> list[Tensor]:
        """Where the aligner looks for each query: (rows, columns) of patches, mean over its words
        and over heads.
        """
        attention = self.learner.adapter.encoder.aligner(z_q, features[max(features)])
        patches = attention.float().mean(1)[:, :, 1:].cpu()
        side = math.isqrt(patches.shape[2])
        words = real_tokens(self._pipe.tokenizer, ids).cpu()
        return [
            patches[i, words[i]].mean(0).unflatten(0, (side, side)) for i in range(len(patches))
        ]

    def _decode(self, latents: Tensor) -> list[Image.Image]:
        """Pictures of latents (B, C, h, w) as the VAE's encoder gives them, not scaled."""
        decoded = self._pipe.vae.decode(latents, return_dict=False)[0]
        return list(self._pipe.image_processor.postprocess(decoded, output_type="pil"))

    def _told(self, ids: Tensor) -> str:
        text = str(self._pipe.tokenizer.decode(ids.tolist(), skip_special_tokens=True)).strip()
        return text or "(no words)"


def _pipeline(learner: Learner) -> Any:
    """diffusers' pipeline around the models that training has, and the VAE."""
    frozen = learner.frozen
    if frozen.load_vae is None:
        raise UserError("the base model's VAE is not at hand")
    vae = frozen.load_vae()
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    pipe = StableDiffusionPipeline(
        vae=vae.to(learner.world.device).requires_grad_(False),
        text_encoder=frozen.text_encoder,
        tokenizer=frozen.tokenizer,
        unet=frozen.unet,
        scheduler=DDIMScheduler.from_config(frozen.scheduler.config),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    vae.enable_slicing()  # a picture at a time: training has the memory
    return pipe
