"""A trained SSR-Encoder as a folder for `SSREncoder.from_pretrained`, from any checkpoint.

A checkpoint says itself which model it is of, so that nothing else of its run is needed: neither
settings nor shards nor the models that it stands on.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import UserError
from pipeline.storage import Storage
from pipeline.training.checkpoint import Checkpoints, Weights
from pipeline.training.stage import STAGES
from ssr_model.config import SSRConfig
from ssr_model.encoder import SSRAdapter
from ssr_model.weights import CARD, CONFIG, WEIGHTS, save_adapter

_FILES = (CARD, WEIGHTS, CONFIG)  # the config comes last: a folder without it is no model


@dataclass(frozen=True)
class Exported:
    """What was written."""

    folder: str
    """Where it lies."""
    said: str
    """For people: which weights they are."""


def export(root: Storage, number: int | None, step: int | None, target: Storage) -> Exported:
    """Write a checkpoint of the run under `root` as a model into `target`, whole or not at all.

    Args:
        number: of the stage, 1 or 2; none = the last one that has a checkpoint.
        step: of the checkpoint; none = the newest whole one.

    Raises:
        UserError: there is no such checkpoint, or it is damaged; `target` holds a model already,
            or cannot be written.
    """
    for name in _FILES:
        if target.exists(name):
            raise UserError(
                f"{target.url(name)} is there already: name another folder with --out, or delete it"
            )
    of_stage = {
        stage: Checkpoints(root.sub(f"train/{stage}"))
        for each, stage in STAGES.items()
        if number in (None, each)
    }
    begun = {stage: steps for stage in of_stage if (steps := of_stage[stage].steps())}
    if not begun:
        which = " or ".join(of_stage)
        raise UserError(f"no checkpoint of {which} yet under {root.url('train')}")
    stage, there = list(begun.items())[-1]
    checkpoints = of_stage[stage]
    step = checkpoints.newest() if step is None else step
    if step not in there:
        kept = ", ".join(map(str, there))
        raise UserError(
            f"no checkpoint of step {step} of {stage} under {root.url('train')}; there are: {kept}"
        )
    weights = checkpoints.weights(step)
    write_model(target, adapter_of(weights), origin(weights))
    last, averaged = weights.info["stage"]["optim"]["steps"], weights.averaged
    kind = ", the moving average" if averaged else ""
    return Exported(target.url(), f"{stage}, step {step} of {last}{kind}")


def write_model(target: Storage, adapter: SSRAdapter, said: Mapping[str, Any]) -> None:
    """Write a model into `target`, in place of one that is there; its config.json, without which it
    is none, goes first and comes last. `said` is what it says of itself.
    """
    with tempfile.TemporaryDirectory(prefix="ssr-model-") as folder:
        save_adapter(folder, adapter, said)
        target.delete(CONFIG)
        try:
            for name in _FILES:
                target.write_bytes(name, (Path(folder) / name).read_bytes())
        except BaseException:
            for name in _FILES:
                with suppress(UserError):
                    target.delete(name)
            raise


def adapter_of(weights: Weights) -> SSRAdapter:
    """The model that a checkpoint's weights are of."""
    which = f"the checkpoint of step {weights.step}"
    try:
        config = SSRConfig.from_dict(weights.info["config"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{which} does not say which model it is of ({error}); it is of an earlier version of "
            "this code"
        ) from None
    with torch.device("meta"):  # before any memory is taken
        adapter = SSRAdapter(config)
    theirs = {name: tuple(tensor.shape) for name, tensor in weights.tensors.items()}
    ours = {name: tuple(tensor.shape) for name, tensor in adapter.state_dict().items()}
    if odd := sorted(name for name, _ in theirs.items() ^ ours.items()):
        raise UserError(f"{which} is not of the model that it says ({odd[0]} differs)")
    for name, tensor in weights.tensors.items():
        if not tensor.isfinite().all():
            raise UserError(f"{which} holds NaN or infinite values ({name})")
    adapter.load_state_dict(weights.tensors, assign=True)
    return adapter


def origin(weights: Weights) -> dict[str, Any]:
    """What a model from a checkpoint says of itself."""
    return {
        "base_model": weights.info["base_model"],
        "vision_model": weights.info["vision_model"],
        "stage": weights.info["stage"]["name"],
        "step": weights.step,
    }
