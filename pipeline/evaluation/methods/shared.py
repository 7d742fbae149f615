"""What methods that draw with a Stable Diffusion pipeline have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from PIL import Image

from pipeline import models
from pipeline.config import EvaluateConfig
from pipeline.errors import UserError
from pipeline.evaluation.benches import Request
from pipeline.generation import batches


def denoising(cfg: EvaluateConfig) -> dict[str, Any]:
    """Settings that shape whatever a pipeline draws: the base model's parts, each with what is
    read with it (scheduler, tokenizer), and how it is sampled.
    """
    base, revision = cfg.models.base, cfg.models.revision
    return {
        "base": models.identity(base, "unet", revision),
        "vae": models.identity(base, "vae", revision),
        "text_encoder": models.identity(base, "text_encoder", revision),
        "steps": cfg.steps,
        "guidance": cfg.guidance,
        "guidance_rescale": cfg.guidance_rescale,
    }


def refuse_changed(
    name: str, where: str, settings: Mapping[str, Any], found: Mapping[str, Any]
) -> None:
    """Refuse a model that is no longer what the method's settings say: results would be called by
    the weights of another.
    """
    if any(settings[key] != value for key, value in found.items()):
        raise UserError(
            f"{name}: {where} is not what it was when the evaluation began (trained on, or another "
            "version here); run again to evaluate what is there now"
        )


def in_batches(
    requests: Sequence[Request],
    size: int,
    draw: Callable[[Sequence[Request]], list[Image.Image]],
    count: Callable[[Request], int] = lambda request: len(request.selections),
) -> list[Image.Image]:
    """Pictures of the requests in their order, drawn `size` at most at a time: each batch of
    requests of one `count`, by default of as many selected subjects.
    """
    return batches.in_batches(requests, size, draw, count)


def whole_images(request: Request) -> list[Image.Image]:
    """The first image of each reference of a request, for methods that select nothing."""
    references = {id(s.reference): s.reference for s in request.selections}
    return [reference.image for reference in references.values()]
