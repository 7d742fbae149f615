"""Where training's processes meet: on the address that Ray uses for their node, and on no other.

By itself torch's rendezvous store listens on every address of the first worker's machine, and gloo
and NCCL on whatever the machine's name leads to. The store takes what it is told from anybody.
"""

from __future__ import annotations

import functools
import importlib
import os
import socket
from datetime import timedelta
from ipaddress import ip_address
from typing import Any

import torch.distributed as dist
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend


class Rendezvous(TorchConfig):
    """Ray Train's process group of torch, whose sockets keep to the node's own address."""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _Backend


class _Backend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        worker_group.execute(_keep_to_the_node)
        super().on_start(worker_group, backend_config)


def _keep_to_the_node() -> None:
    """Runs in every worker before its process group is made."""
    from ray.util import get_node_ip_address

    if ip_address(get_node_ip_address()).is_loopback:
        names = {name for _, name in socket.if_nameindex()}
        loopback = "lo" if "lo" in names else "lo0"
        for library in ("GLOO", "NCCL"):
            os.environ.setdefault(f"{library}_SOCKET_IFNAME", loopback)
    # torch has no setting for it; the store itself takes a socket that is bound already
    module: Any = importlib.import_module("torch.distributed.rendezvous")
    module._create_c10d_store = _store


def _store(
    hostname: str, port: int, rank: int, world_size: int, timeout: timedelta, use_libuv: bool = True
) -> dist.Store:
    """torch's own, but that the first worker's listens on `hostname` only."""
    store = functools.partial(
        dist.TCPStore, hostname, port, world_size, timeout=timeout, use_libuv=use_libuv
    )
    if rank:
        return store(is_master=False)
    family = socket.AF_INET6 if ":" in hostname else socket.AF_INET
    listener = socket.create_server((hostname, port), family=family).detach()
    return store(is_master=True, multi_tenant=True, master_listen_fd=listener)
