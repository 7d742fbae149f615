"""Work units: all of resume, accounting and scheduling; the only place that knows "done".

A stage turns one unit's upstream file into one Parquet file of its own folder, and knows nothing
else. The runner publishes that file, checks that no row was lost, and writes the unit's commit
marker `<stage>/_done/<unit>.json` last. A unit without a marker does not exist. Resume is: list
the markers once, run what is missing.
"""

from __future__ import annotations

import builtins
import hashlib
import json
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any, BinaryIO, Protocol, cast

import pyarrow.parquet as pq

from pipeline.config import StageResources
from pipeline.errors import UserError
from pipeline.progress import Progress, quiet_libraries, without_stderr_lines
from pipeline.storage import Storage

_DONE = "_done"


@dataclass
class Tally:
    """Where a unit's rows went; `dropped` by reason (a rule), `failed` by cause (a fault)."""

    rows_in: int
    kept: int
    dropped: dict[str, int] = field(default_factory=dict)
    failed: dict[str, int] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        """Raise RuntimeError if rows were lost or made: in = kept + dropped + failed."""
        out = self.kept + sum(self.dropped.values()) + sum(self.failed.values())
        if out != self.rows_in:
            raise RuntimeError(
                f"rows were lost or made: {self.rows_in} in, {out} accounted for: {self}"
            )


class Stage(Protocol):
    """One step of curation. Building it is cheap (the driver does, to learn its settings); what is
    heavy (models) belongs into an optional method `open()`, called once in the worker.
    """

    @property
    def name(self) -> str:
        """Its folder under the root, and its name in settings and messages."""
        ...

    @property
    def source(self) -> str | None:
        """The upstream stage's folder; None = the stage reads what is outside of the root."""
        ...

    @property
    def settings(self) -> dict[str, Any]:
        """JSON of everything that shapes the output: options, seeds, hashes of weights."""
        ...

    def __call__(self, unit: str, storage: Storage, sink: BinaryIO, /) -> Tally:
        """Read the unit's inputs from `storage`, write its Parquet to `sink`, account for rows."""
        ...


@dataclass
class Marker:
    """The commit of one unit: it says what it covers."""

    unit: str
    stage: str
    fingerprint: str
    settings: dict[str, Any]
    tally: Tally
    bytes: int
    sha256: str
    seconds: float
    finished: str

    @classmethod
    def parse(cls, data: builtins.bytes, path: str) -> Marker:
        try:
            fields = json.loads(data)
            return cls(**{**fields, "tally": Tally(**fields["tally"])})
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"{path} is no commit marker ({error}); delete it and run again"
            ) from None


@dataclass
class StageSpec:
    """A stage as the runner gets it: `factory` is picklable and builds it, here and in workers."""

    name: str
    factory: Callable[[], Stage]
    resources: StageResources = field(default_factory=StageResources)


def fingerprint(stage: Stage, upstream: str | None) -> str:
    """16 hex digits over everything that shapes the stage's output, its upstream's included."""
    covered = {"stage": stage.name, "settings": stage.settings, "upstream": upstream}
    text = json.dumps(covered, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Ledger:
    """The commit markers of one stage."""

    def __init__(self, storage: Storage, stage_name: str) -> None:
        self.storage, self.stage_name = storage, stage_name
        self._read: dict[str, Marker] = {}

    def path(self, unit: str) -> str:
        return f"{self.stage_name}/{_DONE}/{unit}.json"

    def done(self) -> dict[str, Marker]:
        """Committed units: one listing; only markers not seen before are read."""
        listed = self.storage.list(f"{self.stage_name}/{_DONE}")
        units = {path.rpartition("/")[2].removesuffix(".json"): path for path in listed}
        self._read = {unit: marker for unit, marker in self._read.items() if unit in units}
        new = [path for unit, path in units.items() if unit not in self._read]
        for path, data in self.storage.read_many(new).items():
            marker = Marker.parse(data, self.storage.url(path))
            self._read[marker.unit] = marker
        return dict(self._read)

    def get(self, unit: str) -> Marker | None:
        """The unit's marker, or None where it is not committed."""
        if not self.storage.exists(self.path(unit)):
            return None
        path = self.path(unit)
        return Marker.parse(self.storage.read_bytes(path), self.storage.url(path))

    def commit(self, unit: str, marker: Marker) -> None:
        self.storage.write_json(self.path(unit), asdict(marker))

    def check(
        self, fingerprint: str, settings: Mapping[str, Any], redo: bool = False
    ) -> dict[str, Marker]:
        """Committed units that this run may build on.

        Where a marker's fingerprint differs, raises UserError naming what changed; with `redo` the
        marker is deleted instead, so that the unit is made again.
        """
        done = self.done()
        stale = [marker for marker in done.values() if marker.fingerprint != fingerprint]
        if stale and not redo:
            raise UserError(self._changed(stale, settings))
        for marker in stale:
            self.storage.delete(self.path(marker.unit))
            del self._read[marker.unit], done[marker.unit]
        return done

    def _changed(self, stale: list[Marker], settings: Mapping[str, Any]) -> str:
        before, now = _flat(stale[0].settings), _flat(settings)
        names = [key for key in {**before, **now} if before.get(key) != now.get(key)]
        what = ", ".join(
            f"{key} (was {_short(before.get(key))}, now {_short(now.get(key))})"
            for key in names[:3]
        )
        what = what or "what they were made from"
        return (
            f"{self.storage.url(self.stage_name)}: {len(stale)} finished unit(s) were made with "
            f"other settings; changed: {what}; set it back, use another --root, or add "
            f"--redo {self.stage_name}"
        )


def run_unit(stage: Stage, unit: str, storage: Storage, fingerprint: str) -> Marker:
    """Make one unit, unless it is committed already: publish, check the rows, commit.

    A stage that writes nothing to its sink (the filter, whose outputs are many) publishes nothing.
    """
    ledger = Ledger(storage, stage.name)
    marker = ledger.get(unit)
    if marker is not None:
        if marker.fingerprint != fingerprint:
            raise UserError(ledger._changed([marker], stage.settings))
        return marker
    started = time.monotonic()
    path = f"{stage.name}/{unit}.parquet"
    with storage.publish(path) as sink:
        tally = stage(unit, storage, cast(BinaryIO, sink))
        tally.check()
    if sink.bytes:
        _check_rows(storage, path, tally.kept, "kept")
    if stage.source is not None:
        _check_rows(storage, f"{stage.source}/{unit}.parquet", tally.rows_in, "rows_in")
    marker = Marker(
        unit=unit,
        stage=stage.name,
        fingerprint=fingerprint,
        settings=stage.settings,
        tally=tally,
        bytes=sink.bytes,
        sha256=sink.sha256,
        seconds=round(time.monotonic() - started, 3),
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    ledger.commit(unit, marker)
    return marker


def chain(stages: Iterable[Stage], upstream: str | None = None) -> dict[str, str]:
    """Fingerprint of every stage of a row of stages, each over the one before it."""
    prints: dict[str, str] = {}
    for stage in stages:
        upstream = prints[stage.name] = fingerprint(stage, upstream)
    return prints


def run_stages(
    stages: Sequence[StageSpec],
    units: Sequence[str],
    storage: Storage,
    progress: Progress,
    upstream: str | None = None,
    redo: Iterable[str] = (),
    connection: AbstractContextManager[Any] | None = None,
) -> dict[str, dict[str, Marker]]:
    """Run `stages`, in order, over `units` on Ray Data; return every stage's markers of `units`.

    Ray Data carries unit ids only. Each stage has its own pool of workers, so that the stages
    overlap. `upstream` is the fingerprint of what the first stage reads. Units that are committed
    are not scheduled. A UserError in a worker stops the run; any other fault costs its unit, the
    rest goes on, and the run ends in a UserError that names the units. `connection` to Ray is
    entered only if there is work: a wrong setting, or a finished run, needs no cluster.
    """
    built = [spec.factory() for spec in stages]
    prints = chain(built, upstream)
    ledgers = [Ledger(storage, stage.name) for stage in built]
    redone = set(redo)
    done: dict[str, dict[str, Marker]] = {}
    for stage, ledger in zip(built, ledgers, strict=True):
        done[stage.name] = ledger.check(prints[stage.name], stage.settings, stage.name in redone)
    pending = [unit for unit in units if any(unit not in made for made in done.values())]
    watch = _Watch(ledgers, units, progress)
    if pending:
        with connection or nullcontext():
            _schedule(stages, prints, pending, storage, watch)
    watch.look()
    return {ledger.stage_name: {unit: ledger._read[unit] for unit in units} for ledger in ledgers}


def _schedule(
    stages: Sequence[StageSpec],
    prints: Mapping[str, str],
    pending: Sequence[str],
    storage: Storage,
    watch: _Watch,
) -> None:
    import ray
    import ray.data

    quiet_libraries()  # ray.data sets its loggers up at import
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
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


def _restarts() -> dict[str, Any]:
    """A worker that dies (out of memory, lost node) is replaced, but not for ever on one unit."""
    return {"max_task_retries": 4}


class _Worker:
    """One worker of a stage, in Ray's hands."""

    def __init__(self, spec: StageSpec, storage: Storage, fingerprint: str) -> None:
        # Nothing here may fail: a crash in a constructor fails the job without its reason.
        self.spec, self.storage, self.fingerprint = spec, storage, fingerprint
        self.stage: Stage | None = None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        if row["fault"]:
            return row
        try:
            # a unit that an earlier run committed is no reason to load the models
            if Ledger(self.storage, self.spec.name).get(row["unit"]) is None:
                run_unit(self._stage(), row["unit"], self.storage, self.fingerprint)
        except UserError as error:
            return {**row, "stage": self.spec.name, "fault": str(error), "user": True}
        except Exception as error:
            traceback.print_exc()
            fault = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            return {**row, "stage": self.spec.name, "fault": fault}
        return row

    def _stage(self) -> Stage:
        if self.stage is None:
            quiet_libraries()
            stage = self.spec.factory()
            load = getattr(stage, "open", None)
            if load is not None:
                load()
            self.stage = stage
        return self.stage


class _Watch:
    """Shows progress from the markers as they appear: storage is the truth, for the bars too."""

    def __init__(self, ledgers: Sequence[Ledger], units: Sequence[str], progress: Progress) -> None:
        self.ledgers, self.units, self.progress = ledgers, set(units), progress
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._shown: dict[str, int] = {}
        for ledger in ledgers:
            made = [marker for marker in ledger._read.values() if marker.unit in self.units]
            self._shown[ledger.stage_name] = len(made)
            progress.task(ledger.stage_name, len(self.units), done=len(made))

    def __enter__(self) -> _Watch:
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        assert self._thread is not None
        self._thread.join()

    def look(self) -> float:
        """Bring the bars up to date; return the seconds that it took."""
        started = time.monotonic()
        for ledger in self.ledgers:
            made = [marker for unit, marker in ledger.done().items() if unit in self.units]
            new = len(made) - self._shown[ledger.stage_name]
            if new:
                self._shown[ledger.stage_name] = len(made)
                rows, kept = (
                    sum(marker.tally.rows_in for marker in made),
                    sum(marker.tally.kept for marker in made),
                )
                self.progress.advance(ledger.stage_name, new, rows=rows, kept=kept)
        return time.monotonic() - started

    def _run(self) -> None:
        pause = 1.0
        while not self._stop.wait(pause):
            try:
                # at most a tenth of the time goes into listing
                pause = max(1.0, 10 * self.look())
            except UserError:
                pause = 10.0  # a store's hiccup is no reason to stop the work


def _check_rows(storage: Storage, path: str, expected: int, what: str) -> None:
    with storage.open_input(path) as file:
        rows = pq.ParquetFile(file).metadata.num_rows
    if rows != expected:
        raise RuntimeError(
            f"{storage.url(path)} has {rows} rows, but the tally's {what} is {expected}"
        )


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 40 else text[:37] + "..."
