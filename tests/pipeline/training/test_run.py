"""A run in one process, without Ray: its stages, what is done of it, what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, load_file

from pipeline.config import ModelsConfig, OptimConfig, TrainConfig
from pipeline.errors import UserError
from pipeline.storage import Storage
from pipeline.training.checkpoint import Checkpoints
from pipeline.training.loop import StageLoop
from pipeline.training.run import Run
from pipeline.training.stage import World
from ssr_model.conditioning import SSREncoder
from ssr_model.config import VARIANTS

EXPORT = "model/model.safetensors"


def config(root: Path | str, folder: Path, **fields: Any) -> TrainConfig:
    given = {
        "root": str(root),
        "models": ModelsConfig(base=str(folder / "sd"), vision=str(folder / "clip")),
        "global_batch": 4,
        "lanes": 2,
        "heads": 2,
        "head_dim": 8,
        "semantic": OptimConfig(steps=3, lr=1e-2),
        "multi_scale": OptimConfig(steps=2, lr=1e-2),
        "checkpoint_steps": 2,
        "validate_rows": 4,
        "sample_steps": 0,
    }
    return TrainConfig(**{**given, **fields})


def work(cfg: TrainConfig) -> dict[str, Any]:
    run = Run(cfg)
    run.take_over()
    return run.work(World())


def test_two_stages_and_an_export(root: Path, tiny_models: Path) -> None:
    cfg = config(root, tiny_models)
    assert not Run(cfg).finished and Run(cfg).position() == (0, 0)
    figures = work(cfg)
    assert figures["semantic"]["step"] == 3 and figures["multi_scale"]["step"] == 2
    run = Run(cfg)
    assert run.finished and run.position() == (2, 0) and run.figures() == figures
    model = SSREncoder.from_pretrained(root / "model")
    assert model.config.depths == (2, 4, 6)
    assert model.metadata["stage"] == "multi_scale" and model.metadata["step"] == "2"

    # the second stage began where the first ended, its new scales as copies of the last one
    first = Checkpoints(run.storage.sub("train/semantic")).load(3).trainables
    frozen = run._frozen(torch.device("cpu"))
    begun = run._adapter(run.stages[1], frozen).state_dict()
    assert all(torch.equal(begun[name], value) for name, value in first.items())
    for depth in ("2", "4"):
        assert torch.equal(begun[f"encoder.to_v.{depth}.weight"], first["encoder.to_v.6.weight"])
    last = Checkpoints(run.storage.sub("train/multi_scale")).load(2).trainables
    assert not torch.equal(last["encoder.to_v.2.weight"], last["encoder.to_v.4.weight"])

    # without its export a run is not finished, and goes on to export only
    (root / "model" / "config.json").unlink()
    exported = load_file(root / EXPORT)
    assert not run.finished
    assert work(cfg) == figures and Run(cfg).finished
    again = load_file(root / EXPORT)
    assert all(torch.equal(exported[name], again[name]) for name in exported)


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_the_variant_is_the_shape_that_is_trained(
    root: Path, tiny_models: Path, variant: str
) -> None:
    off = OptimConfig(steps=0)
    shape = {"variant": variant, "heads": None, "head_dim": None, "multi_scale": off}
    work(config(root, tiny_models, **shape))
    found = SSREncoder.from_pretrained(root / "model").config
    assert found.variant == variant
    assert {key: getattr(found, key) for key in VARIANTS[variant]} == VARIANTS[variant]


def test_the_same_on_an_object_store(root: Path, tiny_models: Path, bucket: str) -> None:
    away = Storage(f"{bucket}/runs/one")
    away.upload_tree(root / "features", "features")
    figures = work(config(away.url(), tiny_models))
    here = work(config(root, tiny_models))
    assert [figures[s]["loss"] for s in figures] == [here[s]["loss"] for s in here]
    ours, theirs = load(away.read_bytes(EXPORT)), load_file(root / EXPORT)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert away.list("train/tensorboard")
    assert Run(config(away.url(), tiny_models)).finished


def test_changed_settings_are_refused_by_name(root: Path, tiny_models: Path) -> None:
    one = {"multi_scale": OptimConfig(steps=0)}
    work(config(root, tiny_models, **one))
    assert SSREncoder.from_pretrained(root / "model").config.depths == (6,)

    def refused(match: str, **fields: Any) -> None:
        with pytest.raises(UserError, match=match):
            Run(config(root, tiny_models, **{**one, **fields}))

    refused("seed is 3, but semantic .* begun with 0", seed=3)
    refused("semantic.lr is 0.5, but semantic", semantic=OptimConfig(steps=3, lr=0.5))
    refused("global_batch is 8", global_batch=8)
    # how a run is spread, watched and kept does not shape it; a stage that has not begun is free
    Run(config(root, tiny_models, **one, workers=1, log_steps=1, keep_checkpoints=5))
    run = Run(config(root, tiny_models, multi_scale=OptimConfig(steps=2, lr=0.3)))
    assert not run.finished and run.position() == (1, 0)


def test_a_newer_run_takes_over(root: Path, tiny_models: Path) -> None:
    old, new = Run(config(root, tiny_models)), Run(config(root, tiny_models))
    old.take_over()
    old.check_owner()
    new.take_over()
    with pytest.raises(UserError, match="another run took over"):
        old.work(World())
    assert not (root / "train/semantic/checkpoints").exists()
    new.check_owner()


def test_one_that_was_taken_over_writes_no_checkpoint(
    root: Path, tiny_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(config(root, tiny_models))
    run.take_over()
    step = StageLoop._take

    def overtaken(self: StageLoop, inputs: Any) -> None:
        if self.step == 2:
            Run(config(root, tiny_models)).take_over()
        step(self, inputs)

    monkeypatch.setattr(StageLoop, "_take", overtaken)
    with pytest.raises(UserError, match="another run took over"):
        run.work(World())
    assert Checkpoints(run.storage.sub("train/semantic")).steps() == [2]


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"global_batch": 5}, "global_batch 5 is not a multiple of lanes 2"),
        ({"drop_query": 1.5}, "drop_query is 1.5; it must lie between 0 and 1"),
        ({"seed": -1}, "seed is -1; it must be at least 0"),
        ({"semantic": OptimConfig(steps=-1)}, "semantic.steps is -1"),
        (
            {"semantic": OptimConfig(steps=0), "multi_scale": OptimConfig(steps=0)},
            "both 0: there is nothing to train",
        ),
    ],
)
def test_settings_that_cannot_be(
    root: Path, tiny_models: Path, fields: dict[str, Any], match: str
) -> None:
    with pytest.raises(UserError, match=match):
        Run(config(root, tiny_models, **fields))
    assert not (root / "train").exists()
