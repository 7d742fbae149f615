"""The runner: stages over units on Ray Data, with progress from the commit markers.

Ray Data carries unit ids only, pixels never: the stages read and write storage themselves. What
is done, and what a unit's marker says, is units.py's business.
"""

from __future__ import annotations

import itertools
import json
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pipeline.cluster import together
from pipeline.config import StageResources
from pipeline.errors import UnitFault, UserError
from pipeline.progress import Progress, quiet_libraries, say, without_stderr_lines
from pipeline.storage import Storage
from pipeline.units import Ledger, Stage, chain, run_unit
from pipeline.watch import Watch

_TASKS = 20_000
"""A run of more units than this gives several of them to a task: what Ray Data keeps of a task in
the driver (some 5 kB a stage) it keeps to the end of the run."""
_IN_FLIGHT = 2  # tasks of a worker: one running, one waiting


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
    patience_s: float = 0.0,
    job: str = "curate",
    run: str | None = None,
) -> None:
    """Run `stages`, in order, over `units` on Ray Data, until all of them are committed.

    Ray Data carries unit ids only. Each stage has its own pool of workers, so that the stages
    overlap. `upstream` is the fingerprint of what the first stage reads. Units that are committed
    are not scheduled. A UserError in a worker stops the run, unless it is a UnitFault (a store out
    of reach for too long, a unit that kills its workers): that, and any other fault, costs its
    unit, the rest goes on, and the run ends in a UserError that names the units. `connection` to
    Ray is entered only if there is work: a wrong setting, or a finished run, needs no cluster.
    `ledgers` are those of an earlier `check_stages`: they are not listed again.
    `patience_s` is the longest wait for room for a worker of each stage, see `waves`. `job` names
    the metrics (ray_metrics.py), `run` is their tag; None = the root. A marker of other settings
    that turns up while the run goes stops it.
    """
    if ledgers is None:
        ledgers, prints = check_stages(stages, storage, upstream, redo)
    else:
        prints = chain((spec.factory() for spec in stages), upstream)
    for ledger in reversed(ledgers):  # never a unit that is done and made from one that is not
        ledger.forget_others(prints[ledger.stage_name])
    for source, ledger in itertools.pairwise(ledgers):
        for unit in ledger.units - source.units:  # its marker was deleted, by hand
            ledger.forget(unit)
    pending = [unit for unit in units if any(unit not in ledger.units for ledger in ledgers)]
    watch = Watch(ledgers, units, progress, job, run)
    if pending:
        with connection or nullcontext(), watch:
            faults: dict[str, _Fault] = {}
            for wave in waves(stages, patience_s):
                left = [unit for unit in pending if unit not in faults]
                watch.running = {spec.name for spec in wave}
                if left:
                    faults |= _schedule(wave, prints, left, storage, watch)
            _refuse(faults, len(pending))
        watch.look(whole=True)


def check_stages(
    stages: Sequence[StageSpec],
    storage: Storage,
    upstream: str | None,
    redo: Iterable[str] = (),
) -> tuple[Sequence[Ledger], dict[str, str]]:
    """Every stage's ledger, listed, and its fingerprint. Changes nothing.

    Raises UserError where finished units were made with other settings and are not in `redo`.
    """
    built = [spec.factory() for spec in stages]
    prints, redone = chain(built, upstream), set(redo)
    ledgers = [Ledger(storage, stage.name) for stage in built]
    for stage, ledger in zip(built, ledgers, strict=True):
        ledger.check(prints[stage.name], stage.settings, stage.name in redone)
    return ledgers, prints


def waves(stages: Sequence[StageSpec], patience_s: float) -> Iterator[list[StageSpec]]:
    """Which stages run at the same time: all, where the connected cluster has or gets, within
    `patience_s`, room for a worker of each; else they take turns, as many at once as it has room
    for when a turn begins. The wait is one, at the beginning.

    For a stage's worker that waits for its first unit may hold the GPU that an earlier stage's
    waits for, and then neither ever gets on.
    """
    left = list(stages)
    while left:
        wave = _fitting(left, patience_s)
        left, patience_s = left[len(wave) :], 0.0
        if left:
            now, later = ("+".join(spec.name for spec in some) for some in (wave, left))
            say(
                "the cluster has no room for a worker of each stage at once: "
                f"{now} now, {later} later"
            )
        yield wave


def _fitting(stages: list[StageSpec], patience_s: float) -> list[StageSpec]:
    """The first of `stages`, as many as there is room for; for one alone Ray itself waits."""
    needs = [spec.resources for spec in stages]
    if len(stages) == 1 or together(needs, patience_s):
        return stages
    fit = 1
    while fit + 1 < len(stages) and together(needs[: fit + 1]):
        fit += 1
    return stages[:fit]


def _schedule(
    stages: Sequence[StageSpec],
    prints: Mapping[str, str],
    pending: Sequence[str],
    storage: Storage,
    watch: Watch,
) -> dict[str, _Fault]:
    """Run the stages, overlapping; what failed, by unit."""
    import ray
    import ray.data

    _quiet_data()
    widest = max(spec.resources.max_workers for spec in stages)
    rows = [{"units": some, "faults": "{}"} for some in shares(pending, widest)]
    data = ray.data.from_items(rows, override_num_blocks=len(rows))
    warnings.filterwarnings("ignore", message="`ray_remote_args_fn` is deprecated")
    for spec in stages:
        data = data.map(
            _Worker,
            fn_constructor_args=(spec, storage, prints[spec.name]),
            compute=ray.data.ActorPoolStrategy(
                min_size=1,
                max_size=max(1, spec.resources.max_workers),
                max_tasks_in_flight_per_actor=_IN_FLIGHT,  # no worker hoards units
            ),
            num_cpus=spec.resources.cpus,
            num_gpus=spec.resources.gpus,
            runtime_env={"py_executable": spec.py_executable} if spec.py_executable else None,
            ray_remote_args_fn=_restarts,
        )
    faults: dict[str, _Fault] = {}
    try:
        # Ray Data restarts its actors; Ray notes as an error that it may not be able to
        with without_stderr_lines(b"has constructor arguments in the object store"):
            for row in data.iter_rows():
                watch.check()
                found = {unit: _Fault(*told) for unit, told in json.loads(row["faults"]).items()}
                if stop := _stop(found):
                    raise UserError(stop.text)
                watch.failed.update(fault.stage for fault in found.values())
                faults |= found
    except ray.exceptions.RayError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"a worker died again and again, most often for want of memory ({reason}); give the "
            "stage a smaller batch, what is finished is kept"
        ) from error
    return faults


def _refuse(faults: Mapping[str, _Fault], units: int) -> None:
    if faults:
        names = ", ".join(f"{fault.stage}/{unit}" for unit, fault in [*faults.items()][:4])
        first = next(iter(faults.values()))
        raise UserError(
            f"{len(faults)} of {units} units failed ({names}); the first: {first.text}; what is "
            "finished is kept, run the same command again to retry"
        )


def shares(units: Sequence[str], workers: int) -> Iterator[list[str]]:
    """The units that a task each is given, in their order.

    One, unless that made far more than `_TASKS` tasks. Then too the shares begin small, so that the
    next stages soon have work, and end small, so that all of `workers` end at about the same time.
    """
    most, at = -(-len(units) // _TASKS), 0
    while at < len(units):
        near = min(at, len(units) - at)  # to the beginning, or to the end
        size = max(1, min(most, near // (_IN_FLIGHT * max(1, workers))))
        yield list(units[at : at + size])
        at += size


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


class _Fault(NamedTuple):
    """What a unit failed with, and where; `stop`: it ends the run."""

    stage: str
    text: str
    stop: bool = False


def _stop(faults: Mapping[str, _Fault]) -> _Fault | None:
    return next((fault for fault in faults.values() if fault.stop), None)


class _Worker:
    """One worker of a stage, in Ray's hands."""

    def __init__(self, spec: StageSpec, storage: Storage, fingerprint: str) -> None:
        quiet_libraries()
        # Nothing here may fail: a crash in a constructor fails the job without its reason.
        self.spec, self.storage, self.fingerprint = spec, storage, fingerprint
        self.stage: Stage | None = None
        self.replaced: bool | None = None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Make the row's units that have not failed before; one that fails is noted in it."""
        faults = {unit: _Fault(*told) for unit, told in json.loads(row["faults"]).items()}
        units = [str(unit) for unit in row["units"]]
        for unit in units:
            if _stop(faults):
                break
            if unit not in faults and (fault := self._make(unit)):
                faults[unit] = fault
        return {"units": units, "faults": json.dumps(faults)}

    def _make(self, unit: str) -> _Fault | None:
        ledger = Ledger(self.storage, self.spec.name)
        try:
            # a unit that an earlier run committed is no reason to load the models
            if ledger.get(unit) is None:
                with ledger.deaths(unit, self._replaced()):
                    run_unit(self._stage(), unit, self.storage, self.fingerprint)
        except UserError as error:
            return _Fault(self.spec.name, str(error), not isinstance(error, UnitFault))
        except Exception as error:
            traceback.print_exc()
            text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            return _Fault(self.spec.name, text)
        return None

    def _replaced(self) -> bool:
        """Whether this worker stands in for one that died."""
        if self.replaced is None:
            import ray

            self.replaced = bool(ray.get_runtime_context().was_current_actor_reconstructed)
        return self.replaced

    def _stage(self) -> Stage:
        if self.stage is None:
            stage = self.spec.factory()
            load = getattr(stage, "open", None)
            if load is not None:
                load()
            self.stage = stage
        return self.stage
