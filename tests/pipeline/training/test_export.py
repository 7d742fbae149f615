"""A model from any checkpoint of either stage: the right weights, whole, and never over another."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline.config import OptimConfig, TrainConfig, parse_command
from pipeline.errors import UserError
from pipeline.storage import Storage
from pipeline.training.checkpoint import Checkpoints
from pipeline.training.commands import COMMANDS
from pipeline.training.export import export
from ssr_model.conditioning import SSREncoder
from tests.pipeline.training.test_run import config, work
from tests.sealed import write_features


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_models: Path) -> Path:
    """The root of a run of both stages with a moving average, its checkpoints all kept."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("trained")
    write_features(root, tiny_models)
    work(config(root, tiny_models, ema_decay=0.5, keep_checkpoints=9))
    return root


def run(*argv: str) -> str:
    command, cfg = parse_command(TrainConfig, COMMANDS, ["export", *argv])
    assert command is not None
    return command.run(cfg)


def test_any_checkpoint_of_either_stage(trained: Path, tmp_path: Path) -> None:
    root = str(trained)
    printed = run("--root", root, "--stage", "1", "--step", "2", "--out", str(tmp_path / "early"))
    assert printed.splitlines() == [
        f"model:    {tmp_path / 'early'} (semantic, step 2 of 3, the moving average)",
        f"next:     python jobs/generate.py --root {root} --model {tmp_path / 'early'}",
    ]
    files = {path.name for path in (tmp_path / "early").iterdir()}
    assert files == {"config.json", "model.safetensors", "README.md"}
    model = SSREncoder.from_pretrained(tmp_path / "early")
    assert model.config.depths == (6,) and model.metadata["step"] == "2"
    saved = trained / "train/semantic/checkpoints/step-00000002"
    ours, ema = model.adapter.state_dict(), load_file(saved / "ema.safetensors")
    raw = load_file(saved / "trainables.safetensors")
    assert ours.keys() == ema.keys()
    assert all(torch.equal(ours[name], ema[name]) for name in ema)
    assert not any(torch.equal(ours[name], raw[name]) for name in raw)

    # without being told: the newest one of the last stage, which is what the run itself exported
    assert "(multi_scale, step 2 of 2" in run("--root", root, "--out", str(tmp_path / "last"))
    last, own = (load_file(f / "model.safetensors") for f in (tmp_path / "last", trained / "model"))
    assert all(torch.equal(last[name], own[name]) for name in own)


def test_to_and_from_an_object_store(trained: Path, bucket: str) -> None:
    away = Storage(f"{bucket}/export")
    away.upload_tree(trained / "train/semantic", "train/semantic")
    assert "(semantic, step 3 of 3" in run("--root", away.url(), "--out", f"{bucket}/made")
    made = Storage(f"{bucket}/made")
    assert made.list() == ["README.md", "config.json", "model.safetensors"]


def test_what_is_not_there_is_named(trained: Path, tmp_path: Path) -> None:
    def refused(match: str, *argv: str) -> None:
        with pytest.raises(UserError, match=match):
            run("--root", str(trained), "--out", str(tmp_path / "made"), *argv)
        assert not (tmp_path / "made").exists()

    refused("no checkpoint of step 7 of semantic under .*; there are: 2, 3$",
            "--stage", "1", "--step", "7")  # fmt: skip
    refused("no checkpoint of semantic or multi_scale yet under", "--root", str(tmp_path))
    with pytest.raises(UserError, match="--out is missing"):
        run("--root", str(trained))


def test_a_damaged_checkpoint_gives_no_model(root: Path, tmp_path: Path, tiny_models: Path) -> None:
    off = OptimConfig(steps=0)
    work(config(root, tiny_models, multi_scale=off))
    file = root / "train/semantic/checkpoints/step-00000003/trainables.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match="is not what was written there"):
        export(Storage(root), 1, 3, Storage(tmp_path / "made"))
    assert not (tmp_path / "made").exists()
    # asked for the newest, it takes the one before
    assert "step 2 of 3" in export(Storage(root), None, None, Storage(tmp_path / "made")).said


@pytest.mark.parametrize("name", ["README.md", "model.safetensors", "config.json"])
def test_nothing_of_the_users_is_overwritten(trained: Path, tmp_path: Path, name: str) -> None:
    mine = tmp_path / name
    mine.write_text("mine")
    with pytest.raises(UserError, match=rf"{re.escape(str(mine))} is there already: name another"):
        export(Storage(trained), 1, None, Storage(tmp_path))
    assert mine.read_text() == "mine" and list(tmp_path.iterdir()) == [mine]


def test_a_full_disk_leaves_nothing_half_written(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Storage.write_bytes

    def full(self: Storage, path: str, data: bytes) -> None:
        if path == "config.json":
            raise UserError(f"cannot write {path}: the disk is full")
        write(self, path, data)

    monkeypatch.setattr(Storage, "write_bytes", full)
    with pytest.raises(UserError, match="the disk is full"):
        export(Storage(trained), 1, None, Storage(tmp_path / "made"))
    assert list((tmp_path / "made").iterdir()) == []


def test_a_checkpoint_that_does_not_say_its_model(trained: Path, tmp_path: Path) -> None:
    source = Checkpoints(Storage(trained).sub("train/semantic"))
    old = source.load(3)
    del old.info["config"]
    Checkpoints(Storage(tmp_path / "train/semantic")).save(old)
    with pytest.raises(UserError, match=r"does not say which model it is of .* earlier version"):
        export(Storage(tmp_path), 1, None, Storage(tmp_path / "made"))
