"""jobs/generate.py, whole: references in, grid and pictures in storage out."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from PIL import Image

from pipeline import models
from pipeline.config import GenerateConfig
from pipeline.errors import UserError
from pipeline.generation import png
from pipeline.generation.again import draw_again
from pipeline.generation.gallery import Gallery
from pipeline.generation.identities import identities
from pipeline.generation.recipe import check_denoising
from pipeline.generation.references import bounded, open_picture, read_references
from pipeline.generation.sampler import Sampler, model_folder
from pipeline.generation.scenes import HeldOut, Own, Scene
from pipeline.progress import Progress, say
from pipeline.storage import Storage


@dataclass(frozen=True)
class Made:
    """What a run left behind: the grid's path under the root, and how many pictures."""

    grid: str
    pictures: int


def generate(cfg: GenerateConfig, storage: Storage, progress: Progress) -> Made:
    """Draw what cfg asks for; what is there already is not drawn twice."""
    if cfg.from_ is not None:
        return Made(draw_again(cfg, storage, progress), 1)
    scene = _scene(cfg)
    with model_folder(storage, cfg.model) as folder:
        drawn_by = {**identities(cfg, folder), "dtype": cfg.dtype}
        about = _about(scene, drawn_by)
        if _is_drawn(storage, scene.path, about):
            say(f"{storage.url(scene.path)} is up to date: nothing to draw")
            return Made(scene.path, len(scene.wanted))
        sampler = Sampler.load(folder, cfg, precision=cfg.dtype, controlnet=cfg.controlnet)
    for size in {recipe.size for _, recipe in scene.wanted if recipe.size}:
        sampler.check_size(size)
    gallery = Gallery(storage, drawn_by)
    drawn = gallery.pictures(scene.wanted, sampler.make, cfg.batch, progress)
    # the grid last: it says that its pictures are there
    storage.write_bytes(scene.path, png.encode(scene.sheet(sampler, drawn), about))
    return Made(scene.path, len(scene.wanted))


def _scene(cfg: GenerateConfig) -> Scene:
    """What to draw; whatever can be refused without a model is refused here."""
    check_denoising(cfg)
    if not cfg.image:
        _refuse_without(cfg, "image", "query", "mask", "scales", "region", "prompt", "control")
        if cfg.pictures > 1:
            raise UserError("pictures: given without an image; add --image, or leave it out")
    elif not (cfg.prompt or "").strip():
        raise UserError('prompt: missing; say what to draw, for example --prompt "a cup on snow"')
    if not cfg.control:
        _refuse_without(cfg, "control", "controlnet")
    elif not cfg.controlnet:
        raise UserError(
            "control: no ControlNet to follow it; name one with --controlnet, or leave it out"
        )
    references, control = read_references(cfg), _control(cfg)
    side = models.side(cfg.models.base, cfg.models.revision)
    return Own(cfg, references, control, side) if references else HeldOut(cfg, side)


def _control(cfg: GenerateConfig) -> Image.Image | None:
    if not cfg.control:
        return None
    return bounded(open_picture(cfg.control))


def _about(scene: Scene, drawn_by: dict[str, Any]) -> dict[str, Any]:
    """What a grid says of itself: its pictures, and what shaped all of them."""
    recipes = json.dumps([recipe.describe() for _, recipe in scene.wanted], sort_keys=True)
    return {
        **drawn_by,
        "pictures": [name for name, _ in scene.wanted],
        "recipes": hashlib.sha256(recipes.encode()).hexdigest(),
    }


def _is_drawn(storage: Storage, path: str, about: dict[str, Any]) -> bool:
    return storage.exists(path) and png.made_by(storage.read_bytes(path)) == about


def _refuse_without(cfg: GenerateConfig, needed: str, *names: str) -> None:
    what = "an image" if needed == "image" else f"a {needed} image"
    for name in names:
        if getattr(cfg, name):
            raise UserError(f"{name}: given without {what}; add --{needed}, or leave it out")
