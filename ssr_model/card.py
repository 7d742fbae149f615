"""The model card of a saved SSR-Encoder: what it is, what it stands on, how to use it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from ssr_model.encoder import SSRAdapter

_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
_ELSEWHERE = ("format", "variant", "license")  # not in the table of facts
_CARD = """\
---
{front}
---

# SSR-Encoder

A selective subject representation encoder ([arXiv 2312.16272](https://arxiv.org/abs/2312.16272)):
it takes the subject that a text query or a mask names out of a reference image, and a Stable
Diffusion pipeline draws it anew.

| | |
| --- | --- |
{rows}

## Use

It takes the package `ssr_model` (of SSR on Ray: `pip install .` in a clone of its repository).

```python
from diffusers import DDIMScheduler, DiffusionPipeline
from PIL import Image
from ssr_model import SSREncoder, Subject

pipe = DiffusionPipeline.from_pretrained({base})
pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
ssr = SSREncoder.from_pretrained({name}, vision={vision}, base=pipe)
ssr.attach(pipe)
cup = Subject(Image.open("photo.jpg"), query="cup", scale=1.0)
image = pipe("a cup on the beach", num_inference_steps=30, guidance_scale=7.5,
             **ssr.condition([cup])).images[0]
```
{missing}
The query is a noun phrase of what the photo shows; `mask=` (nonzero at the subject) does in its
place. A smaller `scale` leaves the prompt more to say, and 0 leaves the subject out.

`model.safetensors` holds the trainable tensors alone: the token-to-patch aligner, the projections
of the scales and the subject's keys and values of the U-Net's cross-attention. The base model and
the vision model are not in it, and have licences of their own; the subject's keys and values begin
as copies of the base model's.

## Limits

It draws with the base model, and has its limits and biases, and those of the pairs of images and
captions that it was trained on. It fits this base model and this vision model, and their
fine-tunes, only. What it draws of a person's photo is a picture of a person: ask them. How well it
selects is measured by `jobs/evaluate.py` of SSR on Ray; this card states no figures.
"""
_MISSING = """\

The {what} of training had no name on the hub, so it is not named here: put its own in its place.
"""


def is_hub_id(name: str) -> bool:
    """Whether a name has the form owner/name; a folder may have it too."""
    return _HUB_ID.fullmatch(name) is not None


def model_card(
    adapter: SSRAdapter,
    said: Mapping[str, str],
    name: str | None = None,
    revision: str | None = None,
) -> str:
    """Markdown with the hub's front matter.

    said: what the weights file says of itself (base_model, vision_model, license, stage, ...).
    name: hub id that the model is loaded by; None = not known yet.
    revision: branch of it that the model lies on; None = main.
    """
    config = adapter.config
    front = ["library_name: diffusers", "pipeline_tag: text-to-image"]
    base = said.get("base_model", "")
    if is_hub_id(base):
        front += [f"base_model: {json.dumps(base)}", "base_model_relation: adapter"]
    front += _license(said.get("license"), base)
    front += ["tags:", "- ssr-encoder", "- subject-driven-generation"]
    facts = {
        "variant": config.variant,
        **{key: value for key, value in said.items() if key not in _ELSEWHERE},
        "scales (vision depths)": ", ".join(map(str, config.depths)),
        "unconditional subject": config.unconditional,
        "cross-attention layers": str(len(config.layers)),
        "trainable parameters": f"{sum(p.numel() for p in adapter.parameters()):,}",
    }
    unnamed = [key.replace("_", " ") for key in ("base_model", "vision_model") if not said.get(key)]
    rows = [f"| {_cell(key)} | {_cell(value)} |" for key, value in facts.items()]
    return _CARD.format(
        front="\n".join(front),
        rows="\n".join(rows),
        name=_loaded(name, revision),
        missing=_MISSING.format(what=" and the ".join(unnamed)) if unnamed else "",
        base=json.dumps(base or "BASE_MODEL"),
        vision=json.dumps(said.get("vision_model", "VISION_MODEL")),
    )


def _loaded(name: str | None, revision: str | None) -> str:
    if not name:
        return "FOLDER_OR_HUB_ID"
    return json.dumps(name) + (f", revision={json.dumps(revision)}" if revision else "")


def _license(name: str | None, base: str) -> list[str]:
    """The weights are made from the base model's, so its licence is theirs unless one is named."""
    if name:
        return [f"license: {json.dumps(name)}"]
    told = ["license: other", "license_name: as-base-model"]
    link = f"https://huggingface.co/{base}"
    return [*told, f"license_link: {json.dumps(link)}"] if is_hub_id(base) else told


def _cell(text: str) -> str:
    """One line of a table's cell, whatever the text holds."""
    return " ".join(str(text).split()).replace("|", "\\|").replace("`", "'")
