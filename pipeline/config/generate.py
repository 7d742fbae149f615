"""Settings of jobs/generate.py."""

from __future__ import annotations

from dataclasses import dataclass, field

from pipeline.config.shared import ModelsConfig, Precision, at_least


@dataclass
class GenerateConfig:
    """jobs/generate.py: a trained SSR-Encoder -> pictures of the selected subjects."""

    root: str = "runs/mini"
    """The run's root; the grid goes to root/grid.png."""
    model: str | None = None
    """Trained SSR-Encoder: folder, hub id or miniworld:ssr (shipped); none = root/model."""
    models: ModelsConfig = field(default_factory=ModelsConfig)
    references: int = 8
    """Held-out mini-world references in the grid (ignored when image is given)."""
    image: list[str] = field(default_factory=list)
    """Your own reference images, one per subject (jpg, png, webp)."""
    query: list[str] = field(default_factory=list)
    """Text query of each image, in the same order; '' where a mask is given instead."""
    mask: list[str] = field(default_factory=list)
    """Mask image of each reference (white = subject), in the same order; '' = none."""
    scales: list[float] = field(default_factory=list)
    """Weight of each image's subject, in the same order; none = scale for all."""
    region: list[str] = field(default_factory=list)
    """Where in the picture each image's subject may act, in the same order: left,top,right,bottom
    as shares from 0 to 1 (0,0,0.5,1 is the left half); '' = everywhere."""
    prompt: str | None = None
    """What to draw; needed with image."""
    negative_prompt: str = ""
    """What to keep out of the picture."""
    pictures: int = 1
    """Pictures of your images, of seed, seed + 1, ..."""
    width: int | None = None
    """Width of the pictures, pixels; none = the base model's own."""
    height: int | None = None
    """Height of the pictures, pixels; none = the base model's own."""
    control: str | None = None
    """Control image of a ControlNet (edges, depth, a pose); needs controlnet, and image."""
    controlnet: str | None = None
    """ControlNet for the base model: hub id or folder."""
    control_scale: float = 1.0
    """Weight of the ControlNet."""
    from_: str | None = None
    """A picture that this job, the service or its page drew, local or on a store: it is drawn
    again, with all settings of the picture out of the picture."""
    steps: int = 30
    """DDIM steps."""
    guidance: float = 7.5
    """Classifier-free guidance weight."""
    guidance_rescale: float = 0.0
    """How far guidance keeps the deviation of the prompted prediction, 0 (not at all) to 1. For
    base models whose last step holds no signal (arXiv 2305.08891, section 3.4); SD 1.5 takes 0."""
    scale: float = 1.0
    """Weight of the subject branch (lambda of Eq. 4)."""
    seed: int = 0
    """Seed of the initial noise."""
    batch: int = 8
    """Pictures that are denoised at once."""
    device: str = "auto"
    """Torch device: auto, cpu, cuda."""
    dtype: Precision = "float32"
    """Precision of the models."""

    def __post_init__(self) -> None:
        sides = {name: 1 for name in ("width", "height") if getattr(self, name) is not None}
        at_least(self, "generate", pictures=1, batch=1, **sides)
