"""A recipe to take along: as JSON, as Python for diffusers, and as a command of this repository."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any

from pipeline.config.serve import ServeConfig
from pipeline.generation import png
from pipeline.generation.recipe import Recipe, Region

_CONTROL = "control.png"


def files(recipe: Recipe) -> dict[str, bytes]:
    """The pictures that the snippet and the command read, PNG by file name."""
    found = {}
    for number, subject in enumerate(recipe.subjects, start=1):
        found[_picture(number)] = png.encode(subject.image, quick=True)
        if subject.mask is not None:
            found[_mask(number)] = png.encode(subject.mask, quick=True)
    if recipe.control is not None:
        found[_CONTROL] = png.encode(recipe.control, quick=True)
    return found


def as_json(recipe: Recipe, models: Mapping[str, Any]) -> str:
    """All that shapes the picture; of pictures and models, the hashes."""
    return json.dumps({"recipe": recipe.describe(), **models}, indent=2, default=str)


def as_python(recipe: Recipe, cfg: ServeConfig) -> str:
    """A script that draws the recipe with diffusers, the files beside it."""
    regions = any(subject.region is not None for subject in recipe.subjects)
    beside = ", ".join(files(recipe))
    lines = [f"# Beside this file: {beside}"] if beside else []
    lines += ["import numpy as np"] if regions else []
    lines += ["import torch", f"from diffusers import {', '.join(_classes(recipe))}"]
    lines += ["from PIL import Image"] if beside else []
    lines += ["", "from pipeline import models"]
    lines += ["from ssr_model import SSREncoder, Subject"] if recipe.subjects else []
    where = model(cfg)
    if "://" in where:
        lines += ["", f"# model: a copy of {where}"]
        where = "model"
    lines += _load_base(recipe, cfg)
    if recipe.subjects:
        dtype = "" if cfg.dtype == "float32" else f", dtype=torch.{cfg.dtype}"
        lines += [
            f"clip = models.resolve({cfg.models.vision!r})",
            "ssr = SSREncoder.from_pretrained(",
            f"    {where!r}, vision=clip, base=pipe, device=device{dtype}",
            ")",
            "ssr.attach(pipe)",
            "",
        ]
    if regions:
        lines += [
            "",
            "def region(left, top, right, bottom, cells=256):",
            '    """Where in the picture a subject may act, as shares of its sides."""',
            "    allowed = np.zeros((cells, cells), np.float32)",
            "    edges = [round(edge * cells) for edge in (left, top, right, bottom)]",
            "    allowed[edges[1] : max(edges[3], edges[1] + 1),",
            "            edges[0] : max(edges[2], edges[0] + 1)] = 1",
            "    return allowed",
            "",
            "",
        ]
    if recipe.subjects:
        lines += ["subjects = ["]
        for number, subject in enumerate(recipe.subjects, start=1):
            asked = [f'Image.open("{_picture(number)}")']
            asked += [f"query={subject.query!r}"] if subject.query else []
            asked += [f'mask=Image.open("{_mask(number)}")'] if subject.mask is not None else []
            asked += [f"scale={subject.scale!r}"] if subject.scale != 1 else []
            asked += [f"region=region({_edges(subject.region)})"] if subject.region else []
            lines += [f"    Subject({', '.join(asked)}),"]
        lines += ["]"]
    else:
        lines += [""]
    return "\n".join([*lines, *_call(recipe)]) + "\n"


def _classes(recipe: Recipe) -> list[str]:
    """Of diffusers; the last one is the pipeline's."""
    if recipe.control is None:
        return ["DDIMScheduler", "StableDiffusionPipeline"]
    return ["ControlNetModel", "DDIMScheduler", "StableDiffusionControlNetPipeline"]


def _load_base(recipe: Recipe, cfg: ServeConfig) -> list[str]:
    revision = f", revision={cfg.models.revision!r}" if cfg.models.revision else ""
    dtype = f"torch_dtype=torch.{cfg.dtype}"
    lines = [
        "",
        'device = "cuda" if torch.cuda.is_available() else "cpu"',
        f"base = models.resolve({cfg.models.base!r})",
    ]
    controlnet = ""
    if recipe.control is not None:
        lines += [f"net = ControlNetModel.from_pretrained({cfg.controlnet!r}, {dtype})"]
        controlnet = ", controlnet=net"
    return [
        *lines,
        f"pipe = {_classes(recipe)[-1]}.from_pretrained(",
        f"    base, {dtype}, safety_checker=None{revision}{controlnet}",
        ")",
        "pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)",
        "pipe.to(device)",
    ]


def _call(recipe: Recipe) -> list[str]:
    before, more = list[str](), list[str]()
    if recipe.negative_prompt:
        more += [f"    negative_prompt={recipe.negative_prompt!r},"]
    if recipe.size is not None:
        more += [f"    width={recipe.size[0]},", f"    height={recipe.size[1]},"]
    if recipe.control is not None:
        size = repr(recipe.size)
        if recipe.size is None:
            before, size = (
                ["side = pipe.unet.config.sample_size * pipe.vae_scale_factor"],
                "(side, side)",
            )
        more += [
            f'    image=Image.open("{_CONTROL}").resize({size}),',
            f"    controlnet_conditioning_scale={recipe.control_scale!r},",
        ]
    more += ["    **ssr.condition(subjects),"] if recipe.subjects else []
    return [
        *before,
        "image = pipe(",
        f"    {recipe.prompt!r},",
        f"    num_inference_steps={recipe.steps},",
        f"    guidance_scale={recipe.guidance!r},",
        f"    guidance_rescale={recipe.guidance_rescale!r},",
        f'    generator=torch.Generator("cpu").manual_seed({recipe.seed}),',
        *more,
        ").images[0]",
        'image.save("picture.png")',
    ]


def as_command(recipe: Recipe, cfg: ServeConfig) -> str:
    """`jobs/generate.py` with the recipe's settings; "" for none without subjects: it has its
    own references then.
    """
    if not recipe.subjects:
        return ""
    subjects = recipe.subjects
    numbers = range(1, len(subjects) + 1)
    said: list[tuple[str, Any]] = [("root", cfg.root)]
    said += [("model", cfg.model)] if cfg.model else []
    said += [("models.base", cfg.models.base), ("models.vision", cfg.models.vision)]
    said += [("models.revision", cfg.models.revision)] if cfg.models.revision else []
    said += [("image", [_picture(n) for n in numbers])]
    if any(s.query for s in subjects):
        said += [("query", [s.query or "" for s in subjects])]
    if any(s.mask is not None for s in subjects):
        masks = [
            _mask(n) if s.mask is not None else "" for n, s in zip(numbers, subjects, strict=True)
        ]
        said += [("mask", masks)]
    said += [("scales", [s.scale for s in subjects])]
    if any(s.region for s in subjects):
        said += [("region", [_edges(s.region, ",") for s in subjects])]
    said += [("prompt", recipe.prompt)]
    said += [("negative_prompt", recipe.negative_prompt)] if recipe.negative_prompt else []
    said += [
        ("seed", recipe.seed),
        ("steps", recipe.steps),
        ("guidance", recipe.guidance),
        ("guidance_rescale", recipe.guidance_rescale),
    ]
    said += zip(("width", "height"), recipe.size, strict=True) if recipe.size else []
    if recipe.control is not None:
        said += [("control", _CONTROL), ("controlnet", cfg.controlnet)]
        said += [("control_scale", recipe.control_scale)]
    options = [_option(name, value) for name, value in said]
    return " \\\n  ".join(["python jobs/generate.py", *options]) + "\n"


def model(cfg: ServeConfig) -> str:
    """Where the trained SSR-Encoder is."""
    return cfg.model or f"{cfg.root.rstrip('/')}/model"


def _option(name: str, value: Any) -> str:
    if not isinstance(value, list):
        return shlex.quote(f"--{name}={value}")
    words = [str(each) for each in value]
    if any(word.startswith(("-", "[")) for word in words):  # no option and no list: as one word
        return shlex.quote(f"--{name}={json.dumps(value)}")
    return " ".join([f"--{name}", *map(shlex.quote, words)])


def _edges(region: Region | None, between: str = ", ") -> str:
    return "" if region is None else between.join(repr(edge) for edge in region)


def _picture(number: int) -> str:
    return f"subject-{number}.png"


def _mask(number: int) -> str:
    return f"subject-{number}-mask.png"
