"""Who is told a run's figures besides metrics.jsonl: TensorBoard always, others where asked for.

Weights & Biases and MLflow are told in threads of their own, and what their services fail of ends
no run. A run's id is kept in train/trackers/<name>.json: after a restart, and in the next stage,
the same run goes on. Where they are and who may write is said by their own environment variables
(WANDB_*, MLFLOW_*), on the node of rank 0.
"""

from __future__ import annotations

import importlib.util
import os
import queue
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from pipeline import page
from pipeline.errors import UserError
from pipeline.progress import say
from pipeline.storage import Storage
from pipeline.storage_faults import public, scrubbed

TENSORBOARD = "train/tensorboard"
_PROJECT = "ssr-on-ray"
_PATIENCE_S = 60.0
_MOST_PARAMS, _MOST_LETTERS = 100, 500
Record = Mapping[str, Any]


class Tracker(Protocol):
    """Is told figures; numbers of a record are its floats."""

    def log(self, record: Record) -> None:
        """One record; its step is record["step"]."""

    def picture(self, step: int, picture: Image.Image) -> None:
        """A grid of samples."""

    def publish(self) -> None:
        """Let others see what was told so far. Raises UserError when the run's store refuses."""

    def close(self) -> None:
        """All was told."""


def check(names: Iterable[str]) -> None:
    """Raises UserError for a tracker that is not installed here."""
    for name in names:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # a folder of that name is no package
            raise UserError(
                f"trackers: {name} is not installed here; pip install 'ssr-on-ray[{name}]', or "
                "leave it out"
            )
        if name == "mlflow" and not os.environ.get("MLFLOW_TRACKING_URI"):
            raise UserError("trackers: mlflow needs MLFLOW_TRACKING_URI, its server's address")


def trackers(
    names: Iterable[str], storage: Storage, stage: str, start: int, settings: Mapping[str, Any]
) -> list[Tracker]:
    """TensorBoard and those named, for a stage that goes on from step `start`."""
    others: dict[str, Callable[[], Tracker]] = {
        "wandb": lambda: WandB(storage, stage, settings),
        "mlflow": lambda: MLflow(storage, stage, settings),
    }
    return [TensorBoard(storage, stage, start), *(Told(name, others[name]) for name in names)]


def _floats(record: Record) -> dict[str, float]:
    return {key: value for key, value in record.items() if isinstance(value, float)}


def _shown(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by their dotted names; credentials never."""
    found = page.flat(settings)
    return {key: scrubbed(value) if isinstance(value, str) else value for key, value in found}


class TensorBoard:
    """Events, written to local folders and copied to the run's root: scalars `<stage>/<key>`.

    Pictures go to files of their own under samples/, each copied once: that of the scalars is
    copied again whenever it has grown.
    """

    def __init__(self, storage: Storage, stage: str, start: int) -> None:
        self.storage, self.stage = storage, stage
        self._folder = tempfile.TemporaryDirectory(prefix="ssr-events-", ignore_cleanup_errors=True)
        self._failing = False
        self._scalars, self._pictures = (Path(self._folder.name, n) for n in ("scalars", "samples"))
        self._pictures.mkdir()
        self._writer = _writer(self._scalars, purge_step=start + 1 if start else None)

    def log(self, record: Record) -> None:
        for key, value in _floats(record).items():
            self._writer.add_scalar(f"{self.stage}/{key}", value, record["step"])

    def picture(self, step: int, picture: Image.Image) -> None:
        with tempfile.TemporaryDirectory(dir=self._folder.name) as folder:
            writer, name = _writer(Path(folder)), f"{self.stage}/samples"
            writer.add_image(name, np.asarray(picture), step, dataformats="HWC")
            writer.close()
            for file in Path(folder).iterdir():  # whole, for the thread that publishes
                file.replace(self._pictures / f"{file.name}.{self.stage}-{step}")

    def publish(self) -> None:
        self._copy(self._writer.flush)

    def close(self) -> None:
        self._copy(self._writer.close)
        self._folder.cleanup()

    def _copy(self, write: Callable[[], None]) -> None:
        """A full or swept folder for temporary files is no reason to end a run."""
        try:
            write()
            self._upload()
        except OSError as error:
            if not self._failing:
                say(f"warning: TensorBoard's events cannot be written here: {error}")
            self._failing = True

    def _upload(self) -> None:
        self.storage.upload_tree(self._scalars, f"{TENSORBOARD}/{self.stage}")
        for file in sorted(self._pictures.iterdir()):
            self.storage.write_bytes(f"{TENSORBOARD}/samples/{file.name}", file.read_bytes())
            file.unlink()


def _writer(folder: Path, **options: Any) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), **options)  # type: ignore[no-untyped-call]


class Told:
    """A tracker that is told in a thread of its own, where it is opened too."""

    def __init__(self, name: str, open_: Callable[[], Tracker]) -> None:
        self.name, self._open = name, open_
        self._calls: queue.SimpleQueue[Callable[[Tracker], None] | None] = queue.SimpleQueue()
        self._failing = False
        self._thread = threading.Thread(target=self._run, name=f"told-{name}", daemon=True)
        self._thread.start()

    def log(self, record: Record) -> None:
        self._calls.put(lambda tracker: tracker.log(record))

    def picture(self, step: int, picture: Image.Image) -> None:
        self._calls.put(lambda tracker: tracker.picture(step, picture))

    def publish(self) -> None:
        """Its service sees everything at once."""

    def close(self) -> None:
        """Wait until all was told, but not for ever."""
        self._calls.put(lambda tracker: tracker.close())
        self._calls.put(None)
        self._thread.join(_PATIENCE_S)
        if self._thread.is_alive():
            say(f"warning: {self.name} did not take everything in {_PATIENCE_S:g} s; going on")

    def _run(self) -> None:
        tracker: Tracker | None = None
        while (call := self._calls.get()) is not None:
            try:
                tracker = tracker or self._open()
                call(tracker)
                self._failing = False
            except Exception as error:  # whatever the client of a service raises
                if not self._failing:
                    reason = " ".join(str(error).split()) or type(error).__name__
                    reason = scrubbed(reason)[:200]
                    say(f"warning: {self.name} was not told everything: {reason}")
                self._failing = True


class WandB:
    """Weights & Biases. What it writes offline goes to train/wandb under the root."""

    def __init__(self, storage: Storage, stage: str, settings: Mapping[str, Any]) -> None:
        import wandb

        self.storage, self.stage, self._image = storage, stage, wandb.Image
        self._folder = tempfile.TemporaryDirectory(prefix="ssr-wandb-")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            id=_run_id(storage, "wandb", lambda: uuid.uuid4().hex[:12]),
            resume="allow",
            name=public(storage.url()),
            dir=self._folder.name,
            settings=wandb.Settings(console="off", silent=True),
        )
        self._run.config.update(_shown(settings), allow_val_change=True)
        # its own steps only grow, those of a run that went back to a checkpoint do not
        self._run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")

    def log(self, record: Record) -> None:
        named = {f"{self.stage}/{key}": value for key, value in _floats(record).items()}
        self._run.log({**named, f"{self.stage}/step": record["step"]})

    def picture(self, step: int, picture: Image.Image) -> None:
        self._run.log({f"{self.stage}/samples": self._image(picture), f"{self.stage}/step": step})

    def publish(self) -> None:
        """It is told at once."""

    def close(self) -> None:
        offline = self._run.offline
        self._run.finish()
        if offline:
            for folder in Path(self._folder.name).glob("wandb/offline-run-*"):
                self.storage.upload_tree(folder, f"train/wandb/{folder.name}")
        self._folder.cleanup()


class MLflow:
    """An MLflow server."""

    def __init__(self, storage: Storage, stage: str, settings: Mapping[str, Any]) -> None:
        from mlflow.entities import Metric, Param
        from mlflow.tracking import MlflowClient

        self.stage, self._metric, self._client = stage, Metric, MlflowClient()

        def begin() -> str:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
            found = self._client.get_experiment_by_name(name)
            experiment = found.experiment_id if found else self._client.create_experiment(name)
            run = self._client.create_run(experiment, run_name=public(storage.url()))
            params = [Param(key, str(v)[:_MOST_LETTERS]) for key, v in _shown(settings).items()]
            for first in range(0, len(params), _MOST_PARAMS):
                some = params[first : first + _MOST_PARAMS]
                self._client.log_batch(run.info.run_id, params=some)
            return str(run.info.run_id)

        self._id = _run_id(storage, "mlflow", begin)
        self._client.update_run(self._id, status="RUNNING")

    def log(self, record: Record) -> None:
        now, step = int(time.time() * 1000), record["step"]
        metrics = [
            self._metric(f"{self.stage}/{key}", value, now, step)
            for key, value in _floats(record).items()
        ]
        self._client.log_batch(self._id, metrics=metrics)

    def picture(self, step: int, picture: Image.Image) -> None:
        self._client.log_image(self._id, picture, f"{self.stage}/samples/step-{step:08d}.png")

    def publish(self) -> None:
        """It is told at once."""

    def close(self) -> None:
        self._client.set_terminated(self._id)


def _run_id(storage: Storage, name: str, begin: Callable[[], str]) -> str:
    """The tracker's id of this run, which `begin` makes once."""
    path = f"train/trackers/{name}.json"
    if not storage.exists(path):
        storage.write_json(path, {"run": begin()})
    return str(storage.read_json(path)["run"])
