"""A Ray cluster of three nodes on this machine, whose nodes and workers can be killed."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import psutil

from tests.system.heads import PATIENT, REPOSITORY, TRIES, end

# A small head: Ray packs workers there first, and nodes without any are no loss.
_PLAIN = {"num_cpus": 1, "include_dashboard": False}
# As infra/ has it: no work on the head.
_FOR_JOBS = {
    "num_cpus": 0,
    "include_dashboard": True,
    "dashboard_port": 0,
    "dashboard_agent_listen_port": 0,
}

# In a process of its own: a cluster's nodes are children of the process that started them. A node
# that did not start in Ray's time is ended, and another one tried; a head is its caller's business.
_CLUSTER = """
import itertools
import json
import os
import sys
import psutil
from ray._private.ray_constants import PROCESS_TYPE_RAYLET
from ray.cluster_utils import Cluster

cluster, numbers, tries = Cluster(), itertools.count(1), int(sys.argv[2])

def add(**options):
    for left in reversed(range(tries)):
        before = psutil.Process().children(recursive=True)
        # folders of their own: a node unpacks a job's files anew, wherever others have them open
        folder = os.environ["RAY_TMPDIR"] + f"/{next(numbers)}"
        try:
            return cluster.add_node(num_cpus=2, temp_dir=folder, **options)
        except Exception:
            if not left:
                raise
            for process in psutil.Process().children(recursive=True):
                if process not in before:
                    process.kill()

room = {"object_store_memory": 100 * 2**20}
for line in itertools.chain(["head"], sys.stdin):
    node = add(**room) if cluster.head_node else cluster.add_node(**room, **json.loads(sys.argv[1]))
    pid = node.all_processes[PROCESS_TYPE_RAYLET][0].process.pid
    agent = node.dashboard_agent_listen_port
    print("node", pid, node.node_id, agent, cluster.address, cluster.webui_url or None, flush=True)
"""


class Node(NamedTuple):
    """A node: its raylet's process id, and what Ray calls it."""

    pid: int
    id: str
    agent: int
    """Port of its dashboard agent."""


class Raylets:
    """The head and two more nodes; `environment` leads a job to them."""

    def __init__(self, process: subprocess.Popen[str], environment: dict[str, str]) -> None:
        self._process = process
        self.nodes: list[Node] = []
        """Those beside the head."""
        self.head, self.address, self.dashboard = self._node()
        self.environment = {**environment, "RAY_ADDRESS": self.address}
        for _ in range(2):
            self.add_node()

    def add_node(self) -> None:
        _pipe(self._process.stdin).write("node\n")
        _pipe(self._process.stdin).flush()
        self.nodes.append(self._node()[0])

    def kill_node(self, rng: random.Random) -> str:
        """kill -9 a busy node, all its processes at once, as a machine goes; another one comes."""
        node = self.busy_node(rng)
        workers = self.end_node(node)
        self.add_node()
        return f"node with {workers} workers"

    def busy_node(self, rng: random.Random) -> Node:
        """One that has workers, if there is one."""
        busy = [node for node in self.nodes if any(map(_worker, _family(node.pid)))]
        return rng.choice(busy or self.nodes)

    def end_node(self, node: Node) -> int:
        """kill -9 a node, all its processes at once; how many workers it had."""
        self.nodes.remove(node)
        family = _family(node.pid)
        workers = sum(bool(_worker(process)) for process in family)
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        return workers

    def give_notice(self, node: Node, seconds: int) -> None:
        """Tell Ray that a node will go, as a cloud's notice does that takes a spot machine back."""
        words = ["--address", self.address, "--node-id", node.id]
        words += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
        words += ["--deadline-remaining-seconds", str(seconds)]
        ray = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", *words]
        subprocess.run(ray, env=self.environment, check=True, capture_output=True, timeout=300)

    def workers(self, but: Node | None = None) -> list[psutil.Process]:
        """Those of stages and of training, but for one node's."""
        nodes = [node for node in (self.head, *self.nodes) if node != but]
        found = [process for node in nodes for process in _family(node.pid) if _worker(process)]
        return sorted(found, key=lambda process: process.pid)

    def kill_worker(self, rng: random.Random) -> str:
        """kill -9 a worker of a stage or of training; "" where there is none just now."""
        workers = self.workers()
        if not workers:
            return ""
        worker = rng.choice(workers)
        title = _worker(worker)
        with contextlib.suppress(psutil.NoSuchProcess):
            worker.send_signal(signal.SIGKILL)
        return f"worker {title}"

    def _node(self) -> tuple[Node, str, str]:
        """The node that has come, the cluster's address, and its dashboard's ("None" without)."""
        for line in _pipe(self._process.stdout):
            if line.startswith("node "):
                _, pid, name, agent, address, dashboard = line.split()
                return Node(int(pid), name, int(agent)), address, dashboard
        raise RuntimeError(f"the cluster ended with {self._process.wait()}")


@contextlib.contextmanager
def raylets(environment: dict[str, str], token: str = "") -> Iterator[Raylets]:
    """The cluster, in folders of its own; `environment` is its workers'. With a `token` it takes
    submitted jobs, from those who know it.
    """
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # sockets' paths must be short
    environment = {
        **environment,
        "RAY_TMPDIR": folder,
        "HOME": folder,
        # an earlier Ray of this process may have found a token at home, which is none of this one's
        "RAY_AUTH_MODE": "token" if token else "disabled",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # on loopback only, see pipeline/cluster.py
        "RAY_enable_metrics_collection": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",
    }
    if token:
        kept = Path(folder, ".ray", "auth_token")  # where Ray looks for it, under HOME
        kept.parent.mkdir()
        kept.write_text(token)
    try:
        yield _started(environment, _FOR_JOBS if token else _PLAIN, folder)
    finally:
        end(folder)
        shutil.rmtree(folder, ignore_errors=True)


def _started(environment: dict[str, str], head: dict[str, Any], folder: str) -> Raylets:
    said = Path(folder, "stderr")
    for _ in range(TRIES):
        with said.open("w") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-c", _CLUSTER, json.dumps(head), str(TRIES)],
                cwd=REPOSITORY,
                env={**environment, **PATIENT},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                start_new_session=True,
            )
        try:
            return Raylets(process, environment)
        except RuntimeError as error:
            end(folder)
            why = RuntimeError(f"{error}: {said.read_text()[-2000:]}")
    raise why


def _family(pid: int) -> list[psutil.Process]:
    """A raylet and all that it started."""
    raylet = psutil.Process(pid)
    return [raylet, *raylet.children(recursive=True)]


def _worker(process: psutil.Process) -> str:
    """What a worker of a stage or of training is called by Ray; "" for any other process."""
    with contextlib.suppress(psutil.Error):
        title = " ".join(process.cmdline()).strip()
        if title.startswith("ray::") and ("_Worker" in title or "RayTrainWorker" in title):
            return title
    return ""


def _pipe(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None
    return pipe
