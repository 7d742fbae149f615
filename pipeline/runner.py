"""The runner: stages over units on Ray Data, with progress from the commit markers.

Ray Data carries unit ids only, pixels never: the stages read and write storage themselves. What
is done, and what a unit's marker says, is units.py's business.
"""

from __future__ import annotations

import itertools
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from pipeline.config import StageResources
from pipeline.errors import UnitFault, UserError
from pipeline.progress import Progress, quiet_libraries, without_stderr_lines
from pipeline.storage import Storage
from pipeline.units import Ledger, Marker, Stage, chain, run_unit
from pipeline.watch import Watch


@dataclass
class StageSpec:
    """A stage as the runner gets it: `factory` is picklable and builds it, here and in workers."""

    name: str
    factory: Callable[[], Stage]
    resources: StageResources = field(default_factory=StageResources)
    py_executable: str | None = None
    """Python of this stage's workers, where it is not the driver's; same Ray and Python minor."""


def run_stages(
    stages: Sequence[StageSpec],
    units: Sequence[str],
    storage: Storage,
    progress: Progress,
    upstream: str | None = None,
    redo: Iterable[str] = (),
    connection: AbstractContextManager[Any] | None = None,
    ledgers: Sequence[Ledger] | None = None,
) -> dict[str, dict[str, Marker]]:
    """Run `stages`, in order, over `units` on Ray Data; return every stage's markers of `units`.

    Ray Data carries unit ids only. Each stage has its own pool of workers, so that the stages
    overlap. `upstream` is the fingerprint of what the first stage reads. Units that are committed
    are not scheduled. A UserError in a worker stops the run, unless it is a UnitFault (a store out
    of reach for too long, a unit that kills its workers): that, and any other fault, costs its
    unit, the rest goes on, and the run ends in a UserError that names the units. `connection` to
    Ray is entered only if there is work: a wrong setting, or a finished run, needs no cluster.
    `ledgers` are those of an earlier `check_stages`: what they have read is not read again.
    """
    ledgers, prints = check_stages(stages, storage, upstream, redo, ledgers)
    for ledger in reversed(ledgers):  # never a unit that is done and made from one that is not
        ledger.forget_others(prints[ledger.stage_name])
    for source, ledger in itertools.pairwise(ledgers):
        for unit in ledger.read.keys() - source.read.keys():  # its marker was deleted, by hand
            ledger.forget(unit)
    pending = [unit for unit in units if any(unit not in ledger.read for ledger in ledgers)]
    watch = Watch(ledgers, units, progress)
    if pending:
        with connection or nullcontext():
            _schedule(stages, prints, pending, storage, watch)
    watch.look()
    return {ledger.stage_name: {unit: ledger.read[unit] for unit in units} for ledger in ledgers}


def check_stages(
    stages: Sequence[StageSpec],
    storage: Storage,
    upstream: str | None,
    redo: Iterable[str] = (),
    ledgers: Sequence[Ledger] | None = None,
) -> tuple[Sequence[Ledger], dict[str, str]]:
    """Every stage's ledger, read, and its fingerprint. Changes nothing.

    Raises UserError where finished units were made with other settings and are not in `redo`.
    """
    built = [spec.factory() for spec in stages]
    prints, redone = chain(built, upstream), set(redo)
    ledgers = ledgers or [Ledger(storage, stage.name) for stage in built]
    for stage, ledger in zip(built, ledgers, strict=True):
        ledger.check(prints[stage.name], stage.settings, stage.name in redone)
    return ledgers, prints


def _schedule(
    stages: Sequence[StageSpec],
    prints: Mapping[str, str],
    pending: Sequence[str],
    storage: Storage,
    watch: Watch,
) -> None:
    import ray
    import ray.data

    _quiet_data()
    rows = [{"unit": unit, "stage": "", "fault": "", "user": False} for unit in pending]
    data = ray.data.from_items(rows, override_num_blocks=len(rows))
    warnings.filterwarnings("ignore", message="`ray_remote_args_fn` is deprecated")
    for spec in stages:
        data = data.map(
            _Worker,
            fn_constructor_args=(spec, storage, prints[spec.name]),
            compute=ray.data.ActorPoolStrategy(
                min_size=1,
                max_size=max(1, spec.resources.max_workers),
                max_tasks_in_flight_per_actor=2,  # one running, one waiting: no worker hoards units
            ),
            num_cpus=spec.resources.cpus,
            num_gpus=spec.resources.gpus,
            runtime_env={"py_executable": spec.py_executable} if spec.py_executable else None,
            ray_remote_args_fn=_restarts,
        )
    faults = []
    try:
        # Ray Data restarts its actors; Ray notes as an error that it may not be able to
        with watch, without_stderr_lines(b"has constructor arguments in the object store"):
            for row in data.iter_rows():
                if row["user"]:
                    raise UserError(row["fault"])
                if row["fault"]:
                    faults.append(row)
    except ray.exceptions.RayError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"a worker died again and again, most often for want of memory ({reason}); give the "
            "stage a smaller batch, what is finished is kept"
        ) from error
    if faults:
        first = faults[0]
        names = ", ".join(f"{row['stage']}/{row['unit']}" for row in faults[:4])
        raise UserError(
            f"{len(faults)} of {len(pending)} units failed ({names}); the first: {first['fault']}; "
            "what is finished is kept, run the same command again to retry"
        )


def _quiet_data() -> None:
    import ray.data

    quiet_libraries()  # ray.data sets its loggers up at import
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False


def _restarts() -> dict[str, Any]:
    """A worker that dies (out of memory, lost node) is replaced. Ray counts every call to a node
    that it does not know to be lost yet as a try, so it may try for ever; _Worker counts.
    """
    return {"max_task_retries": -1}


class _Worker:
    """One worker of a stage, in Ray's hands."""

    def __init__(self, spec: StageSpec, storage: Storage, fingerprint: str) -> None:
        # Nothing here may fail: a crash in a constructor fails the job without its reason.
        self.spec, self.storage, self.fingerprint = spec, storage, fingerprint
        self.stage: Stage | None = None
        self.replaced: bool | None = None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        if row["fault"]:
            return row
        ledger = Ledger(self.storage, self.spec.name)
        try:
            # a unit that an earlier run committed is no reason to load the models
            if ledger.get(row["unit"]) is None:
                with ledger.deaths(row["unit"], self._replaced()):
                    run_unit(self._stage(), row["unit"], self.storage, self.fingerprint)
        except UserError as error:
            stop = not isinstance(error, UnitFault)
            return {**row, "stage": self.spec.name, "fault": str(error), "user": stop}
        except Exception as error:
            traceback.print_exc()
            fault = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            return {**row, "stage": self.spec.name, "fault": fault}
        return row

    def _replaced(self) -> bool:
        """Whether this worker stands in for one that died."""
        if self.replaced is None:
            import ray

            self.replaced = bool(ray.get_runtime_context().was_current_actor_reconstructed)
        return self.replaced

    def _stage(self) -> Stage:
        if self.stage is None:
            quiet_libraries()
            stage = self.spec.factory()
            load = getattr(stage, "open", None)
            if load is not None:
                load()
            self.stage = stage
        return self.stage
