"""A subject's card on the page: picture, painted mask and query, as one value of the browser.

The value is JSON with data URLs (page_card.js): the page sends no files and knows no addresses. The
control image is one, too, with neither mask nor query (page_control.js).
"""

from __future__ import annotations

import base64
import binascii
import io
import json
from dataclasses import asdict, dataclass
from pathlib import Path, PurePath
from typing import Any

import gradio as gr
from PIL import Image

from pipeline.config.serve import LimitsConfig
from pipeline.errors import UserError
from pipeline.generation import png
from pipeline.generation.recipe import Reference, Region
from pipeline.generation.references import UPLOADED, bounded, open_picture, reference
from pipeline.serving.uploads import stem

_HERE = Path(__file__)
_PNG = "data:image/png;base64,"
_NAME = 80
"""Characters of a file's name that are kept."""


@dataclass(frozen=True)
class Card:
    """What a card holds; "" = nothing."""

    name: str = ""
    """What people call the picture."""
    image: str = ""
    """A data URL."""
    mask: str = ""
    """A data URL: white where it was painted, black elsewhere, of the picture's size."""
    query: str = ""

    @property
    def empty(self) -> bool:
        return not (self.image or self.query.strip())

    def write(self) -> str:
        """As the browser takes it."""
        return json.dumps(asdict(self))

    def write_picture(self) -> str:
        """The same, silent about the query: the browser keeps the one that it has."""
        return json.dumps({"name": self.name, "image": self.image, "mask": self.mask})

    def picture(self, limits: LimitsConfig) -> Image.Image:
        """RGB, upright, of bounded size."""
        return bounded(opened(self.image, self.name or "the picture", limits))

    def painted(self, limits: LimitsConfig) -> Image.Image:
        """The mask, mode L."""
        return opened(self.mask, "the mask", limits).convert("L")

    def reference(
        self, limits: LimitsConfig, scale: float = 1.0, region: Region | None = None
    ) -> Reference:
        """Raises UserError for a card that selects nothing."""
        if len(self.query) > limits.text:
            raise UserError(f"query: more than {limits.text} characters; a word or two do")
        if not self.image:
            raise UserError("no picture; drop one on the card, or remove the subject")
        return reference(
            self.picture(limits),
            self.name or "reference",
            query=self.query,
            mask=self.painted(limits) if self.mask else None,
            mask_name="the mask",
            scale=scale,
            region=region,
        )


def read_card(value: Any) -> Card:
    """A card as the browser sent it. Raises UserError for anything else."""
    try:
        said = json.loads(value or "{}")
        card = Card(**said)
        if not all(isinstance(each, str) for each in asdict(card).values()):
            raise ValueError
    except (ValueError, TypeError, RecursionError):
        raise UserError("the card's value is broken; load the page anew") from None
    return card


def uploaded(name: str, image: str, limits: LimitsConfig) -> Card:
    """A card with a new picture: decoded, turned upright, bounded, and kept as PNG."""
    name = PurePath(name).name[-_NAME:] or "picture"
    picture = bounded(opened(image, name, limits))
    return Card(stem(name), shown(picture))


def opened(url: str, name: str, limits: LimitsConfig) -> Image.Image:
    """The picture in a data URL. Raises UserError for what is none, and for any other URL."""
    head, comma, data = url.partition(",")
    if not (comma and head.startswith("data:") and head.endswith(";base64")):
        raise UserError(f"{name}: not an uploaded picture; drop the file itself, not its address")
    try:
        raw = base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise UserError(f"{name}: the upload is broken; choose the picture again") from None
    if len(raw) > limits.upload_mib * 2**20:
        raise UserError(f"{name}: more than {limits.upload_mib} MiB; make it smaller")
    return open_picture(name, io.BytesIO(raw), limits.pixels, UPLOADED)


def shown(image: Image.Image) -> str:
    """The picture as a data URL."""
    return data_url(png.encode(image, quick=True))


def data_url(data: bytes) -> str:
    """PNG bytes as an address that holds them."""
    return _PNG + base64.b64encode(data).decode()


def card_component(number: int, limits: LimitsConfig) -> gr.HTML:
    """The card of the page's `number`th subject; its events are `upload` and `look`."""
    return _component("page_card", f"card-{number}", limits, number=number, text=limits.text)


def control_component(limits: LimitsConfig) -> gr.HTML:
    """The card of the control image; its event is `upload`."""
    return _component("page_control", "control", limits)


def _component(kind: str, elem_id: str, limits: LimitsConfig, **told: Any) -> gr.HTML:
    scripts = ("page_upload.js", f"{kind}.js")
    return gr.HTML(
        value=Card().write(),
        html_template=_HERE.with_name(f"{kind}.html").read_text(),
        js_on_load="\n".join(_HERE.with_name(each).read_text() for each in scripts),
        apply_default_css=False,
        elem_id=elem_id,
        # base64 takes four bytes for three, and the rest of the request its own
        most_bytes=int(limits.upload_mib * 2**20 * 0.7),
        **told,
    )
