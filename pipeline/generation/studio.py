"""jobs/generate.py, whole: references in, grid and pictures in storage out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from pipeline import models
from pipeline.config import GenerateConfig
from pipeline.errors import UserError
from pipeline.evaluation import benches
from pipeline.generation import png, scenes
from pipeline.generation.gallery import FOLDER, Gallery
from pipeline.generation.references import read_references
from pipeline.generation.sampler import Sampler, model_folder, model_identity
from pipeline.storage import Storage

GRID = "grid.png"


@dataclass(frozen=True)
class Made:
    """What a run left behind: the grid's path under the root, and how many pictures."""

    grid: str
    pictures: int


def generate(cfg: GenerateConfig, storage: Storage, say: Callable[[str], None]) -> Made:
    """Draw what cfg asks for; a held-out grid that is there already is not drawn twice."""
    references = read_references(cfg)
    if not cfg.image:
        _refuse_without_image(cfg)
    elif not (cfg.prompt or "").strip():
        raise UserError('prompt: missing; say what to draw, for example --prompt "a cup on snow"')
    with model_folder(storage, cfg.model) as folder:
        settings = _settings(cfg, folder)
        if not references and _is_drawn(storage, settings):
            say(f"{storage.url(GRID)} is up to date: nothing to draw")
            return Made(GRID, int(settings["pictures"]))
        sampler = Sampler.load(folder, cfg, cfg)
    note = (
        f"{cfg.steps} DDIM steps, guidance {cfg.guidance:g} rescaled by {cfg.guidance_rescale:g}, "
        f"subject scale {cfg.scale:g}, seed {cfg.seed}"
    )
    counts = ("references", "pictures")  # of the grid; they shape no single picture
    gallery = Gallery(storage, {k: v for k, v in settings.items() if k not in counts})
    if references:
        assert cfg.prompt is not None
        name, grid = scenes.own(sampler, references, cfg.prompt, cfg.scale, cfg.seed, note, gallery)
        path = f"{FOLDER}/{name}-grid.png"
    else:
        bench = benches.mini_bench(cfg.references, sampler.side)
        say(f"drawing {scenes.PICTURES_PER_REFERENCE} pictures for each of {len(bench)} references")
        grid, path = scenes.held_out(sampler, bench, cfg.scale, cfg.seed, note, gallery), GRID
    # the grid last: it says that its pictures are there
    storage.write_bytes(path, png.encode(grid, settings))
    return Made(path, len(gallery.names))


def _settings(cfg: GenerateConfig, folder: str) -> dict[str, Any]:
    """Everything that shapes the pictures, with the weights as hashes."""
    settings = asdict(cfg)
    for key in (
        "root",
        "device",
        "model",
        "models",
        "image",
        "query",
        "mask",
        "scales",
        "region",
        "prompt",
    ):
        del settings[key]
    if cfg.image:
        del settings["references"]
    else:
        settings["pictures"] = cfg.references * scenes.PICTURES_PER_REFERENCE
    return {
        **settings,
        "model": model_identity(folder),
        "base": models.identity(cfg.models.base, "unet", cfg.models.revision),
        "vision": models.identity(cfg.models.vision, "", cfg.models.revision),
    }


def _is_drawn(storage: Storage, settings: dict[str, Any]) -> bool:
    return storage.exists(GRID) and png.made_by(storage.read_bytes(GRID)) == settings


def _refuse_without_image(cfg: GenerateConfig) -> None:
    for name in ("query", "mask", "scales", "region", "prompt"):
        if getattr(cfg, name):
            raise UserError(f"{name}: given without an image; add --image, or leave it out")
