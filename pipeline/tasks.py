"""A function over items, in Ray tasks, wherever there are cores.

Plain tasks and not Ray Data, which takes 20 ms of the driver's time for each: the filter's are many
and short (benchmarks/filter.py), an ablation's few and long.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, TypeVar

from pipeline.errors import UnitFault, UserError
from pipeline.progress import Progress, quiet_libraries

T = TypeVar("T")
R = TypeVar("R")
TASK_BYTES = 1 << 30
"""Memory that a task of the filter may need."""
_TRIES = 8
"""How often a task is run again that dies (out of memory, lost node)."""
_LOOK_S = 0.2
"""Time between two looks at what is done."""


class Spread(Protocol):
    """Runs a function over items, somewhere; results come in the items' order. `memory` is what a
    call may need, bytes.
    """

    def __call__(
        self, function: Callable[[T], R], items: Sequence[T], title: str, memory: int = TASK_BYTES
    ) -> Iterable[R]: ...


def in_turn(
    function: Callable[[T], R], items: Sequence[T], title: str, memory: int = TASK_BYTES
) -> Iterable[R]:
    """Here, one after the other."""
    return map(function, items)


def spread(
    function: Callable[[T], R],
    items: Sequence[T],
    title: str,
    memory: int = TASK_BYTES,
    *,
    progress: Progress,
    cpus: float = 1.0,
    gpus: float = 0.0,
    look: Callable[[], None] = lambda: None,
) -> list[R]:
    """Run `function` over `items`, a task each; results in order.

    A task that dies with its worker or node is run again, so it has to publish what it writes. A
    UserError of a task ends the call; a UnitFault (a store out of reach) when the others are
    through. `title` names the bar, "" = none. `memory` is what a task may need, bytes: so many run
    on a node as it has room for. `look` is called now and then meanwhile, to show how far it is.
    """
    if not items:
        return []
    import ray
    import ray.exceptions as raised
    from ray import cloudpickle

    if title:
        progress.task(title, len(items))
    # a head without CPUs runs none, and nodes may be still to come
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    rooms = [node.get("memory", 0) for node in nodes if node.get("CPU", 0) >= cpus]
    task = ray.remote(_run).options(
        name=title or "filter",
        num_cpus=cpus,
        num_gpus=gpus,
        # where all nodes are small they run one by one
        memory=min(memory, int(max(rooms) / 2)) if rooms else memory,
        max_retries=_TRIES,
    )
    work = ray.put(cloudpickle.dumps(function))
    index = {task.remote(work, cpus, cloudpickle.dumps(item)): i for i, item in enumerate(items)}
    pending, results, faults = list(index), dict[int, R](), list[UnitFault]()
    try:
        while pending:
            done, pending = ray.wait(pending, num_returns=len(pending), timeout=_LOOK_S)
            for ref in done:
                result, fault = cloudpickle.loads(ray.get(ref))
                if isinstance(fault, UnitFault):
                    faults.append(fault)
                elif fault is not None:
                    raise fault
                else:
                    results[index[ref]] = result
            look()
            progress.tick()
            if title and done:
                progress.advance(title, len(done))
    except raised.RayTaskError:
        raise  # a fault of ours, with its traceback
    except raised.RayError as error:
        reason = " ".join(str(error).split())[:300]
        deaths = raised.WorkerCrashedError, raised.OutOfMemoryError, raised.NodeDiedError
        why, mend = "could not be run", ""
        if isinstance(error, deaths):
            why = "died again and again, most often for want of memory"
            mend = "use nodes with more, "
        raise UserError(
            f"a task of {title or 'the survey'} {why} ({reason}); {mend}what is finished is kept"
        ) from error
    finally:
        for ref in pending:  # by force: an interrupt may leave a worker, which Ray uses again, half
            ray.cancel(ref, force=True)  # way through an import
    if faults:
        raise faults[0]
    return [results[i] for i in range(len(items))]


def _run(function: bytes, cpus: float, item: bytes) -> bytes:
    """A task; what the user can mend is given back, for Ray would wrap and log it."""
    from ray import cloudpickle

    # one thread a core: polars takes all of them, and reads this once, when it is first imported
    os.environ.setdefault("POLARS_MAX_THREADS", str(max(1, int(cpus))))
    quiet_libraries()
    try:
        outcome: Any = (cloudpickle.loads(function)(cloudpickle.loads(item)), None)
    except UserError as error:
        outcome = (None, error)
    return bytes(cloudpickle.dumps(outcome))
