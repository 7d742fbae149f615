"""What can be wrong with what a run is given: one line each, nothing half-written, and the last
good checkpoint is there to go on from.
"""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import boto3
import pytest
import torch
from moto.server import ThreadedMotoServer

from pipeline.config import OptimConfig, TrainConfig
from pipeline.errors import UserError
from pipeline.progress import Progress
from pipeline.storage import Storage
from pipeline.storage_faults import PATIENCE_VARIABLE
from pipeline.storage_local import LocalFile
from pipeline.training.checkpoint import Checkpoints
from pipeline.training.learner import Learner
from pipeline.training.loop import StageLoop
from pipeline.training.run import Run
from pipeline.training.trainer import fit
from ssr_model.weights import load_adapter
from tests.pipeline.training.test_run import config, work
from tests.ports import free_port

OFF = OptimConfig(steps=0)
LONG = OptimConfig(steps=6, lr=1e-2)


def refused(cfg: TrainConfig, match: str) -> None:
    """Before anything is started, in one line, and with nothing written."""
    with pytest.raises(UserError, match=match) as caught:
        Run(cfg)
    assert "\n" not in str(caught.value)
    assert not Storage(cfg.root).list("train") and not Storage(cfg.root).list("model")


def steps(root: Path) -> list[int]:
    return Checkpoints(Storage(root).sub("train/semantic")).steps()


def model(root: Path) -> dict[str, torch.Tensor]:
    return load_adapter(root / "model")[0].state_dict()


def manifest(root: Path, **changed: Any) -> None:
    path = root / "features/manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))


@pytest.mark.parametrize("role", ["vision", "vae", "text"])
def test_shards_of_other_encoders(root: Path, tiny_models: Path, role: str) -> None:
    sealed = json.loads((root / "features/manifest.json").read_text())["encoders"]
    manifest(root, encoders={**sealed, role: {"name": "their/own", "sha256": "0" * 64}})
    refused(config(root, tiny_models), rf"^{role} encoder .* is not the one .*\(their/own;")


def test_shards_of_another_schema(root: Path, tiny_models: Path) -> None:
    manifest(root, schema_version=1)
    refused(config(root, tiny_models), "has schema version 1, this code reads .* curate it again")


def test_shards_from_half_a_curation(root: Path, tiny_models: Path) -> None:
    """Shards are there, and nothing says that they are all."""
    (root / "features/manifest.json").unlink()
    refused(config(root, tiny_models), "no sealed features: .* run jobs/curate.py first")


def test_workers_that_do_not_divide_the_lanes(
    root: Path, tiny_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 8.0})
    run = Run(config(root, tiny_models, workers=3, lanes=4))
    with pytest.raises(UserError, match=r"^3 workers do not divide 4 lanes; change one of them$"):
        fit(run, Progress())
    assert not (root / "train").exists()


@contextmanager
def small_device(monkeypatch: pytest.MonkeyPatch, at_step: int) -> Iterator[None]:
    """A device whose memory ends in the middle of a step."""
    losses = Learner.losses

    def full(self: Learner, *given: Any) -> Any:
        if self.step == at_step and torch.is_grad_enabled():
            raise torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity ...\n"
            )
        return losses(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "losses", full)
        yield


def test_a_device_out_of_memory(
    root: Path, tiny_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = config(root, tiny_models, semantic=LONG, multi_scale=OFF)
    says = (
        r"^semantic: cpu of worker 0 is out of memory, at 4 of its 4 samples of a step at once "
        r"\(CUDA out of memory\); set --gradient_checkpointing true, or set --micro_batch 2, or use"
    )
    with small_device(monkeypatch, 3), pytest.raises(UserError, match=says) as caught:
        work(cfg)
    assert "\n" not in str(caught.value) and steps(root) == [2]
    least = replace(cfg, micro_batch=1, gradient_checkpointing=True)
    with small_device(monkeypatch, 3), pytest.raises(UserError, match=r"1 of its 4 .*; use more"):
        work(least)
    work(replace(cfg, micro_batch=2))  # what it says is what mends it
    assert Run(cfg).finished


def test_less_at_once_is_less_everywhere(
    root: Path, tiny_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Validation too puts no more than a micro batch through the model."""
    seen, losses = [], Learner.losses

    def watched(self: Learner, module: Any, inputs: Any) -> Any:
        seen.append(len(inputs.keys))
        return losses(self, module, inputs)

    monkeypatch.setattr(Learner, "losses", watched)
    cfg = config(root, tiny_models, semantic=LONG, multi_scale=OFF, validate_rows=8)
    work(replace(cfg, micro_batch=2))
    assert set(seen) == {2} and len(seen) == 6 * 2 + 2 * 4  # steps, and two validations


def test_a_checkpoint_of_another_variant(root: Path, tmp_path: Path, tiny_models: Path) -> None:
    theirs = tmp_path / "theirs"
    shutil.copytree(root / "features", theirs / "features")
    work(config(theirs, tiny_models, variant="released", multi_scale=OFF))
    shutil.copytree(theirs / "train/semantic/checkpoints", root / "train/semantic/checkpoints")
    before = sorted(root.rglob("*"))
    with pytest.raises(UserError, match=r"is of another model .* choose another root") as caught:
        work(config(root, tiny_models, multi_scale=OFF))
    assert "step 3 of semantic" in str(caught.value)
    new = {path.name for path in set(root.rglob("*")) - set(before)}
    assert new == {"settings.json", "owner.json"}


def test_a_disk_that_is_full_while_saving(
    root: Path, tmp_path: Path, tiny_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = config(root, tiny_models, semantic=LONG, multi_scale=OFF)
    shutil.copytree(root / "features", tmp_path / "whole/features")
    work(replace(cfg, root=str(tmp_path / "whole")))
    write = LocalFile.write

    def full(self: LocalFile, data: Any) -> Any:
        if "step-00000004/optimizer" in str(self._target):
            write(self, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(LocalFile, "write", full)
        with pytest.raises(UserError, match=r"step-00000004/.*: the disk is full; free space and"):
            work(cfg)
    assert steps(root) == [2]
    left = {path.name for path in (root / "train/semantic/checkpoints/step-00000004").iterdir()}
    assert left == {"trainables.safetensors"}  # whole, and no checkpoint without its marker
    work(cfg)
    ours, theirs = model(root), model(tmp_path / "whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_bucket_that_goes_away(
    root: Path, tiny_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store's server is stopped after a checkpoint; when it is back, the run goes on."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=free_port(), verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for key, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "testkey",
        "AWS_SECRET_ACCESS_KEY": "testsecret",
        "AWS_DEFAULT_REGION": "us-east-1",
        PATIENCE_VARIABLE: "0.5",
    }.items():
        monkeypatch.setenv(key, value)
    boto3.client("s3").create_bucket(Bucket="leaving")
    away = Storage("s3://leaving/run")
    away.upload_tree(root / "features", "features")
    cfg = config(away.url(), tiny_models, semantic=LONG, multi_scale=OFF)
    take, servers = StageLoop._take, [server]

    def leaving(self: StageLoop, inputs: Any) -> None:
        if self.step == 3 and servers:
            assert self.saver is not None
            self.saver.wait()
            servers.pop().stop()
        take(self, inputs)

    monkeypatch.setattr(StageLoop, "_take", leaving)
    with pytest.raises(UserError, match=r"s3://leaving/run/.*run the same command again") as caught:
        work(cfg)
    assert "\n" not in str(caught.value) and "testsecret" not in str(caught.value)

    again = ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
    again.start()  # what was stored is there
    try:
        saved = Checkpoints(away.sub("train/semantic"))
        assert saved.steps() == [2] and saved.newest() == 2
        work(cfg)
        work(replace(cfg, root=str(root)))
        away.download_tree("model", root / "away")
        ours, theirs = load_adapter(root / "away")[0].state_dict(), model(root)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    finally:
        again.stop()
