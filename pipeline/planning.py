"""What a run takes on a cluster, by arithmetic: bytes, Gbit/s, GPU hours, and what limits it.

The operations are counted (on the meta device, with diffusers' and transformers' own modules) for
Stable Diffusion 1.5 at 512 pixels and CLIP ViT-L/14; a multiply-add is two.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from pipeline.config import PlanConfig
from pipeline.shards import LATENT_LOGVAR, LATENT_MEAN, TOKEN_IDS, layout, vision_columns
from pipeline.shards import Tensor as Column

# --- counted: GFLOP a sample ---
UNET_ONE_SCALE, UNET_SIX_SCALES = 1688.0, 1785.0  # forward, and backward to the adapter alone
VAE, CLIP, TEXT, ALIGNER = 1117.0, 162.0, 13.3, 5.7

# --- shapes ---
_LATENT, _STATES, _PIXELS, _TOKENS = (4, 64, 64), (257, 1024), (224, 224, 3), 77
TRAINABLES = 25_590_000  # whose gradients, in float32, the workers exchange at every step

PEAK_TFLOPS = {
    "h100": 989.0, "h200": 989.0, "h800": 989.0, "h20": 148.0, "b200": 2250.0, "a100": 312.0,
    "l40s": 362.0, "l4": 121.0, "a10": 125.0, "a10g": 70.0, "rtx4090": 165.0,
}  # fmt: skip
"""Dense bf16 peaks, as their maker publishes them."""
_GBIT = 1e9 / 8
_SMALL_BATCH = 8
_CODECS: tuple[Literal["float16", "int8", "pixels"], ...] = ("float16", "int8", "pixels")


def columns(codec: str, scales: int, flip: bool = False) -> list[Column]:
    """The tensor columns of a shard of these models."""
    return layout(
        codec, tokens=_TOKENS, latent=_LATENT, depths=range(1, scales + 1), states=_STATES,
        pixels=_PIXELS, flip=flip,
    )  # fmt: skip


def row_bytes(codec: str, scales: int, stored: int) -> int:
    """Bytes that a training row of `scales` of the `stored` scales is read with."""
    names = vision_columns(codec, range(stored - scales + 1, stored + 1))
    wanted = {TOKEN_IDS, LATENT_MEAN, LATENT_LOGVAR, *names}
    return sum(column.nbytes for column in columns(codec, stored) if column.name in wanted)


def step_gflop(codec: str, scales: int, queries: int = 1) -> float:
    """GFLOP of a training sample: U-Net, adapter, the texts, and CLIP where shards hold pixels."""
    per_scale = (UNET_SIX_SCALES - UNET_ONE_SCALE) / 5
    unet = UNET_ONE_SCALE + (scales - 1) * per_scale
    return unet + ALIGNER + (1 + queries) * TEXT + (CLIP if codec == "pixels" else 0.0)


@dataclass(frozen=True)
class StagePlan:
    """One training stage on the cluster."""

    name: str
    samples: int
    row_bytes: int
    gradient_bytes: float
    """Of the other nodes' gradients that a node receives, per sample of the global batch."""
    compute: float
    """Samples/s of all GPUs if nothing holds them up."""
    network: float
    """Samples/s that the nodes' networks bring in, rows and gradients."""
    store: float
    """Samples/s that the store gives; inf = no limit."""
    gpus: int
    nodes: int
    memory: float
    """Bytes that the lanes hold on a node at most."""
    online_hours: float
    """GPU hours that the stage would take besides, if VAE and CLIP ran in it."""

    @property
    def rate(self) -> float:
        """Samples/s, all GPUs together."""
        return min(self.compute, self.network, self.store)

    @property
    def limit(self) -> str:
        """What sets the pace."""
        rates = {"GPU": self.compute, "network": self.network, "store": self.store}
        return min(rates, key=lambda name: rates[name])

    @property
    def feed_gbit(self) -> float:
        """What the GPUs, if nothing held them up, would read, all together, Gbit/s."""
        return self.compute * self.row_bytes / _GBIT

    @property
    def gradient_gbit(self) -> float:
        """What a node would then receive of gradients, Gbit/s."""
        return self.compute * self.gradient_bytes / _GBIT

    @property
    def hours(self) -> float:
        """Wall time."""
        return self.samples / self.rate / 3600 if self.rate > 0 else math.inf

    @property
    def gpu_hours(self) -> float:
        return self.hours * self.gpus


@dataclass(frozen=True)
class Plan:
    """A run: its curation's GPU stages, what is stored, its training stages."""

    cfg: PlanConfig
    stages: tuple[StagePlan, ...]
    stored_bytes: int
    caption_hours: float
    """GPU hours."""
    feature_hours: float
    """GPU hours."""

    @property
    def gpu_hours(self) -> float:
        return self.caption_hours + self.feature_hours + sum(s.gpu_hours for s in self.stages)


def plan(cfg: PlanConfig) -> Plan:
    """Reckon the run of these settings."""
    tensors = sum(column.nbytes for column in columns(cfg.codec, cfg.scales, cfg.flip))
    encoders = VAE + (0 if cfg.codec == "pixels" else CLIP)
    features = cfg.images * (2 if cfg.flip else 1) * encoders / 1e3 / cfg.encoder_tflops
    kinds = (
        ("semantic", 1, cfg.semantic_steps),
        ("multi_scale", cfg.scales, cfg.multi_scale_steps),
    )
    return Plan(
        cfg,
        tuple(_stage(cfg, *kind) for kind in kinds if kind[2]),
        stored_bytes=cfg.images * tensors,
        caption_hours=cfg.images / cfg.captions_per_s / 3600,
        feature_hours=features / 3600,
    )


def _stage(cfg: PlanConfig, name: str, scales: int, steps: int) -> StagePlan:
    peak = cfg.peak_tflops or PEAK_TFLOPS[cfg.gpu]
    tflops = cfg.gpus * peak * cfg.utilisation
    gflop, size = (
        step_gflop(cfg.codec, scales, cfg.queries),
        row_bytes(cfg.codec, scales, cfg.scales),
    )
    nodes = math.ceil(cfg.gpus / cfg.gpus_per_node)
    # a ring of nodes: each receives the others' gradients twice over, less its own share
    exchanged = 2 * 4 * TRAINABLES * (nodes - 1) / nodes / cfg.global_batch
    network = cfg.network_gbit * _GBIT / (size / nodes + exchanged)
    group = max(1, int(cfg.row_group_mib * 2**20 / row_bytes(cfg.codec, cfg.scales, cfg.scales)))
    window = 2 * (cfg.shuffle_rows + 2 * (group - 1))
    samples = steps * cfg.global_batch
    online = VAE + (0.0 if cfg.codec == "pixels" else CLIP)
    return StagePlan(
        name,
        samples,
        size,
        exchanged,
        compute=tflops * 1e3 / gflop,
        network=network,
        store=cfg.store_gbit * _GBIT / size if cfg.store_gbit else math.inf,
        gpus=cfg.gpus,
        nodes=nodes,
        memory=min(cfg.lanes / nodes * window, cfg.images) * size,
        online_hours=samples * online / 1e3 / (peak * cfg.utilisation) / 3600,
    )


# --- what is said of it ---


def warnings(made: Plan) -> list[str]:
    """What the cluster is short of, a line each, with what would mend it."""
    found, cfg = [], made.cfg
    for stage in made.stages:
        kept = f"keeps the GPUs at {stage.rate / stage.compute:.0%} of their pace"
        feed, mend = stage.feed_gbit, _mend(cfg, stage)
        if stage.limit == "store":
            found.append(f"{stage.name}: the store {kept}, which is {feed:.1f} Gbit/s; {mend}")
        elif stage.limit == "network":
            found.append(
                f"{stage.name}: the network {kept}, which takes a node {feed / stage.nodes:.1f} "
                f"Gbit/s of rows and {stage.gradient_gbit:.1f} of gradients; {mend}"
            )
        if stage.memory > cfg.node_memory_gib * 2**30:
            found.append(
                f"{stage.name}: lanes hold up to {stage.memory / 2**30:,.0f} GiB on a node of "
                f"{cfg.node_memory_gib:,.0f}; lower shuffle_rows or lanes"
            )
    each = cfg.global_batch / cfg.gpus
    if each < _SMALL_BATCH:
        found.append(
            f"{each:g} samples a GPU and step: so few reach less of the peak than is assumed; "
            "raise global_batch, or use fewer GPUs"
        )
    return found


def _mend(cfg: PlanConfig, stage: StagePlan) -> str:
    """The first codec of fewer bytes that frees the GPUs, if there is one."""
    for codec in _CODECS[_CODECS.index(cfg.codec) + 1 :]:
        other = next(s for s in plan(replace(cfg, codec=codec)).stages if s.name == stage.name)
        if other.limit == "GPU":
            return f"--codec {codec} frees them"
    if stage.limit == "network" and stage.gradient_gbit > stage.feed_gbit / stage.nodes:
        return "a larger global_batch exchanges gradients less often"
    return "give it more Gbit/s, or use fewer GPUs"


def table(made: Plan) -> str:
    """The plan as text: curation, training, sums, warnings."""
    cfg = made.cfg
    peak = cfg.peak_tflops or PEAK_TFLOPS[cfg.gpu]
    nodes = math.ceil(cfg.gpus / cfg.gpus_per_node)
    epochs = sum(stage.samples for stage in made.stages) / cfg.images
    lines = [
        f"{cfg.gpus} {cfg.gpu} on {nodes} node{'s' * (nodes > 1)}: {peak:,.0f} TFLOP/s each, of "
        f"which training is assumed to reach {peak * cfg.utilisation:,.0f}",
        f"{cfg.images:,} images, {cfg.codec}, {cfg.scales} scales: "
        f"{made.stored_bytes / 1e12:,.1f} TB to store; {epochs:.1f} epochs",
        "",
        *_aligned(list(_rows(made))),
        "",
        _money(made),
    ]
    if online := sum(stage.online_hours for stage in made.stages):
        lines.append(
            f"with VAE and CLIP run in every step, training would take {online:,.0f} GPU hours more"
        )
    return "\n".join([*lines, *(f"warning: {line}" for line in warnings(made))])


def _rows(made: Plan) -> Iterator[Sequence[str]]:
    cfg = made.cfg
    yield (
        "step", "samples", "bytes each", "Gbit/s to feed", "samples/s per GPU", "limit",
        "GPU hours", "wall", "GiB a node",
    )  # fmt: skip
    for name, hours in (("captions", made.caption_hours), ("features", made.feature_hours)):
        rate = cfg.images / hours / 3600
        wall = _clock(hours / cfg.gpus)
        yield name, f"{cfg.images:,}", "", "", f"{rate:,.0f}", "GPU", f"{hours:,.0f}", wall, ""
    for stage in made.stages:
        yield (
            stage.name,
            f"{stage.samples:,}",
            f"{stage.row_bytes:,}",
            f"{stage.feed_gbit:,.1f}",
            f"{stage.rate / stage.gpus:,.0f}",
            stage.limit,
            f"{stage.gpu_hours:,.0f}",
            _clock(stage.hours),
            f"{stage.memory / 2**30:,.0f}",
        )


def _money(made: Plan) -> str:
    cfg, terabytes = made.cfg, made.stored_bytes / 1e12
    said = f"together {made.gpu_hours:,.0f} GPU hours"
    if cfg.gpu_hour_price:
        said += f" at {cfg.gpu_hour_price:g}: {made.gpu_hours * cfg.gpu_hour_price:,.0f}"
    if cfg.tb_month_price:
        said += f"; a month of the shards: {terabytes * cfg.tb_month_price:,.0f}"
    return said


def _clock(hours: float) -> str:
    if math.isinf(hours):
        return "never"
    return f"{hours / 24:.2f} days" if hours >= 48 else f"{hours:.1f} h"


def _aligned(rows: list[Sequence[str]]) -> list[str]:
    """Columns of text: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if at == 0 else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
