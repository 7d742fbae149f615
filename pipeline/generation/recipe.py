"""A picture as a question: all that it takes to draw it, and to draw it once more.

Every face (jobs/generate.py, the service, its page) asks in these words. A recipe goes into the PNG
that it made, its references with it (png.py): `rebuild` reads it out again.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from PIL import Image

from pipeline.errors import UserError
from pipeline.generation import png

if TYPE_CHECKING:
    from ssr_model.subject import Subject

Region = tuple[float, float, float, float]
"""Left, top, right, bottom: shares of the picture's width and height, from 0 to 1."""

_REGION_CELLS = 256
"""A region is drawn into a square of this side; the U-Net's layers are coarser."""
LARGEST_SIDE = 1024
"""Pixels of a reference, and of a control image; a larger one is reduced to it before it becomes
part of a recipe: CLIP sees a fraction of that.
"""
_LONGEST_DRAWN = 4096
"""Pixels: eight times the side of Stable Diffusion 1.5, whose memory grows with the square."""
_MOST_SUBJECTS = 16
_LONGEST_TEXT = 10_000
"""Of a recipe of unknown origin, characters; models read some hundred."""
LARGEST_SEED = 2**63 - 1


@dataclass(frozen=True, eq=False)
class Reference:
    """A subject in a picture: a text query selects it, or a mask, or both."""

    image: Image.Image
    """RGB, upright."""
    query: str | None = None
    mask: Image.Image | None = None
    """Mode L at the image's size, 255 on the subject."""
    name: str = "reference"
    """What people call the picture; it shapes nothing."""
    scale: float = 1.0
    """Weight of the subject (lambda of Eq. 4)."""
    region: Region | None = None
    """Where in the drawn picture the subject may act; none = everywhere."""

    def __post_init__(self) -> None:
        if not (self.query or "").strip() and self.mask is None:
            raise UserError(
                f"{self.name}: neither a query nor a mask says what to take; give one of them"
            )
        if not math.isfinite(self.scale):
            raise UserError(f"scale: {self.scale} is not a number; choose 0 to 1")
        if self.region is not None:
            check_region(self.region)

    def subject(self) -> Subject:
        """As the SSR-Encoder is asked for it."""
        from ssr_model.subject import Subject

        return Subject(
            self.image,
            query=self.query,
            mask=self.mask,
            scale=self.scale,
            region=None if self.region is None else _cells(self.region),
        )

    def sha256(self) -> str:
        """Of what is selected: the picture's pixels, the query, the mask."""
        parts = [repr(self.image.size).encode(), self.image.tobytes(), (self.query or "").encode()]
        parts.append(b"" if self.mask is None else self.mask.tobytes())
        return hashlib.sha256(b"\0".join(parts)).hexdigest()

    def describe(self) -> dict[str, Any]:
        """JSON-able; the pictures themselves by their hash."""
        return {
            "name": self.name,
            "query": self.query,
            "mask": self.mask is not None,
            "scale": self.scale,
            "region": None if self.region is None else list(self.region),
            "sha256": self.sha256(),
        }


class Denoising(Protocol):
    """How the noise is taken away: settings of a job, or a recipe."""

    @property
    def steps(self) -> int: ...
    @property
    def guidance(self) -> float: ...
    @property
    def guidance_rescale(self) -> float: ...


@dataclass(frozen=True, eq=False)
class Recipe:
    """One picture to draw. Raises UserError for what no picture can be drawn with."""

    prompt: str
    subjects: tuple[Reference, ...] = ()
    """None at all: the base model alone."""
    negative_prompt: str = ""
    seed: int = 0
    """Of the initial noise."""
    steps: int = 30
    """DDIM steps."""
    guidance: float = 7.5
    """Weight of classifier-free guidance; 1 and less = without."""
    guidance_rescale: float = 0.0
    """0 to 1, see GenerateConfig."""
    size: tuple[int, int] | None = None
    """Width and height, pixels; none = the base model's own square."""
    control: Image.Image | None = None
    """RGB, for the ControlNet; none = without one."""
    control_scale: float = 1.0
    """Weight of the ControlNet."""

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise UserError('prompt: missing; say what to draw, for example "a cup on snow"')
        if not 0 <= self.seed <= LARGEST_SEED:
            raise UserError(f"seed: {self.seed} is not within 0 to {LARGEST_SEED}")
        if len(self.subjects) > _MOST_SUBJECTS:
            raise UserError(f"{len(self.subjects)} subjects; at most {_MOST_SUBJECTS} are drawn")
        check_denoising(self)
        if not math.isfinite(self.control_scale):
            raise UserError(f"control_scale: {self.control_scale} is not a number; choose 0 to 1")
        if self.size is not None and min(self.size) < 1:
            raise UserError(f"size: {self.size[0]}x{self.size[1]} has no pixels")
        if self.size is not None and max(self.size) > _LONGEST_DRAWN:
            raise UserError(
                f"size: {self.size[0]}x{self.size[1]}; at most {_LONGEST_DRAWN} a side are drawn"
            )

    @property
    def alike(self) -> Hashable:
        """Recipes for which this is equal are drawn in one batch."""
        control = None if self.control is None else self.control_scale
        denoising = (self.steps, self.guidance, self.guidance_rescale)
        return (*denoising, self.size, len(self.subjects), control)

    def without_subjects(self) -> Recipe:
        """The same noise and words, and the base model alone: what scale 0 draws."""
        return replace(self, subjects=())

    def describe(self) -> dict[str, Any]:
        """JSON-able; of the pictures, the hashes."""
        return {
            "prompt": self.prompt,
            "subjects": [subject.describe() for subject in self.subjects],
            "negative_prompt": self.negative_prompt,
            "seed": self.seed,
            "steps": self.steps,
            "guidance": self.guidance,
            "guidance_rescale": self.guidance_rescale,
            "size": None if self.size is None else list(self.size),
            "control": None if self.control is None else _picture_sha256(self.control),
            "control_scale": self.control_scale,
        }

    def pictures(self) -> list[bytes]:
        """The references as PNG, a mask as their alpha channel, and last the control image."""
        found = [png.encode(_with_alpha(s.image, s.mask), quick=True) for s in self.subjects]
        if self.control is not None:
            found.append(png.encode(self.control, quick=True))
        return found


def rebuild(said: Mapping[str, Any], pictures: Sequence[bytes]) -> Recipe:
    """The recipe whose `describe()` and `pictures()` these are.

    Both come out of a file that anybody may have written: UserError for whatever does not fit.
    """
    try:
        told = list(said["subjects"])
        with_control = said["control"] is not None
        if len(pictures) != len(told) + with_control:
            raise ValueError(f"{len(told)} subjects, {len(pictures)} pictures")
        if len(told) > _MOST_SUBJECTS:  # before they are decoded
            raise ValueError(f"{len(told)} subjects")
        subjects = tuple(_reference(*each) for each in zip(told, pictures, strict=False))
        size = said["size"]
        recipe = Recipe(
            prompt=_text(said["prompt"]),
            subjects=subjects,
            negative_prompt=_text(said["negative_prompt"]),
            seed=_whole(said["seed"]),
            steps=_whole(said["steps"]),
            guidance=float(said["guidance"]),
            guidance_rescale=float(said["guidance_rescale"]),
            size=None if size is None else (_whole(size[0]), _whole(size[1])),
            control=_picture(pictures[-1]).convert("RGB") if with_control else None,
            control_scale=float(said["control_scale"]),
        )
    except (LookupError, TypeError, ValueError, OSError, OverflowError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:120]
        raise UserError(f"the picture's recipe is broken ({reason}); it cannot be remade") from None
    for subject, its in zip(recipe.subjects, told, strict=True):
        if subject.sha256() != its.get("sha256"):
            raise UserError(f"the reference {subject.name!r} is not the one it was drawn from")
    if recipe.control is not None and _picture_sha256(recipe.control) != said["control"]:
        raise UserError("the control image is not the one it was drawn from")
    return recipe


def check_denoising(asked: Denoising) -> None:
    """Refuse what no picture can be drawn with."""
    if asked.steps < 1:
        raise UserError(f"steps: {asked.steps} is less than 1; choose 20 to 50")
    if not math.isfinite(asked.guidance):
        raise UserError(f"guidance: {asked.guidance} is not a number; choose 1 to 15")
    if not 0 <= asked.guidance_rescale <= 1:
        raise UserError(f"guidance_rescale: {asked.guidance_rescale} is not within 0 to 1")


def check_region(region: Region) -> None:
    """Refuse what is no part of a picture."""
    left, top, right, bottom = region
    if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
        raise UserError(
            f"region: {', '.join(f'{edge:g}' for edge in region)} is no part of the picture; give "
            "left, top, right, bottom from 0 to 1, such as 0, 0, 0.5, 1 for its left half"
        )


def read_region(text: str) -> Region | None:
    """`left,top,right,bottom` as shares of the picture; '' = everywhere."""
    if not text.strip():
        return None
    try:
        edges = tuple(float(part) for part in text.split(","))
    except ValueError:
        edges = ()
    if len(edges) != 4:
        raise UserError(
            f"region: {text!r} is not four numbers; give left,top,right,bottom from 0 to 1"
        )
    check_region(edges)
    return edges


def _cells(region: Region) -> np.ndarray:
    cells = np.zeros((_REGION_CELLS, _REGION_CELLS), np.float32)
    left, top, right, bottom = (round(edge * _REGION_CELLS) for edge in region)
    cells[top : max(bottom, top + 1), left : max(right, left + 1)] = 1
    return cells


def _with_alpha(image: Image.Image, mask: Image.Image | None) -> Image.Image:
    if mask is None:
        return image
    both = image.copy()
    both.putalpha(mask)
    return both


def _reference(said: Mapping[str, Any], picture: bytes) -> Reference:
    image = _picture(picture)
    region = said["region"]
    if region is not None:
        left, top, right, bottom = (float(edge) for edge in region)
        region = left, top, right, bottom
    return Reference(
        image=image.convert("RGB"),
        query=None if said["query"] is None else _text(said["query"]),
        mask=image.getchannel("A") if said["mask"] else None,
        name=_text(said["name"]),
        scale=float(said["scale"]),
        region=region,
    )


def _picture(data: bytes) -> Image.Image:
    """Not larger than any that a recipe was made of: sixteen of them must fit into memory."""
    return png.picture(data, LARGEST_SIDE**2)


def _picture_sha256(image: Image.Image) -> str:
    return hashlib.sha256(repr(image.size).encode() + b"\0" + image.tobytes()).hexdigest()


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is no text")
    if len(value) > _LONGEST_TEXT:
        raise ValueError(f"{len(value)} characters")
    return value


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{value!r} is no whole number")
    return value
