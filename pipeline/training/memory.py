"""What a run takes of a node's memory and of its devices, and what is said where it is too much."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence

import torch

from pipeline.cluster import memory_gib
from pipeline.config import TrainConfig
from pipeline.errors import UserError
from pipeline.progress import say
from pipeline.shards import Manifest
from pipeline.storage import Storage
from pipeline.training.inputs import columns_for
from pipeline.training.lanes import Lanes
from pipeline.training.stage import Stage, World

_NODE_WORKERS = "LOCAL_WORLD_SIZE"  # which Ray Train sets, as torchrun does


def check_rows(
    cfg: TrainConfig, stages: Sequence[Stage], storage: Storage, manifest: Manifest, world: World
) -> None:
    """Say what the rows of each stage may take of this node's memory.

    Raises UserError where a store's would take more than there is: before the first stage is
    trained, for what takes less (lanes, shuffle_rows) shapes all of them.
    """
    told = []
    for stage in stages:
        lanes = lanes_of(cfg, stage, storage, manifest)
        gib = int(os.environ.get(_NODE_WORKERS, 1)) * lanes.memory(world.size) / 2**30
        there = memory_gib()
        most = f"{gib:.1f} GiB" if gib >= 1 else f"{gib * 1024:.1f} MiB"
        said = (
            f"{stage.name}: {cfg.lanes // world.size} lanes a worker, {lanes.row_bytes:,} bytes a "
            f"row, up to {most} in memory on this node, which has {there:.1f} GiB"
        )
        # rows of a local root are the system's cache, which gives way
        if gib > there and not storage.local:
            raise UserError(f"{said}; lower shuffle_rows or lanes, or use more nodes")
        slow = ", and is read again and again: lower shuffle_rows" if gib > there else ""
        told.append(said + slow)
    if told and world.rank == 0:
        say("; ".join(told))


def lanes_of(cfg: TrainConfig, stage: Stage, storage: Storage, manifest: Manifest) -> Lanes:
    """The rows that a stage trains on. Reads nothing yet."""
    return Lanes(
        storage,
        manifest,
        columns_for(manifest.codec, stage.depths),
        lanes=cfg.lanes,
        global_batch=cfg.global_batch,
        shuffle_rows=cfg.shuffle_rows,
        seed=(cfg.seed, stage.number),
        flip=cfg.flip,
        corrupt=cfg.corrupt,
        verify=cfg.verify,
    )


@contextlib.contextmanager
def of_device(cfg: TrainConfig, stage: Stage, world: World) -> Iterator[None]:
    """A device that is too small, in one line: what it was given, and what takes less."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        share = cfg.global_batch // world.size
        rows = min(cfg.micro_batch or share, share)
        less = ["use more workers"]
        if rows > 1:
            less.insert(0, f"set --micro_batch {rows // 2}")
        if not cfg.gradient_checkpointing:
            less.insert(0, "set --gradient_checkpointing true")
        said = " ".join(str(error).split()).partition(". ")[0]
        raise UserError(
            f"{stage.name}: {world.device} of worker {world.rank} is out of memory, at {rows} of "
            f"its {share} samples of a step at once ({said}); {', or '.join(less)}"
        ) from None
