"""Settings of jobs/plan.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pipeline.config.shared import at_least
from pipeline.errors import UserError

_POSITIVE = (
    "network_gbit", "node_memory_gib", "captions_per_s", "encoder_tflops", "row_group_mib",
    "peak_tflops", "fetched_kb", "stored_kb", "caption_bytes", "downloads_per_core_s",
    "download_gbit", "metadata_row_bytes", "scan_rows_per_core_s", "decodes_per_core_s",
    "rows_gb_per_core_s",
)  # fmt: skip
_SHARES = ("utilisation", "answering")
_DEEPEST = 24
"""Hidden layers of CLIP ViT-L/14: of more there is no scale."""


@dataclass
class PlanConfig:
    """What curation and training of Stable Diffusion 1.5 at 512 pixels with CLIP ViT-L/14 take on a
    cluster: bytes, requests, Gbit/s, CPU and GPU hours, days, money, and what saturates; nothing is
    started. Every figure is printed with its formula and its source by --explain true. Assumed: the
    counted operations of diffusers' modules (a multiply-add is two), at `utilisation` of the GPU's
    dense bf16 peak in training and at `encoder_tflops` in curation; every row is read once per
    epoch, in whole; the network of a node carries its share of the rows and the gradients of the
    others; what reads, decodes and computes overlaps, so the slowest of them sets the pace;
    captions and features share the GPUs, and overlap the download. Validation, grids of samples,
    start-up, lost nodes and the answers of dead links are not counted.
    """

    # --- the cluster ---
    gpu: Literal[
        "h100", "h200", "h800", "h20", "b200", "a100", "l40s", "l4", "a10", "a10g", "rtx4090"
    ] = "h800"  # fmt: skip
    """Kind of GPU, which says its dense bf16 peak."""
    peak_tflops: float | None = None
    """Dense bf16 peak of a GPU, TFLOP/s; none = that of the kind."""
    gpus: int = 8
    """GPUs that train, and that make captions and features before."""
    gpus_per_node: int = 8
    """GPUs of a node, which share its network, its cores and its memory."""
    network_gbit: float = 100.0
    """What a node's network brings in, and takes out, Gbit/s."""
    node_memory_gib: float = 1024.0
    """Memory of a node, GiB; lanes hold their windows in it."""
    node_cores: int = 96
    """Cores of a GPU node; they read and copy rows in training."""
    download_cores: int = 64
    """Cores that scan metadata and download."""
    download_gbit: float = 10.0
    """What the web gives to all of them together, Gbit/s."""
    store_gbit: float = 0.0
    """What the store gives to all nodes together, Gbit/s; 0 = no limit."""
    store_gets_s: float = 5500.0
    """GET requests a second that a prefix of the store answers; 0 = any. S3 splits a prefix under
    load by itself, so this is told and sets no pace."""
    store_puts_s: float = 3500.0
    """PUT requests a second of the same; 0 = any."""

    # --- the run ---
    images: int = 10_000_000
    """Training images."""
    metadata_rows: int = 2_000_000_000
    """Rows of metadata that the filter reads to find their links; 0 = no scan."""
    codec: Literal["float16", "int8", "pixels", "images"] = "float16"
    """How the shards hold what CLIP sees (features.codec of jobs/curate.py). images: no shards at
    all, VAE and CLIP run in every step; jobs/train.py has no such layout, it is here to compare."""
    scales: int = 6
    """Scales of CLIP in the shards; stage 1 reads the last one."""
    flip: bool = False
    """Whether the shards hold the features of the mirrored images too."""
    unit_rows: int = 2000
    """Links of a unit of work (filter.unit_rows): its files and markers are requests."""
    row_group_mib: float = 64.0
    """Row groups of the shards, MiB (features.row_group_mib)."""
    global_batch: int = 128
    """Samples of an optimizer step over all GPUs."""
    semantic_steps: int = 1_000_000
    """Steps of the first stage (semantic.steps of jobs/train.py)."""
    multi_scale_steps: int = 100_000
    """Steps of the second stage (multi_scale.steps)."""
    queries: int = 1
    """Subjects drawn from each image; each is a text more to encode."""
    lanes: int = 64
    """Lanes of the run; each holds two windows in memory."""
    shuffle_rows: int = 512
    """Rows of a lane's window."""
    checkpoint_steps: int = 5000
    """Steps between checkpoints."""
    keep_checkpoints: int = 3
    """Checkpoints of a stage that stay."""
    captioner: str = "blip2-opt-2.7b"
    """What the name of the captioner holds; captions of another one calibrate nothing."""

    # --- what is assumed; --calibrate replaces it by what was measured ---
    utilisation: float = 0.4
    """Share of the peak that a training step reaches. An assumption; benchmarks/train_gpu.py
    measures it."""
    answering: float = 0.67
    """Share of the links that still give an image that is kept. An assumption: it falls year by
    year."""
    redirects: float = 0.2
    """Redirects that are followed, by link. An assumption."""
    tries_again: float = 0.1
    """Requests that are tried again, by link. An assumption."""
    hosts_per_link: float = 0.5
    """Hosts that a worker has to look up, by link: names, and robots.txt. An assumption."""
    robots_txt: bool = False
    """Whether hosts are asked for their robots.txt (download.robots_txt)."""
    fetched_kb: float = 400.0
    """Bytes from the web by image that is kept, kB (1,000 bytes). An assumption."""
    stored_kb: float = 120.0
    """Size of an image as it is stored, kB: 512 pixels, JPEG of quality 95."""
    metadata_row_bytes: float = 100.0
    """Bytes of metadata that are read by row (docs/curation.md)."""
    scan_rows_per_core_s: float = 6_200_000.0
    """Rows of metadata that a core filters a second (measured: docs/curation.md)."""
    downloads_per_core_s: float = 75.0
    """Images that a core downloads a second (measured: docs/curation.md)."""
    captions_per_s: float = 100.0
    """Images that a GPU captions a second with BLIP-2 OPT 2.7B. An assumption."""
    caption_bytes: float = 250.0
    """Bytes of a caption with its subjects, as stored. An assumption."""
    encoder_tflops: float = 100.0
    """What the VAE (in float32) and CLIP reach in curation on a GPU, TFLOP/s. An assumption."""
    decodes_per_core_s: float = 125.0
    """Stored images that a core decodes and resizes a second. An assumption, near to what a core of
    a Xeon did with JPEGs of 512 pixels."""
    decode_threads: int = 2
    """Threads of a GPU's worker that decode (features.threads)."""
    rows_gb_per_core_s: float = 1.0
    """Rows that a core reads and copies in training, GB/s: 2.9 from a page cache (measured:
    docs/training.md), less through TLS. An assumption."""
    overhead_bytes: float = 0.0
    """Bytes of a row besides its tensors: key, url, caption, its share of pages and footer."""

    # --- prices, in any currency; 0 = none ---
    gpu_hour_price: float = 0.0
    """Price of a GPU hour, in any currency; 0 = no prices."""
    core_hour_price: float = 0.0
    """Price of an hour of a core that downloads, in the same currency."""
    tb_month_price: float = 0.0
    """Price of a terabyte (10^12 bytes) stored for a month; 0 = no prices."""
    months: float = 1.0
    """Months that images, shards and checkpoints stay in the store."""
    put_price: float = 0.0
    """Price of 1,000 requests that write or list."""
    get_price: float = 0.0
    """Price of 1,000 requests that read."""
    egress_gb_price: float = 0.0
    """Price of a GB (10^9 bytes) that is read from the store, where the cluster lies outside of its
    region."""

    # --- what is printed ---
    calibrate: str | None = None
    """Root (a folder, s3:// or gs://) of a short measured run of jobs/curate.py, jobs/train.py or
    both: what was measured there takes the place of what is assumed here. docs/planning.md."""
    explain: bool = False
    """Print every figure with its formula, numbers put in, and where those are from."""
    out: str | None = None
    """Write the plan, formulas and all, to this file (.md or .json; also s3:// or gs://)."""

    def __post_init__(self) -> None:
        at_least(
            self, "plan", gpus=1, gpus_per_node=1, images=1, scales=1, global_batch=1, lanes=1,
            semantic_steps=0, multi_scale_steps=0, queries=1, shuffle_rows=1, store_gbit=0,
            gpu_hour_price=0, core_hour_price=0, tb_month_price=0, download_cores=1, node_cores=1,
            store_gets_s=0, store_puts_s=0, metadata_rows=0, unit_rows=1, checkpoint_steps=1,
            keep_checkpoints=1, redirects=0, tries_again=0, hosts_per_link=0, decode_threads=1,
            overhead_bytes=0, months=0, put_price=0, get_price=0, egress_gb_price=0,
        )  # fmt: skip
        for name in _POSITIVE:
            if (value := getattr(self, name)) is not None and value <= 0:
                raise UserError(f"plan.{name} is {value}; it must be more than 0")
        for name in _SHARES:
            if not 0 < (value := getattr(self, name)) <= 1:
                raise UserError(f"plan.{name} is {value}; it must lie in (0, 1]")
        for name, value in vars(self).items():
            if isinstance(value, (int, float)) and value and not 1e-9 <= abs(value) < 1e15:
                told = value if isinstance(value, float) else "too large"  # to be printed, even
                raise UserError(f"plan.{name} is {told}; it must be a number from 10^-9 to 10^15")
        if self.scales > _DEEPEST:
            raise UserError(
                f"plan.scales is {self.scales}; CLIP ViT-L/14 has {_DEEPEST} layers to take from"
            )
        if self.lanes % self.gpus or self.global_batch % self.lanes:
            raise UserError(
                f"{self.gpus} gpus must divide {self.lanes} lanes, and those the global_batch "
                f"{self.global_batch}; change one"
            )
        if self.out is not None and not self.out.endswith((".md", ".json")):
            raise UserError(f"plan.out is {self.out}; it must end in .md or .json")
