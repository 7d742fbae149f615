"""A Ray cluster whose autoscaler adds and removes nodes, as KubeRay's does, all on this machine.

The autoscaler is Ray's own (version 2); only where its nodes come from is a stand-in: a "node" is a
raylet that the provider for tests starts.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tests.ports import free_port
from tests.system.heads import end, start_head

# The provider for tests gives its nodes ids that count up from the head's.
_HEAD = "f" * 51 + "00000"
GROUP = "ray.io/node-group"
"""The label by which KubeRay's nodes tell their group."""


class Worker(NamedTuple):
    """A worker of a stage (an actor), as the cluster's head knows it."""

    group: str
    """The group of its node; "" = it has none yet."""
    resources: dict[str, float]


class Autoscaled:
    """The cluster; `environment` leads a job to it."""

    def __init__(self, address: str, environment: dict[str, str]) -> None:
        from ray._raylet import GcsClientOptions, GlobalStateAccessor

        self.environment = {**environment, "RAY_ADDRESS": address}
        self._head = GlobalStateAccessor(
            GcsClientOptions.create(
                address, None, allow_cluster_id_nil=True, fetch_cluster_id_if_nil=True
            )
        )
        self._head.connect()

    def nodes(self) -> list[str]:
        """Groups of the nodes that are there, the head aside."""
        return sorted(filter(None, self._groups(alive=True).values()))

    def workers(self) -> list[Worker]:
        """All there ever were, those that are gone too."""
        from ray.core.generated.gcs_pb2 import ActorTableData

        groups, found = self._groups(alive=False), []
        for actor in map(ActorTableData.FromString, self._head.get_actor_table(None, None)):
            if "MapWorker" in actor.class_name:
                group = groups.get(actor.address.node_id.hex(), "")
                found.append(Worker(group, dict(actor.required_resources)))
        return found

    def _groups(self, alive: bool) -> dict[str, str]:
        there = self._head.get_node_table()
        return {
            node["NodeID"]: node["Labels"].get(GROUP, "")
            for node in there
            if node["Alive"] or not alive
        }


@contextlib.contextmanager
def autoscaled(
    groups: Mapping[str, Mapping[str, Any]], environment: dict[str, str], idle_s: float = 20.0
) -> Iterator[Autoscaled]:
    """A head without CPUs, and up to `max_workers` nodes of each group, of its `resources`."""
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # sockets' paths must be short
    port = free_port()
    address = f"127.0.0.1:{port}"
    config = {
        "cluster_name": "autoscaled",
        "max_workers": sum(group["max_workers"] for group in groups.values()),
        "idle_timeout_minutes": idle_s / 60,
        "upscaling_speed": 1.0,
        "provider": {
            "type": "external",
            "module": "tests.system.fake_nodes.Provider",
            "launch_multiple": True,
            "head_node_id": _HEAD,
            "gcs_address": address,
        },
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            **{
                name: {"min_workers": 0, "node_config": {}, "labels": {GROUP: name}, **group}
                for name, group in groups.items()
            },
        },
        **{key: {} for key in ("auth", "docker", "file_mounts")},
        **{
            key: []
            for key in (
                "initialization_commands", "setup_commands", "head_setup_commands",
                "worker_setup_commands", "head_start_ray_commands", "worker_start_ray_commands",
                "cluster_synced_files", "rsync_exclude", "rsync_filter",
            )
        },
    }  # fmt: skip
    path = Path(folder, "autoscaling.json")
    path.write_text(json.dumps(config))
    environment = {
        **environment,
        "RAY_TMPDIR": folder,
        "HOME": folder,
        "RAY_AUTH_MODE": "disabled",  # a token at home is none of this cluster's
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # on loopback only, see pipeline/cluster.py
        "RAY_enable_metrics_collection": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",
    }
    own = {
        "RAY_FAKE_CLUSTER": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": _HEAD,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": _HEAD,
    }
    words = [f"--port={port}", "--num-cpus=0", "--node-ip-address=127.0.0.1"]
    words += ["--object-store-memory=104857600", "--include-dashboard=false"]
    words += [f"--autoscaling-config={path}"]
    try:
        start_head(words, {**environment, **own}, folder)
        yield Autoscaled(address, environment)
    finally:
        end(folder)
        shutil.rmtree(folder, ignore_errors=True)
