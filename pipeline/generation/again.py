"""A picture drawn once more, from what it holds, and compared with what it was."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any, get_args

import numpy as np
from PIL import Image

from pipeline.config import GenerateConfig
from pipeline.config.shared import Precision
from pipeline.errors import UserError
from pipeline.generation import gallery, grid, png
from pipeline.generation.identities import identities
from pipeline.generation.recipe import Recipe, rebuild
from pipeline.generation.sampler import Sampler, model_folder
from pipeline.generation.scenes import beside_references
from pipeline.progress import Progress, say
from pipeline.storage import Storage

_MOST_BYTES = 256 << 20
"""Of a picture with all that it was drawn from."""
_ITS_OWN = (
    "image", "query", "mask", "scales", "region", "prompt", "negative_prompt", "pictures", "width",
    "height", "control", "control_scale", "scale", "seed",
)  # fmt: skip
_GIVE = {"model": "--model", "base": "--models.base", "vision": "--models.vision"}
_CALLED = {"model": "the SSR-Encoder", "base": "the base model", "vision": "the CLIP"}


def draw_again(cfg: GenerateConfig, storage: Storage, progress: Progress) -> str:
    """Draw the picture that cfg.from_ names into generate/<name>-again.png, say how far apart the
    two are, and return the path of a grid of both.

    Raises UserError for a file that is no picture of ours, for models that are not the ones that
    drew it, and for settings that are the picture's own.
    """
    _refuse_beside(cfg)
    url = cfg.from_ or ""
    before, said, recipe = _read(url)
    if recipe.control is None:
        cfg = replace(cfg, controlnet=None)
    elif cfg.controlnet is None:
        raise UserError(
            f"from: {url} was drawn with the ControlNet {_named(said.get('controlnet'))}; "
            "name it with --controlnet"
        )
    precision: Precision = said["dtype"] if said.get("dtype") in get_args(Precision) else cfg.dtype
    with model_folder(storage, cfg.model) as folder:
        drawn_by = identities(cfg, folder)
        _refuse_others(url, said, drawn_by)
        sampler = Sampler.load(folder, cfg, precision=precision, controlnet=cfg.controlnet)
    size = recipe.size or (sampler.side, sampler.side)
    if before.size != size:
        raise UserError(
            f"from: {url} is {before.width}x{before.height}, and was drawn {size[0]}x"
            f"{size[1]}: it was edited; give it as it was drawn"
        )
    name = f"{PurePosixPath(url).stem}-again"
    say(f"again: {recipe.steps} steps, seed {recipe.seed}")  # no words of another's file
    storage.delete(gallery.path(name))  # of another time: it would be taken as it is
    kept = gallery.Gallery(storage, {**drawn_by, "dtype": precision})
    (after,) = kept.pictures([(name, recipe)], sampler.make, 1, progress).values()
    apart = _apart(before, after)
    say(f"again: {apart}")
    cells = [grid.Cell(before, "the picture that was given"), grid.Cell(after, apart, "a")]
    sheet = beside_references(sampler, recipe, ["As it was", "Drawn again"], [cells])
    path = gallery.path(f"{name}-grid")
    storage.write_bytes(path, png.encode(sheet, {**kept.drawn_by, "pictures": [name]}))
    return path


def _refuse_beside(cfg: GenerateConfig) -> None:
    plain = GenerateConfig()
    given = [name for name in _ITS_OWN if getattr(cfg, name) != getattr(plain, name)]
    if given:
        raise UserError(
            f"from: the picture says all that shapes it; leave out --{', --'.join(given)}"
        )


def _read(url: str) -> tuple[Image.Image, dict[str, Any], Recipe]:
    """The picture, what it says of itself, and its recipe."""
    storage, name = Storage.for_path(url)
    if not storage.is_file(name):
        raise UserError(f"from: {url}: no such picture; check the path")
    size = storage.size(name)
    if size > _MOST_BYTES:
        raise UserError(f"from: {url} has {size:,} bytes; more than {_MOST_BYTES:,} are not read")
    data = storage.read_bytes(name)
    said = png.made_by(data)
    if said is None:
        raise UserError(
            f"from: {url} does not say how it was made; give a PNG of this job, of the service or "
            "of its page, as it was saved"
        )
    if "recipe" not in said:
        raise UserError(f"from: {url} is no single picture; {_single(said)}")
    try:
        picture = png.picture(data).convert("RGB")
    except ValueError as error:
        raise UserError(f"from: {url}: {error}; give the picture as it was saved") from None
    try:
        return picture, said, rebuild(said["recipe"], png.sources(data))
    except UserError as error:
        raise UserError(f"from: {url}: {error}") from None


def _single(said: Mapping[str, Any]) -> str:
    names = said.get("pictures")
    if not isinstance(names, list) or not names:
        return "give one of those in generate/"
    return (
        f"it is a grid of those in {gallery.FOLDER}/: give one, such as {str(names[0])[:100]}.png"
    )


def _refuse_others(url: str, said: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Refuse models that did not draw the picture."""
    for part, its in here.items():
        if _sha256(said.get(part)) != _sha256(its):
            raise UserError(
                f"from: {url} was drawn by {_CALLED.get(part, 'the ControlNet')} "
                f"{_named(said.get(part))}, not by {_named(its)}, which is what is here; give "
                f"{_GIVE.get(part, '--controlnet')}: the hub id or the folder of that one"
            )


def _sha256(identity: object) -> object:
    return identity.get("sha256") if isinstance(identity, Mapping) else identity


def _named(identity: object) -> str:
    """A model as people know it: its name, and the first digits of its weights' hash."""
    name = f"{identity.get('name')} " if isinstance(identity, Mapping) else ""
    return f"{name[:100]}(sha256 {str(_sha256(identity))[:12]})"


def _apart(before: Image.Image, after: Image.Image) -> str:
    difference = np.abs(np.asarray(before, np.int16) - np.asarray(after, np.int16))
    if not difference.any():
        return "the same, pixel for pixel"
    return (
        f"not the same: pixels differ by {difference.max()} of 255 at most, by "
        f"{difference.mean():.2g} on average; another device, other versions of the libraries, or "
        "a batch of another size do that"
    )
