"""Settings of jobs/plan.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pipeline.config.shared import at_least
from pipeline.errors import UserError


@dataclass
class PlanConfig:
    """What a run of Stable Diffusion 1.5 at 512 pixels with CLIP ViT-L/14 takes on a cluster:
    bytes, network, GPU hours, money; nothing is started. Assumed: the counted operations of
    diffusers' modules (a multiply-add is two), at `utilisation` of the GPU's dense bf16 peak in
    training and at `encoder_tflops` in curation; every row is read once per epoch, in whole; the
    network of a node carries its share of the rows and the gradients of the others; what reads,
    decodes and computes overlaps, so the slowest of them sets the pace. Validation, checkpoints,
    start-up and lost nodes are not counted.
    """

    gpu: Literal[
        "h100", "h200", "h800", "h20", "b200", "a100", "l40s", "l4", "a10", "a10g", "rtx4090"
    ] = "h800"  # fmt: skip
    """Kind of GPU, which says its dense bf16 peak."""
    peak_tflops: float | None = None
    """Dense bf16 peak of a GPU, TFLOP/s; none = that of the kind."""
    utilisation: float = 0.4
    """Share of the peak that a training step reaches. An assumption; benchmarks/train_gpu.py
    measures it."""
    gpus: int = 8
    """GPUs that train."""
    gpus_per_node: int = 8
    """GPUs of a node, which share its network and its memory."""
    network_gbit: float = 100.0
    """What a node's network brings in, Gbit/s."""
    store_gbit: float = 0.0
    """What the store gives to all nodes together, Gbit/s; 0 = no limit."""
    node_memory_gib: float = 1024.0
    """Memory of a node, GiB; lanes hold their windows in it."""
    images: int = 10_000_000
    """Training images."""
    codec: Literal["float16", "int8", "pixels"] = "float16"
    """How the shards hold what CLIP sees (features.codec of jobs/curate.py)."""
    scales: int = 6
    """Scales of CLIP in the shards; stage 1 reads the last one."""
    flip: bool = False
    """Whether the shards hold the features of the mirrored images too."""
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
    row_group_mib: float = 64.0
    """Row groups of the shards, MiB (features.row_group_mib)."""
    captions_per_s: float = 100.0
    """Images that a GPU captions a second with BLIP-2 OPT 2.7B. An assumption."""
    encoder_tflops: float = 100.0
    """What the VAE (in float32) and CLIP reach in curation on a GPU, TFLOP/s. An assumption."""
    gpu_hour_price: float = 0.0
    """Price of a GPU hour, in any currency; 0 = no prices."""
    tb_month_price: float = 0.0
    """Price of a terabyte (10^12 bytes) stored for a month; 0 = no prices."""

    def __post_init__(self) -> None:
        at_least(
            self, "plan", gpus=1, gpus_per_node=1, images=1, scales=1, global_batch=1, lanes=1,
            semantic_steps=0, multi_scale_steps=0, queries=1, shuffle_rows=1, store_gbit=0,
            gpu_hour_price=0, tb_month_price=0,
        )  # fmt: skip
        for name in (
            "network_gbit", "node_memory_gib", "captions_per_s", "encoder_tflops", "row_group_mib",
            "peak_tflops",
        ):  # fmt: skip
            if (value := getattr(self, name)) is not None and value <= 0:
                raise UserError(f"plan.{name} is {value}; it must be more than 0")
        if not 0 < self.utilisation <= 1:
            raise UserError(f"plan.utilisation is {self.utilisation}; it must lie in (0, 1]")
        if self.lanes % self.gpus or self.global_batch % self.lanes:
            raise UserError(
                f"{self.gpus} gpus must divide {self.lanes} lanes, and those the global_batch "
                f"{self.global_batch}; change one"
            )
