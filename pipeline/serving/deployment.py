"""The service on Ray Serve: what runs where, started and ended."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import HTTPOptions, ProxyLocation
from ray.serve.context import _get_global_client
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig

from pipeline.cluster import cores, private
from pipeline.config import StageResources
from pipeline.config.serve import ServeConfig
from pipeline.errors import UserError
from pipeline.progress import say
from pipeline.serving.access import read_token
from pipeline.serving.api import make_app
from pipeline.serving.replicas import Drawer, RemoteArtist, keep_replica_port_here

APP = "ssr"


@serve.ingress()
class Front:
    """The HTTP API, and the page on it."""

    def __init__(self, drawers: DeploymentHandle, cfg: ServeConfig, token: str | None) -> None:
        keep_replica_port_here()
        if token is None and cfg.token_file is not None:  # of rayservice.py: a Secret of this pod
            token = read_token(cfg)
        self._web = make_app(RemoteArtist(drawers), cfg, token)
        if cfg.page:
            from pipeline.serving.page import mount_page

            self._web = mount_page(self._web, self._web.state.artist, cfg)
        self._service = self._web.state.service

    def __serve_build_asgi_app__(self) -> Any:
        return self._web

    async def drain(self, within_s: float) -> bool:
        """See Service.drain."""
        return bool(await self._service.drain(within_s))


def resources(cfg: ServeConfig) -> StageResources:
    """What a replica takes of the connected cluster."""
    own = private(cfg.ray)
    if cfg.device == "auto":
        on_gpu = ray.cluster_resources().get("GPU", 0) > 0
    else:
        on_gpu = cfg.device.startswith("cuda")
    cpus = 1 if on_gpu or not own else max(1, cores() // cfg.replicas)
    return StageResources(cpus=cpus, gpus=1 if on_gpu else 0, max_workers=cfg.replicas)


def application(cfg: ServeConfig, token: str | None, front_cpus: float = 0) -> serve.Application:
    """The whole as Ray Serve takes it. token: none = the front reads cfg.token_file, if any."""
    takes = resources(cfg)
    drawers = serve.deployment(
        Drawer,
        name="drawer",
        num_replicas=cfg.replicas,
        # what is too much the replica's own queue refuses, at once
        max_ongoing_requests=cfg.room + 64,
        ray_actor_options={"num_cpus": takes.cpus, "num_gpus": takes.gpus},
        graceful_shutdown_timeout_s=cfg.drain_s,
        graceful_shutdown_wait_loop_s=0.2,
        health_check_period_s=2,
        health_check_timeout_s=30,
        max_constructor_retry_count=2,
    )
    front = serve.deployment(
        Front,
        name="front",
        num_replicas=1,  # the page's sessions live in it
        max_ongoing_requests=cfg.room + 1000,
        max_queued_requests=1000,
        ray_actor_options={"num_cpus": front_cpus},
        graceful_shutdown_timeout_s=cfg.drain_s,
        graceful_shutdown_wait_loop_s=0.2,
        health_check_period_s=2,
        health_check_timeout_s=30,
    )
    return front.bind(drawers.bind(cfg), cfg, token)


@contextlib.contextmanager
def served(cfg: ServeConfig, token: str | None) -> Iterator[None]:
    """The service on the connected cluster, ready; drained and ended with the block.

    Raises UserError where it does not start, and for a port in use.
    """
    _check_running(cfg)
    _check_room(cfg)
    quiet = LoggingConfig(log_level="CRITICAL", enable_access_log=False)
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    try:
        serve.start(
            proxy_location=ProxyLocation.HeadOnly,
            http_options=HTTPOptions(host=cfg.host, port=cfg.port),
            logging_config=quiet,
        )
        handle = serve.run(
            application(cfg, token), name=APP, route_prefix="/", logging_config=quiet
        )
    except RuntimeError as fault:
        said = _told_by_replicas() or str(fault)
        _end(cfg)
        found = re.findall(r"UserError[^:]*: (.+)", said)
        line = found[-1] if found else " ".join(said.split())[:300]
        raise UserError(f"the service does not start: {line}") from fault
    except BaseException:
        _end(cfg)
        raise
    try:
        yield
    finally:
        with contextlib.suppress(RayError, RayServeException, TimeoutError):
            handle.drain.remote(cfg.drain_s).result(timeout_s=cfg.drain_s + 10)
        _end(cfg)


def _told_by_replicas() -> str:
    """What deployments that do not start say of it, tracebacks and all."""
    with contextlib.suppress(Exception):  # of a cluster that is about to end
        there = serve.status().applications[APP].deployments.values()
        return "\n".join(each.message for each in there)
    return ""


def _check_running(cfg: ServeConfig) -> None:
    """Where Ray Serve runs on the cluster already, it listens where it was told to at its start."""
    client = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        return
    there = client.http_config
    if (there.host, there.port) != (cfg.host, cfg.port):
        raise UserError(
            f"Ray Serve runs on this cluster already, on {there.host}:{there.port}; give that as "
            "--host and --port, or end it (serve shutdown)"
        )


def _check_room(cfg: ServeConfig) -> None:
    """Ray would wait for ever for what is not there; another one's autoscaler may still add it."""
    takes, there = resources(cfg), ray.cluster_resources()
    for kind, each in (("GPU", takes.gpus), ("CPU", takes.cpus)):
        needed, have = each * cfg.replicas, there.get(kind, 0)
        if needed > have:
            line = (
                f"{cfg.replicas} replica(s) take {needed:g} {kind}(s), and the cluster has {have:g}"
            )
            if private(cfg.ray):
                raise UserError(f"{line}; lower --replicas, or use a larger cluster")
            say(f"waiting: {line}; the cluster's autoscaler may add some")


def _end(cfg: ServeConfig) -> None:
    """Leave another one's cluster as it was; our own ends by itself, with all that is in it."""
    if not private(cfg.ray):
        serve.delete(APP) if _others() else serve.shutdown()


def _others() -> bool:
    """Whether the cluster serves other applications."""
    return bool(set(serve.status().applications) - {APP})
