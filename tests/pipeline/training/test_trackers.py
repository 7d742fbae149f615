"""Those who are told a run's figures, as they are: wandb offline, MLflow on files."""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import IMAGES, EventAccumulator

from pipeline.errors import UserError
from pipeline.storage import Storage
from pipeline.training import trackers
from pipeline.training.run import Run
from tests.pipeline.training.test_loop import config, made, metrics
from tests.pipeline.training.test_run import config as run_config
from tests.stage_loops import interrupt

SAMPLING = {"sample_steps": 3, "sample_rows": 1, "sample_denoising": 1}


def interrupted(root: Path, folder: Path, **settings: Any) -> list[dict[str, Any]]:
    """A run that is stopped after step 5, goes on from step 4 and ends at 6; its records."""
    cfg = config(root, **SAMPLING, **settings)
    half = made(cfg, folder)
    interrupt(half, 5)
    with pytest.raises(KeyboardInterrupt):
        half.run()
    made(cfg, folder).run()
    return metrics(root)


def test_tensorboard_is_always_told(root: Path, tiny_models: Path) -> None:
    records = interrupted(root, tiny_models)
    events = EventAccumulator(str(root / "train/tensorboard/multi_scale")).Reload()
    names = {f"multi_scale/{k}" for r in records for k, v in r.items() if isinstance(v, float)}
    assert set(events.Tags()["scalars"]) == names and not events.Tags()["images"]
    pictures = EventAccumulator(str(root / "train/tensorboard/samples"), {IMAGES: 0}).Reload()
    # files of one second are read by their numbers as text
    assert sorted(image.step for image in pictures.Images("multi_scale/samples")) == [0, 3, 6]
    losses = {r["step"]: r["loss"] for r in records if "loss" in r}
    assert {e.step: e.value for e in events.Scalars("multi_scale/loss")} == pytest.approx(losses)


def test_wandb_offline_is_one_run(
    root: Path, tiny_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB__SERVICE_WAIT", "300")  # its service starts beside other tests
    monkeypatch.delenv("WANDB_DIR", raising=False)
    records = interrupted(root, tiny_models, trackers=["wandb"])
    identity = Storage(root).read_json("train/trackers/wandb.json")["run"]
    files = sorted((root / "train/wandb").glob("*/*.wandb"))
    assert files and {file.stem for file in files} == {f"run-{identity}"}
    told: dict[int, float] = {}
    pictures: set[int] = set()
    for file in files:
        for data in entries(file.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            row = {".".join(i.nested_key) or i.key: i.value_json for i in record.history.item}
            if "multi_scale/loss" in row:
                told[int(row["multi_scale/step"])] = float(row["multi_scale/loss"])
            if any(key.split(".")[0] == "multi_scale/samples" for key in row):
                pictures.add(int(row["multi_scale/step"]))
    assert told == pytest.approx({r["step"]: r["loss"] for r in records if "loss" in r})
    assert pictures == {0, 3, 6}


def entries(data: bytes) -> Iterator[bytes]:
    """The records of a .wandb file: LevelDB's log in blocks of 32 KiB, behind a head of 7 bytes."""
    at, parts = 7, b""
    while at + 7 < len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        parts += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def test_mlflow_is_one_run(
    root: Path, tiny_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow", reason="the extra mlflow is not installed")
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    records = interrupted(root, tiny_models, trackers=["mlflow"])
    client = MlflowClient()
    identity = Storage(root).read_json("train/trackers/mlflow.json")["run"]
    run = client.get_run(identity)
    assert run.info.status == "FINISHED" and run.data.params["global_batch"] == "8"
    told = {m.step: m.value for m in client.get_metric_history(identity, "multi_scale/loss")}
    assert told == pytest.approx({r["step"]: r["loss"] for r in records if "loss" in r})
    there = [file.path for file in client.list_artifacts(identity, "multi_scale/samples")]
    assert there == [f"multi_scale/samples/step-{step:08d}.png" for step in (0, 3, 6)]
    (experiment,) = {r.info.experiment_id for r in [run]}
    assert len(client.search_runs([experiment])) == 1


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_one_that_is_missing_is_named(
    root: Path, tiny_models: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda of, *more: None if of == name else found(of, *more)
    )
    with pytest.raises(UserError, match=rf"{name} is not installed .*'ssr-on-ray\[{name}\]'"):
        Run(run_config(root, tiny_models, trackers=[name]))


def test_nobody_is_told_credentials() -> None:
    settings = {"models": {"base": "https://me:hunter2@host/x?token=deadbeef"}, "seed": 3}
    told = trackers._shown(settings)
    assert told["seed"] == 3 and "host/x" in told["models.base"]
    assert "hunter2" not in str(told) and "deadbeef" not in str(told)


def test_a_service_that_fails_tells_no_credentials(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hunter2")
    monkeypatch.setenv("WANDB_API_KEY", "deadbeefdeadbeef")

    def begin() -> Any:
        raise ConnectionError("https://me:hunter2@host refused deadbeefdeadbeef and hunter2")

    tracker = trackers.Told("service", begin)
    tracker.log({"step": 1})
    tracker.close()
    said = capsys.readouterr().out
    assert "https://***@host refused *** and ***" in said


def test_mlflow_needs_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow", reason="the extra mlflow is not installed")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(UserError, match="MLFLOW_TRACKING_URI"):
        trackers.check(["mlflow"])


def test_a_service_that_fails_ends_no_run(capsys: pytest.CaptureFixture[str]) -> None:
    told: list[Any] = []
    up = threading.Event()

    class Service:
        def log(self, record: Any) -> None:
            if record["step"] in (2, 3):
                raise ConnectionError("no route\nto host")
            told.append(record["step"])

        def picture(self, step: int, picture: Image.Image) -> None:
            told.append(("picture", step))

        def publish(self) -> None: ...

        def close(self) -> None:
            told.append("closed")

    def begin() -> Service:
        if not up.is_set():
            up.set()
            raise TimeoutError
        return Service()

    tracker = trackers.Told("service", begin)
    for step in range(5):
        tracker.log({"step": step})
    tracker.picture(5, Image.new("RGB", (2, 2)))
    tracker.close()
    assert told == [1, 4, ("picture", 5), "closed"]
    said = [line for line in capsys.readouterr().out.splitlines() if line]
    assert said == [
        "warning: service was not told everything: TimeoutError",
        "warning: service was not told everything: no route to host",
    ]
