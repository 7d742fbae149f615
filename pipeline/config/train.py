"""Settings of jobs/train.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pipeline.config.shared import ModelsConfig, RayConfig


@dataclass
class OptimConfig:
    """One training stage."""

    steps: int = 1000
    """Optimizer steps of the stage; 0 skips it."""
    lr: float = 5e-5
    """Peak learning rate of AdamW."""
    warmup_steps: int = 0
    """Linear warm-up, steps."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate after the warm-up; cosine decays to zero at the last step."""


@dataclass
class ExportConfig:
    """jobs/train.py export: a checkpoint of either stage -> a folder for from_pretrained."""

    root: str = "runs/mini"
    """The run's root (a folder, s3:// or gs://), while it goes on or after."""
    stage: Literal[1, 2] | None = None
    """Stage of the checkpoint: 1 (semantic) or 2 (multi_scale); none = the last one that has
    any."""
    step: int | None = None
    """Step of the checkpoint; none = the newest whole one."""
    out: str | None = None
    """Where the model goes: a new folder, or s3:// or gs://. Its weights are the moving average
    where the run has one."""


@dataclass
class PushConfig:
    """jobs/train.py push: a trained model -> the Hugging Face hub. The token comes from HF_TOKEN or
    `hf auth login`, never from the command line, which others can read."""

    root: str = "runs/mini"
    """The run's root (a folder, s3:// or gs://)."""
    model: str | None = None
    """Folder of the model (local, s3:// or gs://), as training or export leave it; none =
    root/model."""
    repo: str | None = None
    """Where it goes on the hub: owner/name, made where it is missing."""
    private: bool = False
    """Make it private where it is made; what is there already stays as it is."""
    revision: str | None = None
    """Branch, made where it is missing; none = main."""
    message: str | None = None
    """Message of the commit; none = that of SSREncoder.push_to_hub."""
    pull_request: bool = False
    """Open a pull request on a model of somebody, in place of a commit."""
    license: str | None = None
    """Licence that the card names (openrail, apache-2.0 ...); none = that of the base model."""


@dataclass
class TrainConfig:
    """jobs/train.py: sealed shards -> a trained SSR-Encoder, in two stages."""

    root: str = "runs/mini"
    """The curated root (a folder, s3:// or gs://); the run goes to root/train, the model to
    root/model."""
    data: str | None = None
    """Curated root whose features are trained on, where they do not lie under root: several runs
    can share one. None = root."""
    models: ModelsConfig = field(default_factory=ModelsConfig)
    init: str | None = None
    """Trained weights that the first stage begins from: a folder for from_pretrained or a hub id, a
    checkpoint's folder (train/<stage>/checkpoints/step-...) of any run, or a folder with the two
    files of the published weights; none = the base model. Scales that they lack begin as copies of
    the last one. Read when the run begins; a restart goes on from its own checkpoints."""
    workers: int | None = None
    """Ray Train workers; none = one per GPU, else two where two cores are there. Must
    divide lanes."""
    min_workers: int | None = None
    """Workers that training goes on with where nodes are gone, until others come; none = workers.
    Of what lies between, the largest number is taken that divides lanes and has room. The batches
    stay the same; a worker's share of them, and the memory for it, grow: see micro_batch."""
    wait_minutes: float = 10.0
    """Longest wait for room for min_workers on a cluster, minutes. Its autoscaler is asked for it.
    """
    resize_minutes: float = 5.0
    """How long room for more workers must be there before a run with fewer than workers starts
    again to use it, minutes."""
    use_gpu: bool | None = None
    """Train on GPUs; none = if the cluster has any."""
    global_batch: int = 32
    """Samples per optimizer step over all workers. Must be a multiple of lanes."""
    micro_batch: int | None = None
    """Samples that a worker puts through the model at once, whose gradients add up to its share of
    the global batch; none = all of them."""
    gradient_checkpointing: bool = False
    """Compute the U-Net's activations again in the backward pass instead of keeping them."""
    compile: bool = False
    """Compile the model with torch.compile: minutes at the start, faster steps after them."""
    lanes: int = 8
    """Independent streams over the row groups; the batch at a step depends on (seed, step)
    alone."""
    shuffle_rows: int = 512
    """Window in which a lane shuffles its rows."""
    flip: bool = False
    """Mirror images, half of the row groups of each epoch; needs shards that hold the features of
    the mirrored images (features.flip of jobs/curate.py). Captions that tell left from right become
    wrong."""
    corrupt: Literal["stop", "skip"] = "stop"
    """What follows a damaged row group: training stops and names it, or the rows of the next one
    stand in for its own, which is told in train/<stage>/corrupt.jsonl and the metrics. A store that
    is only busy or out of reach is no damage, and tried again."""
    verify: bool = False
    """Compare the rows that are read with the checksums in the shards, which costs 0.3 CPU-seconds
    per GB. Without it a damaged page may pass for numbers."""
    semantic: OptimConfig = field(default_factory=OptimConfig)
    multi_scale: OptimConfig = field(default_factory=OptimConfig)
    tau: float = 0.01
    """Weight of L_reg (Eq. 7)."""
    variant: Literal["paper", "released"] = "paper"
    """Which reading of the method is trained: the paper's, or that of its authors' code."""
    heads: int | None = None
    """Attention heads of the aligner; none = the variant's (1 in the paper, 8 in the code)."""
    head_dim: int | None = None
    """Width of one attention head of the aligner; none = the variant's (512, or 64)."""
    value_projection: Literal["direct", "factored"] | None = None
    """W^V_k of a scale as one matrix, or as two; none = the variant's (direct in the paper)."""
    token_norm: bool | None = None
    """A LayerNorm over the subject tokens; none = the variant's (none in the paper)."""
    drop_prompt: float = 0.05
    """Probability that a sample's prompt alone is replaced by the empty text."""
    drop_subject: float = 0.0
    """Probability that a sample's subject alone is left out of the U-Net. It adds exactly nothing
    then, so with the frozen U-Net only L_reg trains on such a sample."""
    drop_both: float = 0.0
    """Probability that prompt and subject are dropped together."""
    drop_query: float = 0.1
    """Probability that a sample's query is replaced by the empty text (what a mask query uses)."""
    drop_article: float = 0.0
    """Probability that a query loses its leading article ("a cup" -> "cup"): users write both."""
    query: Literal["subject", "caption"] = "subject"
    """What a query is drawn from: the caption's subject phrases, or the caption itself."""
    queries: int = 1
    """Subjects drawn from each image, which condition it together. With one, the others of the
    image can only be told of through it, which rewards an encoder that does not select."""
    init_layers: Literal["copy", "random"] | None = None
    """K_S, V_S start as copies of the base model's text K, V, or at random; none = the variant's
    (copies in the paper)."""
    mask_cls: bool | None = None
    """Whether a mask query may look at CLIP's CLS token, which has seen the whole image; none = the
    variant's (no in the paper)."""
    start_token: bool = True
    """Whether the query's start token makes subject tokens (the paper's method is silent). Its
    state is the same for every query, so it cannot select."""
    weight_decay: float = 1e-2
    """AdamW weight decay."""
    clip_norm: float = 1.0
    """Largest global gradient norm; 0 = no clipping."""
    ema_decay: float = 0.0
    """Decay of the exponential moving average that is exported; 0 = none."""
    nonfinite: Literal["stop", "skip"] = "stop"
    """What follows a step whose gradient is not a number: it is never taken, its rows are written
    to train/<stage>/nonfinite.jsonl, and training stops, or goes on with the next one."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Autocast precision of the forward pass; trainables stay fp32."""
    seed: int = 0
    """Seed of initialisation, lanes, noise, timesteps and dropping."""
    checkpoint_steps: int = 250
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept."""
    keep_hours: float = 0.0
    """Hours between checkpoints that are kept for good besides, the first of a stage among them;
    0 = none."""
    log_steps: int = 25
    """Steps between log lines and metric records, and the most that are trained after the notice
    that a node will go."""
    validate_steps: int = 250
    """Steps between validations on the held-out split; 0 = never."""
    validate_rows: int = 64
    """Held-out rows in a validation."""
    sample_steps: int = 1000
    """Steps between grids of samples, which go to train/<stage>/samples; 0 = never."""
    sample_rows: int = 4
    """Held-out rows in a grid."""
    sample_denoising: int = 30
    """DDIM steps of a sample."""
    sample_guidance: float = 7.5
    """Classifier-free guidance weight of samples; up to 1 = none."""
    sample_guidance_rescale: float = 0.0
    """As guidance_rescale of jobs/generate.py: for base models whose last step holds no signal."""
    trackers: list[Literal["wandb", "mlflow"]] = field(default_factory=list)
    """Who is told the figures besides TensorBoard. They are extras of the package, and read their
    own environment variables (WANDB_*, MLFLOW_*) where rank 0 runs."""
    gpu_hour_price: float = 0.0
    """Price of a GPU for an hour, in any currency; the report says what the run cost."""
    ray: RayConfig = field(default_factory=RayConfig)
