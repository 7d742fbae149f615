"""A run on Ray Train: workers started, watched, started again; the driver's side of training.

Ray schedules and restarts; the truth is in the run's own storage. Ray Train's storage is a scratch
folder that ends with the job, on the driver's machine: nothing is ever read back from it, so it
serves for every root and every cluster.
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable
from typing import Any

import torch

from pipeline import ray_metrics
from pipeline.cluster import cores, private
from pipeline.config import TrainConfig
from pipeline.errors import UserError, passing, user_message
from pipeline.pace import Stall
from pipeline.progress import Progress, quiet_libraries, say
from pipeline.storage import Storage
from pipeline.training.elastic import Leaving, Sizes, give_back, no_room
from pipeline.training.record import PROGRESS
from pipeline.training.run import Run
from pipeline.training.stage import World

_SHOWN = {
    "loss": "loss", "held out": "validation_loss", "L_ldm": "ldm", "L_reg": "reg",
    "samples/s": "samples_per_s",
}  # fmt: skip
# Failures in a row without a new checkpoint before the job gives up.
_TRIES = 3


def fit(run: Run, progress: Progress) -> dict[str, dict[str, Any]]:
    """Train on the connected Ray cluster until the run is finished.

    A worker or node that dies costs the steps since the last checkpoint: the workers are started
    again, as many as there is room for, and go on from it. A node of which Ray is told that it will
    go costs none. Called from the main thread, where Ctrl-C ends it.

    Returns:
        The figures of each stage.

    Raises:
        UserError: what a worker raised as such; workers that do not divide the lanes, or that the
            cluster has no room for.
    """
    with ray_metrics.driver("train", run.storage.url()):
        return _fit(run, progress)


def _fit(run: Run, progress: Progress) -> dict[str, dict[str, Any]]:
    sizes = Sizes.of(run.cfg)
    size, before, most = sizes.wait(run.cfg), 0, sizes.allowed[-1]
    run.take_over()
    tries, reached = _TRIES, run.position()
    while True:
        if size != before:
            _tell(run.cfg, size, sizes.kind)
        try:
            figures = _attempt(run, sizes, size, progress)
            if figures is not None:
                return figures
            tries, reached, most = _TRIES, run.position(), size + sizes.more(size)
            say(f"the workers left: a node will go, or others came; step {reached[1]} is saved")
        except Exception as error:
            reason = user_message(error) or last_line(error)
            if no_room(error):
                most = sizes.below(size)
                if not most:
                    raise UserError(
                        f"the cluster had no room for {size} {sizes.kind} workers for "
                        f"{run.cfg.wait_minutes:g} minutes: others use it; the same command goes on"
                    ) from error
            else:
                now = run.position()
                tries = _TRIES if now > reached else tries - 1
                reached = now
                if not tries or not passing(error):
                    raise
            say(f"warning: training was interrupted ({reason}); going on from step {reached[1]}")
        run.check_owner()
        run.take_over()  # a worker that lives on behind a broken network saves nothing any more
        size, before = sizes.wait(run.cfg, most), size


def last_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[-1][:200]


def _tell(cfg: TrainConfig, size: int, kind: str) -> None:
    batch = cfg.global_batch
    say(
        f"training: {size} {kind} worker{'s' * (size > 1)}, {batch // size} of {batch} samples each"
    )


def _attempt(
    run: Run, sizes: Sizes, size: int, progress: Progress
) -> dict[str, dict[str, Any]] | None:
    """One Ray Train run; None where its workers left. It waits in a thread: the main thread shows
    progress and hears Ctrl-C.
    """
    outcome: dict[str, Any] = {}

    def wait() -> None:
        try:
            outcome["result"] = trainer.fit()
        except BaseException as error:
            outcome["error"] = error

    with tempfile.TemporaryDirectory(
        prefix="ssr-ray-train-",
        ignore_cleanup_errors=True,  # a worker that is killed may still write into it
    ) as scratch:
        trainer = _trainer(run, sizes, size, scratch)
        thread = threading.Thread(target=wait, name="ray-train", daemon=True)
        thread.start()
        watch = _Watch(run, progress)
        try:
            while thread.is_alive():
                thread.join(timeout=watch.every_s)
                watch.look()
        finally:
            give_back(run.token)
    if "error" in outcome:
        raise outcome["error"]
    figures: dict[str, dict[str, Any]] | None = outcome["result"].return_value
    return figures


def _trainer(run: Run, sizes: Sizes, size: int, scratch: str) -> Any:
    # others may hold the room for a while; where a smaller size will do, it is not waited for long
    patience = 0 if sizes.below(size) else run.cfg.wait_minutes * 60
    own_cluster = private(run.cfg.ray)
    settings = {
        "run": run,
        "changes": not own_cluster,
        "kind": sizes.kind,
        "more": sizes.more(size),
    }
    return workers(
        _work, settings, size, sizes.kind, f"ssr-{run.token[:8]}", scratch, own_cluster, patience
    )


def workers(
    loop: Callable[[dict[str, Any]], Any],
    settings: dict[str, Any],
    size: int,
    kind: str,
    name: str,
    scratch: str,
    own_cluster: bool,
    patience_s: float,
    timeout_s: float = 1800.0,
) -> Any:
    """A TorchTrainer whose `size` workers take a `kind` (GPU, CPU) each and run `loop(settings)`.

    Args:
        name: of the run, as Ray Train shows it.
        scratch: folder on the driver's machine, for the time of the run.
        own_cluster: whether the cluster ends with the driver.
        patience_s: longest wait for the workers' room, seconds; a minute at least.
        timeout_s: longest time for one collective operation of the workers, seconds.
    """
    # Read by Ray Train in the driver. Paths in the settings are relative to where the job runs.
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "1")
    # a notice may come half a minute before the node goes
    os.environ.setdefault("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "2")
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = f"{max(60.0, patience_s):.0f}"
    if own_cluster:
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.train.v2._internal.callbacks import DatasetsCallback
    from ray.train.v2._internal.callbacks.placement_group_callback import (
        PlacementGroupCleanerCallback,
    )
    from ray.train.v2.api.config import LoggingConfig

    from pipeline.training.rendezvous import Rendezvous

    # Each of these is a process that imports Ray Train and torch: 200 MB, and seconds of a core.
    # We have no Ray datasets; a private cluster ends with its driver, so nothing is left to clean.
    unneeded = (
        (DatasetsCallback, PlacementGroupCleanerCallback) if own_cluster else DatasetsCallback
    )

    class Trainer(TorchTrainer):
        def _create_default_callbacks(self) -> list[Any]:
            made = super()._create_default_callbacks()
            return [callback for callback in made if not isinstance(callback, unneeded)]

    return Trainer(
        loop,
        train_loop_config=settings,
        torch_config=Rendezvous(timeout_s=int(timeout_s)),
        scaling_config=ScalingConfig(num_workers=size, use_gpu=kind == "GPU"),
        run_config=RunConfig(
            name=name,
            storage_path=scratch,
            # each attempt is ours: it may have another size
            failure_config=FailureConfig(
                max_failures=0, max_preemption_failures=0, controller_failure_limit=0
            ),
            # what a worker raised comes back to the driver, which says it once
            logging_config=LoggingConfig(log_level="CRITICAL"),
        ),
    )


def _work(config: dict[str, Any]) -> dict[str, dict[str, Any]] | None:
    """What each Ray Train worker runs."""
    quiet_libraries()
    import ray.train
    from ray.train.torch import get_device

    context = ray.train.get_context()
    torch.set_num_threads(max(1, cores() // context.get_local_world_size()))
    run: Run = config["run"]
    world = World(context.get_world_rank(), context.get_world_size(), get_device())
    if not config["changes"]:  # nodes neither come nor go
        return run.work(world)
    leaving = Leaving(
        world.rank, config["kind"], config["more"], run.cfg.resize_minutes, name=run.token
    )
    return run.work(world, leaving)


class _Watch:
    """Shows what rank 0 publishes of its progress."""

    def __init__(self, run: Run, progress: Progress) -> None:
        self.storage: Storage = run.storage
        self.token, self.progress = run.token, progress
        self.every_s = 1.0 if self.storage.local else 5.0
        self.stage, self.step = "", 0
        self._seen: dict[str, Any] = {}
        self._stalled, self._unsaved = Stall(), Stall()
        collected = ray_metrics.collected()
        self.metrics = ray_metrics.TrainingMetrics(self.storage.url()) if collected else None

    def look(self) -> None:
        self._seen = self._read() or self._seen
        self._publish(self._seen)
        if seen := self._seen:
            self._show(seen)

    def _read(self) -> dict[str, Any]:
        """What rank 0 of this attempt says now; {} where it says nothing."""
        try:
            seen = self.storage.read_json(PROGRESS) if self.storage.exists(PROGRESS) else {}
        except UserError:
            return {}  # a glance that failed; the worker says what is wrong with the store
        return seen if isinstance(seen, dict) and seen.get("run") == self.token else {}

    def _publish(self, seen: dict[str, Any]) -> None:
        """At every look, also at one that failed: Ray forgets a gauge that is not set again."""
        if self.metrics is None:
            return
        stage = seen.get("stage", ray_metrics.STARTING)
        clocks = {"stalled": self._stalled.seconds((stage, seen.get("step")))}
        if seen:
            clocks["unsaved"] = self._unsaved.seconds((stage, seen.get("checkpoint")))
        self.metrics.publish(stage, {**seen, **clocks})

    def _show(self, seen: dict[str, Any]) -> None:
        step = int(seen["step"])
        if seen["stage"] != self.stage or step < self.step:
            self.stage, self.step = seen["stage"], int(seen["start"])
            self.progress.task(self.stage, int(seen["steps"]), self.step)
        if step > self.step:
            figures = {shown: seen[key] for shown, key in _SHOWN.items() if key in seen}
            waiting = f"{seen.get('data_wait', 0.0):.1%}"
            self.progress.advance(self.stage, step - self.step, **figures, **{"data wait": waiting})
            self.step = step
        self.progress.tick()
