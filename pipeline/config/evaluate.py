"""Settings of jobs/evaluate.py."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from pipeline.config.ablation import AblationConfig
from pipeline.config.curate import StageResources
from pipeline.config.shared import ModelsConfig, RayConfig, at_least
from pipeline.errors import UserError


@dataclass
class LookConfig:
    """What pictures are judged with: scores of other backbones are other metrics
    (docs/metrics.md). A metric without its backbone is left out."""

    clip: str | None = None
    """CLIP of CLIP-T, CLIP-I and CLIP-ES: hub id, folder, or miniworld:clip."""
    dino: str | None = None
    """DINO or DINOv2 of DINO and DINO-M: hub id, folder, or miniworld:dino."""
    aesthetic: str | None = None
    """File of LAION's aesthetic predictor V2 (sac+logos+ava1-l14-linearMSE.pth)."""
    aesthetic_clip: str = "openai/clip-vit-large-patch14"
    """The CLIP that the predictor belongs to."""
    segmenter: str | None = None
    """Finds subjects in what was drawn, for DINO-M: a CLIPSeg (hub id or folder), or
    miniworld:judge."""
    revision: str | None = None
    """Hub revision (branch, tag or commit) of all of them; none = the default branch."""


@dataclass
class LearningConfig:
    """A short training on one reference."""

    steps: int = 500
    """Optimizer steps."""
    lr: float = 1e-4
    """Learning rate of AdamW, constant."""
    batch_size: int = 1
    """Samples per step."""


@dataclass
class TuningConfig:
    """How methods that learn from each reference are trained on it. The defaults are those of
    diffusers' examples for Stable Diffusion 1 (README.md of examples/textual_inversion, whose
    5e-4 is multiplied by its four samples a step, and of examples/dreambooth)."""

    textual_inversion: LearningConfig = field(default_factory=lambda: LearningConfig(3000, 2e-3, 4))
    """Of the word of each subject that is asked for."""
    dreambooth: LearningConfig = field(default_factory=LearningConfig)
    """Of the LoRA of each set of subjects that is asked for."""
    dreambooth_rank: int = 4
    """Rank of the LoRA."""
    masked: bool = False
    """Learn only what the subjects' masks cover, where they are known; false = the whole picture,
    as both methods were published."""

    def __post_init__(self) -> None:
        at_least(self, "tuning", dreambooth_rank=1)
        for name in ("textual_inversion", "dreambooth"):
            at_least(getattr(self, name), f"tuning.{name}", steps=1, batch_size=1)
            if not getattr(self, name).lr > 0:
                raise UserError(f"tuning.{name}.lr is {getattr(self, name).lr}; it must be above 0")


@dataclass
class EvaluateConfig:
    """jobs/evaluate.py: how well a trained SSR-Encoder and its rivals draw the selected subject."""

    root: str = "runs/mini"
    """The run's root; results go to root/evaluation/<bench>."""
    model: str | None = None
    """Trained SSR-Encoder: folder, hub id or miniworld:ssr (shipped); none = root/model."""
    models: ModelsConfig = field(default_factory=ModelsConfig)
    bench: str = "mini"
    """What is asked of the methods: mini (held-out scenes of the mini world), or the folder of a
    bench (docs/benches.md)."""
    layout: Literal["auto", "multi-subject", "dreambench", "break-a-scene"] = "auto"
    """How the bench's folder is laid out; auto = by what lies in it."""
    references: int | None = None
    """References of the bench that are used, the first ones; none = all, of the mini bench 100."""
    seeds: int = 1
    """Pictures per prompt, of different noise; DreamBench has 4. The mini bench takes 1."""
    methods: list[str] = field(default_factory=lambda: ["text-only", "ssr-text", "ssr-mask"])
    """Who draws: [NAME=]METHOD[@WEIGHTS], of text-only, ssr-text, ssr-mask, whole-image@MODEL,
    ip-adapter@WEIGHTS, reference-only, textual-inversion, dreambooth-lora. WEIGHTS of ssr-* is
    another trained SSR-Encoder; NAME is what results call it, needed where a method comes twice."""
    images_from: list[str] = field(default_factory=list)
    """Pictures drawn elsewhere, scored alike: NAME=FOLDER with a <key>.png for each request."""
    look: LookConfig = field(default_factory=LookConfig)
    tuning: TuningConfig = field(default_factory=TuningConfig)
    steps: int = 30
    """DDIM steps."""
    guidance: float = 7.5
    """Classifier-free guidance weight."""
    guidance_rescale: float = 0.0
    """How far guidance keeps the deviation of the prompted prediction, 0 (not at all) to 1. For
    base models whose last step holds no signal (arXiv 2305.08891, section 3.4); SD 1.5 takes 0."""
    scale: float = 1.0
    """Weight of the reference: lambda of Eq. 4."""
    ip_adapter_scale: float = 1.0
    """IP-Adapter's own weight of the reference; 0 = text only."""
    fidelity: float = 0.5
    """Style fidelity of reference-only, 0 to 1 (docs/rivals.md)."""
    seed: int = 0
    """First seed of initial noise; the mini bench's references are of it too."""
    unit_pictures: int = 40
    """Pictures of a unit of work, about: what is lost to a kill. Units of another size are others:
    all is drawn again."""
    batch_size: int = 20
    """Pictures denoised at once."""
    resamples: int = 10_000
    """Bootstrap resamples of the confidence intervals."""
    redo: list[str] = field(default_factory=list)
    """Methods that learn from each reference (textual-inversion, ...) whose pictures of other
    settings may be thrown away and made again; those of the others always are."""
    device: str = "auto"
    """Torch device: auto, cpu, cuda."""
    drawing: StageResources = field(default_factory=lambda: StageResources(max_workers=0))
    """Workers that draw, on Ray; max_workers 0 = this process, without Ray."""
    scoring: StageResources = field(default_factory=StageResources)
    """Workers that score, on Ray; not used where drawing.max_workers is 0."""
    ray: RayConfig = field(default_factory=RayConfig)
    ablation: AblationConfig = field(default_factory=AblationConfig)

    def __post_init__(self) -> None:
        at_least(
            self, "evaluate", seeds=1, steps=1, seed=0, unit_pictures=1, batch_size=1, resamples=100
        )


@dataclass
class RequestsConfig:
    """jobs/evaluate.py requests: what a bench asks, as files for tools that draw elsewhere."""

    bench: str = "mini"
    """mini, or the folder of a bench (docs/benches.md)."""
    layout: Literal["auto", "multi-subject", "dreambench", "break-a-scene"] = "auto"
    """How the bench's folder is laid out; auto = by what lies in it."""
    references: int | None = None
    """References that are used, the first ones; none = all, of the mini bench 100."""
    seeds: int = 1
    """Pictures per prompt, of different noise; the mini bench takes 1."""
    seed: int = 0
    """First seed of initial noise; as the evaluation's."""
    out: str | None = None
    """Folder (or URL) that requests.jsonl, references and masks go to."""

    def __post_init__(self) -> None:
        at_least(self, "requests", seeds=1, seed=0)


@dataclass
class CompareConfig:
    """jobs/evaluate.py compare: is B better than A? Paired differences of two evaluations."""

    root: str = "runs/mini"
    """Root of A, the run that was evaluated first; the comparison goes to it."""
    other: str | None = None
    """Root of B, the run that may be better; none = A's, to compare two methods of one run."""
    bench: str = "mini"
    """The bench, by its folder under evaluation/ of both."""
    methods: list[str] = field(default_factory=list)
    """What is compared: a method of both (ssr-text), or one of A with another of B
    (ssr-text:ssr-mask); empty = all that both have."""
    resamples: int = 10_000
    """Bootstrap resamples of the confidence intervals."""
    seed: int = 0
    """Seed of the resamples."""
    out: str | None = None
    """Folder (or URL) of comparison.json and comparison.md; none = below
    root/evaluation/<bench>/comparisons."""

    def __post_init__(self) -> None:
        at_least(self, "compare", resamples=100, seed=0)
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", self.bench):
            raise UserError(f"bench: {self.bench!r} is no folder under evaluation/; name one")
