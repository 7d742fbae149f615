"""What a run begins from: any trained weights, checked before anything starts, applied once."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import models
from pipeline.config import OptimConfig, TrainConfig
from pipeline.errors import UserError
from pipeline.storage import Storage
from pipeline.training.checkpoint import Checkpoints
from pipeline.training.export import export
from pipeline.training.run import Run
from ssr_model import SSRAdapter, SSRConfig, released
from ssr_model.weights import load_adapter, save_adapter
from tests.pipeline.training.test_run import config, work
from tests.sealed import DEPTHS, write_features

OFF = OptimConfig(steps=0)


def shape(folder: Path, **fields: Any) -> SSRConfig:
    sd, clip = str(folder / "sd"), str(folder / "clip")
    given = {"depths": DEPTHS, "heads": 2, "head_dim": 8, **fields}
    return SSRConfig.from_models(
        models.load_vision_config(clip),
        models.load_text_config(sd),
        models.load_unet_config(sd),
        **given,  # type: ignore[arg-type]
    )


def saved(folder: Path, shape: SSRConfig, seed: int = 5) -> SSRAdapter:
    torch.manual_seed(seed)
    adapter = SSRAdapter(shape)
    save_adapter(folder, adapter)
    return adapter


def begun(cfg: TrainConfig, stage: int = 0) -> dict[str, torch.Tensor]:
    """The weights that a stage begins from, as a worker makes them."""
    run = Run(cfg)
    run.take_over()
    run = pickle.loads(pickle.dumps(run))  # noqa: S301 (our own, as Ray sends it)
    return run._adapter(run.stages[stage], run._frozen(torch.device("cpu"))).state_dict()


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, tiny_models: Path) -> Path:
    """The root of a stage 1 run, with a moving average."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("first")
    write_features(root, tiny_models)
    work(config(root, tiny_models, multi_scale=OFF, ema_decay=0.5))
    return root


def test_a_saved_encoder(root: Path, tmp_path: Path, tiny_models: Path) -> None:
    """Stage 1 takes its scale of it, stage 2 those that stage 1 did not train."""
    theirs = saved(tmp_path / "mine", shape(tiny_models)).state_dict()
    cfg = config(root, tiny_models, init=str(tmp_path / "mine"))
    ours = begun(cfg)
    assert same(ours, theirs) and "encoder.to_v.2.weight" not in ours
    work(cfg)
    second = begun(cfg, 1)
    trained = Checkpoints(Storage(root).sub("train/semantic")).load(3).trainables
    assert same(trained, second) and not same(ours, second)
    for scale in ("encoder.to_v.2.weight", "encoder.to_v.4.weight"):
        assert torch.equal(second[scale], theirs[scale])


@pytest.mark.parametrize("step", [2, 3])
def test_stage_two_alone_from_any_checkpoint_of_stage_one(
    root: Path, first: Path, tiny_models: Path, step: int
) -> None:
    folder = first / f"train/semantic/checkpoints/step-0000000{step}"
    ours = begun(config(root, tiny_models, semantic=OFF, init=str(folder)))
    theirs = Checkpoints(Storage(first).sub("train/semantic")).load(step)
    assert theirs.ema and same(theirs.ema, ours)
    for depth in (2, 4):
        assert torch.equal(ours[f"encoder.to_v.{depth}.weight"], ours["encoder.to_v.6.weight"])


def test_stage_two_alone_is_what_it_is_in_one_run(root: Path, tiny_models: Path) -> None:
    """To the bit, apart from the stage's number in the seeds: the same first weights."""
    work(config(root, tiny_models))
    step = root / "train/semantic/checkpoints/step-00000003"
    alone = config(root.parent / "alone", tiny_models, semantic=OFF, init=str(step))
    Storage(root.parent / "alone").upload_tree(root / "features", "features")
    work(alone)
    ours, theirs = (load_adapter(Path(at) / "model")[0].state_dict() for at in (alone.root, root))
    assert same(ours, theirs)


def test_released_weights(root: Path, tmp_path: Path, tiny_models: Path) -> None:
    theirs = saved(tmp_path / "theirs", shape(tiny_models, variant="released"))
    files = tmp_path / "pytorch_model.bin", tmp_path / "pytorch_model_1.bin"
    released.save(theirs, *files)
    cfg = config(root, tiny_models, variant="released", init=str(tmp_path))
    assert same(begun(cfg, 0), theirs.state_dict())
    assert same(begun(replace(cfg, semantic=OFF)), theirs.state_dict())
    with pytest.raises(UserError, match=r"has variant released, this run paper; set --variant rel"):
        Run(replace(cfg, variant="paper"))
    files[1].write_bytes(pickle.dumps(print))
    with pytest.raises(UserError, match=r"^init: .*pytorch_model_1.bin is no state dict"):
        Run(cfg)


def test_on_an_object_store(root: Path, first: Path, tiny_models: Path, bucket: str) -> None:
    away = Storage(f"{bucket}/init")
    away.upload_tree(root / "features", "features")
    export(Storage(first), 1, None, away.sub("made"))
    theirs = Checkpoints(Storage(first).sub("train/semantic")).load(3).ema
    cfg = config(away.url(), tiny_models, semantic=OFF, init=away.url("made"))
    assert same(theirs, begun(cfg))
    work(cfg)
    assert Run(cfg).finished


def test_a_restart_applies_it_never_again(root: Path, tmp_path: Path, tiny_models: Path) -> None:
    """And needs the source no more; other weights are refused once the run has begun."""
    saved(tmp_path / "mine", shape(tiny_models))
    cfg = config(root, tiny_models, init=str(tmp_path / "mine"), checkpoint_steps=1)
    work(cfg)
    whole = load_adapter(root / "model")[0].state_dict()
    # as if it had been killed at the last step but one of each stage
    for path in ("train/semantic/done.json", "train/multi_scale/done.json", "train/done.json"):
        (root / path).unlink()
    for stage, step in (("semantic", 3), ("multi_scale", 2)):
        Storage(root).delete(f"train/{stage}/checkpoints/step-0000000{step}")
    (tmp_path / "mine").rename(tmp_path / "moved")
    assert Run(cfg).position() == (0, 2)
    work(cfg)
    assert same(load_adapter(root / "model")[0].state_dict(), whole)

    Run(replace(cfg, init=str(tmp_path / "moved")))  # the same weights elsewhere
    saved(tmp_path / "other", shape(tiny_models), seed=6)
    for init in (str(tmp_path / "other"), None):
        with pytest.raises(UserError, match=r"init \(sha256\) is .*, but semantic .* begun with"):
            Run(replace(cfg, init=init))


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"variant": "released"}, "has variant released, this run paper; set --variant released"),
        ({"heads": 4}, "has heads 4, this run 2; set --heads 4, or begin from others"),
        ({"start_token": False}, "has start_token false, this run true; set --start_token false"),
        ({"depths": (2, 4)}, "takes its keys from depth 4 of the vision model, the shards from 6"),
        ({"wider": 1}, "trained on other models than models.base and models.vision"),
    ],
)
def test_weights_of_another_model_are_refused(
    root: Path, tmp_path: Path, tiny_models: Path, fields: dict[str, Any], match: str
) -> None:
    wider = fields.get("wider", 0)
    theirs = shape(tiny_models, **{key: v for key, v in fields.items() if key != "wider"})
    saved(tmp_path / "mine", replace(theirs, vision_dim=theirs.vision_dim + wider))
    with pytest.raises(UserError, match=match):
        Run(config(root, tiny_models, init=str(tmp_path / "mine")))
    assert not (root / "train").exists()


def test_what_is_no_weights_is_refused(root: Path, first: Path, tiny_models: Path) -> None:
    def refused(match: str, init: Path | str) -> None:
        with pytest.raises(UserError, match=match):
            Run(config(root, tiny_models, init=str(init)))
        assert not (root / "train").exists()

    refused(r"init: .* no such folder, and not a hub id", root / "nothing")
    refused("init: .* is neither a saved SSR-Encoder .* nor a checkpoint", root / "features")
    refused(f"name {first / 'model'}$", first)
    step = first / "train/semantic/checkpoints/step-00000003"
    Storage(root / "copy/step-00000003").upload_tree(step, "")
    (root / "copy/step-00000003/ema.safetensors").write_bytes(b"half")
    refused("is not what was written there", root / "copy/step-00000003")
    Storage(root / "damaged").upload_tree(first / "model", "")
    (root / "damaged/model.safetensors").write_bytes(b"half")
    refused(r"init: .*model.safetensors is not a safetensors file", root / "damaged")
