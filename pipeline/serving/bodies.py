"""What requests and answers of the API look like: OpenAPI is made from these models."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, create_model

from pipeline.config.serve import MOST_GUIDANCE, ServeConfig
from pipeline.generation.recipe import LARGEST_SEED

MOST_SCALE = 10.0
_Share = Annotated[float, Field(ge=0, le=1)]


class _Asked(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class SubjectBody(_Asked):
    """A subject of an uploaded picture: a query selects it, or a mask, or both."""

    image: int = Field(ge=0, description="Which of `files` is its picture, counted from 0.")
    query: str | None = None
    mask: int | None = Field(
        None, ge=0, description="Which of `files` is its mask (white on the subject)."
    )
    scale: float = Field(1.0, ge=0, le=MOST_SCALE, description="Weight of the subject.")
    region: tuple[_Share, _Share, _Share, _Share] | None = Field(
        None, description="Where it may act: left, top, right, bottom as shares of the picture."
    )


class RecipeBody(_Asked):
    """A picture to draw."""

    prompt: str
    subjects: list[SubjectBody] = []
    negative_prompt: str = ""
    seed: int = Field(0, ge=0, le=LARGEST_SEED, description="Of the initial noise.")
    steps: int = 0
    guidance: float = 0.0
    guidance_rescale: float = 0.0
    size: tuple[int, int] | None = None
    control: int | None = Field(
        None, ge=0, description="Which of `files` the ControlNet is shown; none = without one."
    )
    control_scale: float = Field(1.0, ge=0, le=MOST_SCALE, description="Weight of the ControlNet.")
    deadline_s: float | None = None


class ErrorBody(BaseModel):
    error: str = Field(description="One line: what is wrong, where, what to do.")


class LookBody(BaseModel):
    """Where the aligner looks for one query."""

    query: str
    box: tuple[int, int, int, int] = Field(
        description="What the map covers of the picture: left, top, right, bottom, pixels."
    )
    attention: list[list[float]] = Field(description="Rows from the top: a value per patch.")
    overlay: str = Field(description="The map over that part of the picture: a PNG in base64.")


class SubjectLookBody(LookBody):
    subject: int = Field(description="Which of the recipe's subjects, counted from 0.")


class PictureBody(BaseModel):
    picture: str = Field(description="The PNG in base64; it holds its recipe and references.")
    settings: dict[str, Any] = Field(description="All that shaped it, models by their hashes.")
    batch: int = Field(description="How many pictures were denoised together.")
    attention: list[SubjectLookBody] = Field(
        description="Of each subject with a query; empty where it was not asked for."
    )


class AttentionBody(BaseModel):
    looks: list[LookBody] = Field(description="In the queries' order.")


class FactsBody(BaseModel):
    """What the service can do, and with what."""

    side: int = Field(description="Side of a picture whose recipe names no size, pixels.")
    step: int = Field(description="What the sides of pictures are multiples of, pixels.")
    controlnet: bool
    models: dict[str, Any]
    device: str
    limits: dict[str, int]
    deadline_s: float


class HealthBody(BaseModel):
    status: str


def recipe_body(cfg: ServeConfig) -> type[RecipeBody]:
    """RecipeBody with the defaults and limits of the settings."""
    most = cfg.limits
    subject: Any = create_model(
        "Subject",
        __base__=SubjectBody,
        query=(
            str | None,
            Field(None, max_length=most.text, description="Words that name the subject."),
        ),
    )
    side = Annotated[int, Field(ge=1, le=most.side)]
    fields: dict[str, Any] = {
        "prompt": (
            str,
            Field(min_length=1, max_length=most.text, description="What to draw."),
        ),
        "subjects": (
            list[subject],
            Field([], max_length=most.subjects, description="None = the base model alone."),
        ),
        "negative_prompt": (
            str,
            Field("", max_length=most.text, description="What not to draw."),
        ),
        "steps": (int, Field(cfg.steps, ge=1, le=most.steps, description="DDIM steps.")),
        "guidance": (
            float,
            Field(cfg.guidance, ge=0, le=MOST_GUIDANCE, description="1 and less = without."),
        ),
        "guidance_rescale": (
            float,
            Field(cfg.guidance_rescale, ge=0, le=1, description="See jobs/generate.py --help."),
        ),
        "size": (
            tuple[side, side] | None,  # type: ignore[valid-type]
            Field(None, description="Width and height, pixels; none = the model's own square."),
        ),
        "deadline_s": (
            float | None,
            Field(None, gt=0, le=cfg.deadline_s, description="Answer in time, or not at all, s."),
        ),
    }
    return create_model("Recipe", __base__=RecipeBody, __doc__=RecipeBody.__doc__, **fields)
