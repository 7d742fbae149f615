"""Settings of jobs/curate.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pipeline.config.shared import MAX_PIXELS, ModelsConfig, RayConfig, absolute, at_least
from pipeline.config.webdataset import WebDatasetConfig
from pipeline.errors import UserError


@dataclass
class WebsiteConfig:
    """The mini world's own web site; only the mini preset turns it on."""

    enabled: bool = False
    """Start the mini world's web site on loopback for the time of the job."""
    port: int = 18642
    """TCP port on 127.0.0.1. It is part of the URLs in the metadata, so it is fixed, not 0."""
    rows: int = 6000
    """Metadata rows published (before any filter), faults and duplicates included."""
    seed: int = 0
    """Seed of rows, scores and faults."""

    def __post_init__(self) -> None:
        at_least(self, "website", port=1, rows=1, seed=0)
        if self.port > 65535:
            raise UserError(f"website.port is {self.port}; a port is at most 65535")


@dataclass
class FolderConfig:
    """Images and captions of your own, in place of metadata and the web (docs/own_images.md)."""

    path: str | None = None
    """Folder of images (local, s3://, gs://). An image's caption stands in a .txt file of its name,
    or in a metadata.jsonl, metadata.csv or metadata.parquet with file_name and text; none = another
    source. Of filter, unit_rows, test_rows, max_rows and seed count."""
    captions: str | None = None
    """A table of captions that lies elsewhere, .jsonl, .csv or .parquet (local, s3://, gs://), with
    file_name, from folder.path on, and text; it goes before what lies in the folder."""

    def __post_init__(self) -> None:
        if self.path is not None:
            self.path = absolute(self.path)
        if self.captions is not None:
            self.captions = absolute(self.captions)
            if self.path is None:
                raise UserError("folder.captions needs folder.path: the folder of its images")


@dataclass
class FilterConfig:
    """Metadata -> units (pipeline/curation/filtering/metadata.py)."""

    inputs: list[str] = field(default_factory=list)
    """Parquet files, folders or globs (local, s3://, gs://); empty = the mini world's web site."""
    score: Literal["column", "table", "computed"] = "column"
    """Where aesthetic scores come from: a column of the metadata, a second table (score_inputs), or
    the images themselves once they are there (then set scores.enabled)."""
    min_aesthetic: float = 6.0
    """Keep rows whose aesthetic score is greater than this."""
    predictor: Literal["v1", "v2"] = "v2"
    """The predictor that min_aesthetic speaks of; a column of the other one is refused."""
    score_inputs: list[str] = field(default_factory=list)
    """Parquet files, folders or globs of the score table; needed with score table."""
    score_by: Literal["hash", "key", "url"] = "hash"
    """What rows of the score table are found by: LAION's hash, the metadata's own key, the url."""
    max_punsafe: float = 0.5
    """Keep rows with NSFW probability below this (rows without one are kept)."""
    max_pwatermark: float = 0.8
    """Keep rows with watermark probability below this (rows without one are kept)."""
    min_similarity: float = 0.0
    """Keep rows whose CLIP similarity of image and text is at least this; 0 = any (rows without one
    are kept)."""
    min_side: int = 0
    """Keep rows whose shorter side, as the metadata says, is at least this, pixels."""
    max_aspect: float = 0.0
    """Keep rows whose longer side is at most this many times the shorter one; 0 = any (rows without
    a size are kept)."""
    languages: list[str] = field(default_factory=list)
    """Keep rows of these languages, as the metadata spells them; empty = any (rows without one are
    kept)."""
    min_caption: int = 0
    """Keep rows whose alt text has at least this many characters."""
    max_caption: int = 0
    """Keep rows whose alt text has at most this many characters; 0 = any."""
    keep_columns: list[str] = field(default_factory=list)
    """Further columns of the metadata that pass through to the units, by name in any case."""
    write_rejects: bool = False
    """Write every dropped row with its reason to rejects/ (as large as the metadata itself)."""
    unit_rows: int = 256
    """Rows (URLs) in a unit of work."""
    test_rows: int = 200
    """Rows held out as the test split, chosen by a seeded hash of the key."""
    max_rows: int | None = None
    """Stop at this many kept rows, after the shuffle; none = all."""
    seed: int = 0
    """Seed of shuffle and split."""

    def __post_init__(self) -> None:
        at_least(
            self, "filter", min_side=0, unit_rows=1, test_rows=0, seed=0, min_similarity=0,
            min_caption=0, max_caption=0,
        )  # fmt: skip
        if self.max_rows is not None:
            at_least(self, "filter", max_rows=1)
        if self.max_aspect and self.max_aspect < 1:
            raise UserError(f"filter.max_aspect is {self.max_aspect}; it must be 0 or at least 1")
        if 0 < self.max_caption < self.min_caption:
            raise UserError(
                f"filter.max_caption is {self.max_caption}, below min_caption {self.min_caption}"
            )
        if (self.score == "table") != bool(self.score_inputs):
            raise UserError(
                "filter.score table and filter.score_inputs go together: give both or neither"
            )


@dataclass
class DownloadConfig:
    """URLs -> images (pipeline/curation/downloading/download.py)."""

    image_size: int = 32
    """Side of the stored square image, pixels (shortest side resized, then centre crop)."""
    min_image_size: int | None = None
    """Refuse images whose shorter side is smaller than this, pixels; none = image_size, so that no
    image is ever enlarged. Below image_size, smaller images are enlarged to it."""
    decode: Literal["full", "reduced"] = "full"
    """How JPEGs come to their stored size: every pixel decoded and averaged over areas, or in
    cheaper steps of the same quality (docs/curation/download.md): other bytes, about two thirds of
    the CPU time."""
    encode_format: Literal["jpg", "png", "webp"] = "png"
    """Format of the stored image."""
    encode_quality: int = 3
    """JPEG or WebP quality (1-100); PNG compression level (0-9)."""
    threads: int = 16
    """Concurrent fetches in a unit."""
    timeout_s: float = 10.0
    """Total time for one image, redirects and retries included, seconds; waiting for our own turn
    at its host does not count."""
    connect_timeout_s: float = 5.0
    """Time for one connection, name and TLS included, seconds; one that takes longer is not tried
    again in this unit."""
    keep_alive_s: float = 30.0
    """Idle time for which a connection is kept for the next image of its host, seconds; 0 = a
    connection for each request."""
    retries: int = 1
    """Further tries after a transient failure (429, 5xx, reset, broken off)."""
    unit_deadline_s: float = 0.0
    """Time for a unit's downloads, seconds; rows that have not ended by then fail as `deadline`,
    which --retry_failed takes up; 0 = none. A worker is done two seconds later at most."""
    outage_share: float = 0.9
    """A unit of which at least this share finds no network (no address, no connection, no answer in
    time) is not counted as done, and the run stops; above 1 = never."""
    max_bytes: int = 20_000_000
    """Largest body read, bytes."""
    max_pixels: int = MAX_PIXELS
    """Largest image decoded, pixels, checked in the header before decoding."""
    block_lists: list[str] = field(default_factory=list)
    """Files (local, s3://, gs://) of what must not be stored: text with one md5, sha256 or url a
    line, or Parquet with columns of these names. A worker holds 8 bytes an entry."""
    verify_hash: Literal["none", "md5", "sha256"] = "none"
    """Column of the units that says which content each url had; other content is refused."""
    per_host: int = 8
    """Concurrent fetches from one host, of one worker."""
    per_host_rate: float = 0.0
    """Requests a second to one host, of one worker; 0 = no limit."""
    robots_txt: bool = False
    """Ask every host for its robots.txt, and keep to it; User-Agent gives our name in it."""
    user_agent: str = "ssr-on-ray/0.1 (+https://arxiv.org/abs/2312.16272)"
    """User-Agent header; what comes before its "/" is our name in X-Robots-Tag and
    robots.txt."""
    allow_private_hosts: list[str] = field(default_factory=list)
    """host:port pairs exempt from the rule that refuses private and loopback addresses."""

    def __post_init__(self) -> None:
        at_least(
            self, "download", image_size=1, threads=1, timeout_s=0.01, retries=0,
            unit_deadline_s=0, max_bytes=1, max_pixels=1, per_host=1,
        )  # fmt: skip
        at_least(self, "download", connect_timeout_s=0.01, keep_alive_s=0, per_host_rate=0)
        agent = self.user_agent
        if not (agent.isascii() and agent.isprintable() and agent == agent.strip() != ""):
            raise UserError(f"download.user_agent is {agent!r}; it must be printable ASCII")
        if self.min_image_size is not None:
            at_least(self, "download", min_image_size=1)
        self.block_lists = [absolute(path) for path in self.block_lists]

    @property
    def smallest(self) -> int:
        """The least shorter side that is stored, pixels."""
        return self.image_size if self.min_image_size is None else self.min_image_size


@dataclass
class ScoresConfig:
    """Images -> aesthetic scores of the images themselves (pipeline/curation/aesthetic.py)."""

    enabled: bool = False
    """Score the images between download and captions, and caption only those above the bound. The
    CLIP is models.vision, with its projection: the published predictor takes CLIP ViT-L/14."""
    weights: str | None = None
    """Weights of the predictor: a .pth or .safetensors file (a path that every worker reads, or
    s3://, gs://), e.g. the published sac+logos+ava1-l14-linearMSE.pth."""
    md5: str | None = None
    """MD5 that the weights must have; none = that of the published file for a .pth, and no check
    for .safetensors."""
    predictor: str = "v2"
    """Name written beside each score."""
    min_aesthetic: float = 6.0
    """Keep images whose score is greater than this."""
    batch_size: int = 64
    """Images per forward pass."""
    threads: int = 2
    """Images decoded and resized side by side, per worker."""

    def __post_init__(self) -> None:
        at_least(self, "scores", batch_size=1, threads=1)
        if self.weights:
            self.weights = absolute(self.weights)
        if self.enabled and not self.weights:
            raise UserError(
                "scores.enabled needs scores.weights: the file sac+logos+ava1-l14-linearMSE.pth, "
                "or weights of the same shape"
            )


@dataclass
class CaptionConfig:
    """Images -> captions and subject phrases (pipeline/curation/captioning/caption.py)."""

    backend: Literal["transformers", "lavis", "given"] = "transformers"
    """Captioning backend: transformers' BLIP-2 (models.captioner), or salesforce-lavis in an
    environment of its own (lavis_*); given = no model, the text that came with the image."""
    prompt: str = ""
    """Prompt given to BLIP-2; empty = plain captioning (lavis: the prompt of the model's type)."""
    max_new_tokens: int = 24
    """Longest caption, tokens; a word that would not fit is left out whole."""
    min_new_tokens: int = 0
    """Shortest caption, tokens; 0 = as the model likes."""
    num_beams: int = 1
    """Beams of the search; 1 = greedy."""
    length_penalty: float = 1.0
    """Exponent of the length that divides a beam's score; larger = longer captions."""
    repetition_penalty: float = 1.0
    """Divides the scores of tokens said already; 1 = none."""
    no_repeat_ngram_size: int = 0
    """No run of this many tokens is said twice; 0 = no such rule."""
    temperature: float = 0.0
    """Temperature of sampling; 0 = none, greedy or beam search."""
    top_p: float = 0.9
    """Sampling draws from the likeliest tokens that together have this probability; 1 = all."""
    seed: int = 0
    """Seed of sampling. What is drawn for an image depends on it and the image's key alone."""
    captions_per_image: int = 1
    """Captions of each image; more than one needs a temperature, or as many beams."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the model; auto = bfloat16 on a GPU, float32 on the CPU (lavis: its own)."""
    batch_size: int = 64
    """Images per forward pass."""
    lavis_python: str = ".venv-lavis/bin/python"
    """Interpreter of the environment that `make lavis-env` makes; on a cluster, its absolute path,
    the same on every node."""
    lavis_model: str = "blip2_opt"
    """LAVIS's name of the model; module:name imports a module of yours that registers it first."""
    lavis_type: str = "caption_coco_opt2.7b"
    """LAVIS's name of the model's type: its sizes and weights."""
    lavis_checkpoint: str | None = None
    """Weights of the model, a .pth file as LAVIS has them; none = LAVIS fetches the type's own."""
    lavis_opt: str | None = None
    """Folder of the OPT language model; none = the type's own, from the hub."""

    def __post_init__(self) -> None:
        at_least(
            self, "caption", max_new_tokens=1, min_new_tokens=0, num_beams=1,
            no_repeat_ngram_size=0, temperature=0, seed=0, captions_per_image=1, batch_size=1,
        )  # fmt: skip
        if self.lavis_checkpoint:
            self.lavis_checkpoint = absolute(self.lavis_checkpoint)
        if self.lavis_opt:
            self.lavis_opt = absolute(self.lavis_opt)
        if not 0 < self.top_p <= 1:
            raise UserError(f"caption.top_p is {self.top_p}; it must be above 0 and at most 1")
        if self.repetition_penalty <= 0:
            raise UserError(
                f"caption.repetition_penalty is {self.repetition_penalty}; it must be above 0"
            )
        if self.min_new_tokens > self.max_new_tokens:
            raise UserError(
                f"caption.min_new_tokens is {self.min_new_tokens}, above max_new_tokens "
                f"({self.max_new_tokens}); lower it"
            )
        if self.temperature > 0 and self.num_beams > 1:
            raise UserError(
                "caption.temperature draws, caption.num_beams searches; set temperature to 0, or "
                "num_beams to 1"
            )
        if self.temperature == 0 and self.captions_per_image > self.num_beams:
            raise UserError(
                f"caption.captions_per_image is {self.captions_per_image}, but a search of "
                f"{self.num_beams} beam(s) has no more to give; set a temperature, or more beams"
            )
        if self.backend == "lavis" and self.dtype != "auto":
            raise UserError("caption.dtype: LAVIS chooses its own precision; leave it at auto")


@dataclass
class FeaturesConfig:
    """Images and captions -> feature shards (pipeline/curation/features.py)."""

    scales: int = 6
    """Depths of the vision tower that are stored, evenly spaced, the last layer included."""
    codec: Literal["float16", "int8", "pixels"] = "float16"
    """How what CLIP sees is stored: its hidden states as float16, or as int8 with a scale per token
    (half the bytes), or its input as pixels (training computes the states)."""
    flip: bool = False
    """Store the features of each image's mirror image beside its own, for training with --flip:
    twice the work and the bytes (codec pixels: of the latents alone)."""
    batch_size: int = 64
    """Images per forward pass."""
    row_group_mib: float = 8.0
    """Upper bound of a row group, MiB."""
    threads: int = 2
    """Images decoded and resized side by side, per worker."""

    def __post_init__(self) -> None:
        at_least(self, "features", scales=1, batch_size=1, row_group_mib=0.001, threads=1)


@dataclass
class StageResources:
    """Ray resources of one worker of a stage, and how many workers there may be."""

    cpus: float = 1.0
    """CPU cores per worker."""
    gpus: float = 0.0
    """GPUs per worker."""
    max_workers: int = 1
    """Largest number of workers of this stage."""


@dataclass
class CurateConfig:
    """jobs/curate.py: LAION metadata -> sealed feature shards."""

    root: str = "runs/mini"
    """Where everything goes: a folder, s3://bucket/prefix or gs://bucket/prefix. A job submitted to
    Ray takes a relative folder as one in its user's home."""
    redo: list[Literal["units", "images", "scores", "captions", "features"]] = field(
        default_factory=list
    )
    """Stages whose finished units may be thrown away and made again where settings changed:
    units, images, scores, captions, features."""
    retry_failed: bool = False
    """Give the rows whose download failed in passing (no answer, 5xx, deadline ...) one more try,
    in units of their own. Each run with it is a further round."""
    device: str = "auto"
    """Torch device of scores, captioning and features: auto, cpu, cuda."""
    models: ModelsConfig = field(default_factory=ModelsConfig)
    website: WebsiteConfig = field(default_factory=WebsiteConfig)
    folder: FolderConfig = field(default_factory=FolderConfig)
    webdataset: WebDatasetConfig = field(default_factory=WebDatasetConfig)
    filter: FilterConfig = field(default_factory=FilterConfig)
    download: DownloadConfig = field(default_factory=DownloadConfig)
    scores: ScoresConfig = field(default_factory=ScoresConfig)
    caption: CaptionConfig = field(default_factory=CaptionConfig)
    features: FeaturesConfig = field(default_factory=FeaturesConfig)
    download_workers: StageResources = field(default_factory=StageResources)
    scores_workers: StageResources = field(default_factory=StageResources)
    caption_workers: StageResources = field(default_factory=StageResources)
    features_workers: StageResources = field(default_factory=StageResources)
    wait_minutes: float = 10.0
    """Longest wait, on a cluster, for room for a worker of each stage at once, minutes. Its
    autoscaler is asked for it, once in a run. Without it, the stages take turns."""
    ray: RayConfig = field(default_factory=RayConfig)

    def __post_init__(self) -> None:
        for name in ("download_workers", "scores_workers", "caption_workers", "features_workers"):
            at_least(getattr(self, name), name, cpus=0, gpus=0, max_workers=1)
        at_least(self, "curate", wait_minutes=0)
        sources = {
            "folder.path": self.folder.path,
            "webdataset.inputs": self.webdataset.inputs,
            "filter.inputs": self.filter.inputs,
        }
        given = [name for name, value in sources.items() if value]
        if len(given) > 1:
            raise UserError(f"{given[0]} and {given[1]} are two sources of rows; give one of them")
        if self.filter.score == "computed" and not self.scores.enabled:
            raise UserError(
                "filter.score computed leaves scores to the images: set --scores.enabled true and "
                "--scores.weights too"
            )

    @property
    def own_images(self) -> bool:
        """Whether the images are the user's own, and none come from the web."""
        return self.folder.path is not None or bool(self.webdataset.inputs)
