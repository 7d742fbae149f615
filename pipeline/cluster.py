"""How a job reaches Ray: a cluster that is there already, or a private one for its own time."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from pipeline.command_line import submitted
from pipeline.config import RayConfig, StageResources
from pipeline.errors import UserError, take_signals
from pipeline.progress import quiet_libraries, say

_PACKAGE_ROOT = Path(__file__).resolve().parent.parent
# Ray Data's actor pools and a Train controller beside its workers need logical room to start.
_LEAST_CPUS = 4
# Ray grants what is there within this time, on a busy machine too.
_ANSWER_S = 10.0


def private(cfg: RayConfig) -> bool:
    """Whether the job starts a cluster of its own, which no autoscaler will enlarge."""
    return not (cfg.address or os.environ.get("RAY_ADDRESS"))


@contextlib.contextmanager
def connect(cfg: RayConfig, workers: Sequence[StageResources] = ()) -> Iterator[Any]:
    """The `ray` module, connected: to cfg.address, else to $RAY_ADDRESS (`ray job submit` sets it),
    else to a private local cluster that ends with the block. Raises UserError when that fails, and
    where a private cluster has no room for one of the `workers`, for Ray would wait for ever.
    """
    quiet_libraries()
    address = cfg.address or os.environ.get("RAY_ADDRESS") or None
    # Read by the raylet at its start: by default it runs workers at nice 15, behind everything.
    os.environ.setdefault("RAY_worker_niceness", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # The autoscaler's words, several a second for as long as a stage would like more workers than
    # there may be nodes, which is a large run's usual state; `ray status` has them.
    os.environ.setdefault("RAY_SCHEDULER_EVENTS", "0")
    if not sys.stdout.isatty():
        os.environ.setdefault("RAY_COLOR_PREFIX", "0")
    if address is None:
        # Despite its name: "0" keeps every port of the cluster on 127.0.0.1, on Linux too.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        os.environ.setdefault("RAY_enable_metrics_collection", "0")
        # How long a node may take to come up. Ray's own half a minute is short on a busy machine.
        os.environ.setdefault("RAY_raylet_start_wait_time_s", "90")
    # The uv hook would rebuild the environment of every worker; ours is the driver's own.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    import ray

    if ray.is_initialized():  # a caller (a test, a notebook) owns the connection
        yield ray
        return
    options: dict[str, Any] = {
        "log_to_driver": True,
        "logging_level": logging.ERROR,
        "runtime_env": _runtime_env(),
    }
    if address is None:
        options |= {
            "address": "local",
            "num_cpus": cfg.num_cpus or max(_LEAST_CPUS, os.cpu_count() or 1),
            "object_store_memory": cfg.object_store_mib * 2**20,
            "include_dashboard": False,
        }
    else:
        _knock(address)
        options["address"] = address
    _start(ray, options, tries=1 if address else 2)
    try:
        _check_room(ray.cluster_resources(), workers, address is None)
        yield ray
    finally:
        ray.shutdown()


def _start(ray: Any, options: dict[str, Any], tries: int) -> None:
    """ray.init; a busy machine may miss Ray's start-up time limit."""
    before = psutil.Process().children(recursive=True)
    try:
        ray.init(**options)
        take_signals()
    except Exception as error:
        ray.shutdown()
        _end_since(before)
        if tries > 1:
            return _start(ray, options, tries - 1)
        local = options["address"] == "local"
        where = "a local cluster" if local else options["address"]
        mend = "free memory, disk or ports" if local else "start it, or leave --ray.address out"
        line = " ".join(str(error).split())[:300]
        raise UserError(f"cannot reach Ray at {where}: {line}; {mend}") from error
    except BaseException:  # stopped by a signal: what has started ends with us
        ray.shutdown()
        raise


def _end_since(before: Sequence[psutil.Process]) -> None:
    """Kill our processes that were not there `before`: those of a node that did not come up, which
    Ray leaves alone until we exit, would take from the next try what the first one had too little
    of.
    """
    for process in psutil.Process().children(recursive=True):
        if process not in before:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def _check_room(there: Mapping[str, float], workers: Sequence[StageResources], own: bool) -> None:
    """No room on a cluster of our own is a fault; another one's autoscaler may still add it."""
    for kind, needed in (
        ("GPU", max((worker.gpus for worker in workers), default=0)),
        ("CPU", max((worker.cpus for worker in workers), default=0)),
    ):
        have = there.get(kind, 0)
        if needed <= have:
            continue
        line = f"a stage's worker takes {needed:g} {kind}s, and the cluster has {have:g}"
        if own:
            raise UserError(f"{line}; lower the stages' {kind.lower()}s, or use a larger cluster")
        say(f"waiting: {line}; its autoscaler may add some; if not, lower the stages' needs")


def _knock(address: str) -> None:
    """Refuse an address where nothing listens: Ray itself keeps trying for minutes, loudly."""
    match = re.fullmatch(r"(?:ray://)?\[?(?P<host>[^/\]]+)\]?:(?P<port>\d+)", address)
    if match is None:  # "auto" and the like: Ray finds those on this machine, or not, at once
        return
    try:
        socket.create_connection((match["host"], int(match["port"])), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise UserError(
            f"cannot reach Ray at {address}: {error}; start it, or leave --ray.address out"
        ) from error


def _runtime_env() -> dict[str, Any]:
    """Quiet workers that find `pipeline` and `ssr_model`, installed or not.

    A job submitted with a working directory has its code in that directory already.
    """
    if submitted():
        return {}
    here = [str(_PACKAGE_ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    paths = os.pathsep.join(dict.fromkeys(here))
    return {"env_vars": {"PYTHONPATH": paths, "PYTHONWARNINGS": "ignore"}}


def room(kind: str) -> int:
    """How many workers that take one `kind` (GPU, CPU) each the connected cluster's nodes can hold,
    whatever runs there now; nodes that are about to go, as Ray was told, hold none.
    """
    import ray
    from ray._private.state import state  # ray.nodes() does not tell which are drained

    going = state.get_draining_nodes()
    staying = (node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in going)
    return sum(int(node["Resources"].get(kind, 0)) for node in staying)


def together(workers: Sequence[StageResources], patience_s: float = 0.0) -> bool:
    """Whether the connected cluster has room for all the `workers` at the same time. Its autoscaler
    is asked for it, and waited for up to `patience_s`.
    """
    from ray.util import placement_group, remove_placement_group

    needs = [{"CPU": worker.cpus, "GPU": worker.gpus} for worker in workers]
    needs = [{kind: most for kind, most in each.items() if most} for each in needs]
    group = placement_group([each for each in needs if each] or [{"CPU": 0.001}])
    try:
        granted = group.wait(_ANSWER_S)
        if not granted and patience_s:
            say(
                f"waiting up to {patience_s / 60:g} min for room for {len(workers)} workers at once"
            )
            granted = group.wait(patience_s)
        return bool(granted)
    finally:
        remove_placement_group(group)


def cores() -> int:
    """CPU cores that this process may use."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_gib() -> float:
    """Memory that this process may use, GiB: the container's limit where there is one."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        total = min(total, int(text))
    return total / 2**30


def found() -> str:
    """One line on the machine: cores, memory, accelerator."""
    import torch

    count = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    kind = torch.accelerator.current_accelerator() if count else None
    gpu = f"{count} GPU(s), {kind}" if count else "no GPU"
    return f"found {cores()} cores, {memory_gib():.1f} GiB of memory, {gpu}"


if __name__ == "__main__":
    print(found())
