"""The service on Ray Serve: replicas that draw, and the one front that HTTP comes to."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import ray
from PIL import Image
from ray import serve
from ray.exceptions import RayActorError, RayError
from ray.serve.config import HTTPOptions, ProxyLocation
from ray.serve.context import _get_global_client
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig

from pipeline.cluster import cores, private
from pipeline.config import StageResources
from pipeline.config.serve import ServeConfig
from pipeline.errors import UserError
from pipeline.generation.recipe import Recipe
from pipeline.progress import say
from pipeline.serving.access import read_token
from pipeline.serving.api import make_app
from pipeline.serving.artist import Busy, Drawn, Facts, Gone, Late, Look, Step

APP = "ssr"
_TAKEN_S = 10.0
"""A replica that lives takes a request at once; where there is none, one is waited for so long."""
_TRIES = 2
_FACTS_S = 5.0
_STARTING_S = 1800.0
"""Weights may come from a hub first."""


@dataclass(frozen=True)
class _Fault:
    """An exception of the artist as an answer: raised, Ray would log it as a failure."""

    kind: str
    line: str


_KINDS: dict[str, type[Exception]] = {
    kind.__name__: kind for kind in (UserError, Busy, Late, Gone, RuntimeError)
}


def _keep_replica_port_here() -> None:
    """Let the gRPC port that Ray Serve opens in every replica listen on 127.0.0.1, not on all
    addresses: it unpickles whatever anybody sends. Handles and the proxy do not use it, unless they
    are told to by RAY_SERVE_USE_GRPC_BY_DEFAULT. Called before a replica opens it: in __init__.
    """
    from ray.serve._private import constants, replica

    if constants.RAY_SERVE_USE_GRPC_BY_DEFAULT or constants.RAY_SERVE_PROXY_USE_GRPC:
        return
    opens = replica.add_port_to_grpc_server

    def open_here(server: Any, address: str) -> Any:
        return opens(server, address.replace("[::]", "127.0.0.1"))

    replica.add_port_to_grpc_server = open_here


class Drawer:
    """A replica: the models on its device, and the queue before them."""

    def __init__(self, cfg: ServeConfig) -> None:
        from pipeline.progress import quiet_libraries
        from pipeline.serving.local import LocalArtist

        _keep_replica_port_here()
        quiet_libraries()
        self._artist = LocalArtist.load(cfg)

    async def ask(self, name: str, *asked: Any) -> AsyncGenerator[Any]:
        """What the artist's method gives, one by one; before it a None: the request has arrived."""
        yield None
        try:
            if name == "draw":
                drawing: Any = self._artist.draw(*asked)
                async with aclosing(drawing):
                    async for told in drawing:
                        yield told
            else:
                yield await getattr(self._artist, name)(*asked)
        except (UserError, Busy, Late, Gone) as fault:
            yield _Fault(type(fault).__name__, str(fault))
        except Exception as fault:  # the artist has logged it
            yield _Fault("RuntimeError", type(fault).__name__)

    async def check_health(self) -> None:
        """Called by Ray Serve, which starts a replica anew where it raises."""
        if not self._artist.well:
            raise RuntimeError("the drawing thread has ended, or its batches fail")


class RemoteArtist:
    """The Artist of all replicas. A request whose replica dies is asked once more of another."""

    def __init__(self, drawers: DeploymentHandle) -> None:
        self._ask = drawers.options(method_name="ask", stream=True)

    async def facts(self) -> Facts:
        try:
            return await self._one("facts", _FACTS_S)  # type: ignore[no-any-return]
        except Late:
            raise Gone("no replica answers") from None

    async def look(self, image: Image.Image, queries: list[str], within_s: float) -> list[Look]:
        return await self._one("look", within_s, image, queries)  # type: ignore[no-any-return]

    async def draw(self, recipe: Recipe, within_s: float) -> AsyncIterator[Step | Drawn]:
        async with aclosing(self._answers("draw", within_s, recipe)) as answers:
            async for told in answers:
                yield told

    async def _one(self, name: str, within_s: float, *asked: Any) -> Any:
        async with aclosing(self._answers(name, within_s, *asked)) as answers:
            async for told in answers:
                return told
        raise Gone("no answer came")

    async def _answers(self, name: str, within_s: float, *asked: Any) -> AsyncGenerator[Any]:
        ends = time.monotonic() + within_s
        for tried in range(1, _TRIES + 1):
            try:
                async with aclosing(self._try(name, ends, within_s, *asked)) as answers:
                    async for told in answers:
                        yield told
                return
            except BackPressureError as fault:
                raise Busy("all replicas are at work") from fault
            except (RayActorError, RayServeException) as fault:
                if tried == _TRIES:
                    raise Gone("its process has ended") from fault
            except RayError as fault:
                raise Gone(type(fault).__name__) from fault

    async def _try(
        self, name: str, ends: float, within_s: float, *asked: Any
    ) -> AsyncGenerator[Any]:
        left_s = ends - time.monotonic()
        last = () if name == "facts" else (left_s,)
        response = self._ask.remote(name, *asked, *last)
        taken = False
        try:
            while True:
                # a replica keeps the deadline itself; the second more is for its word to come
                patience_s = ends + 1 - time.monotonic() if taken else min(_TAKEN_S, left_s)
                try:
                    told = await asyncio.wait_for(anext(response), max(patience_s, 0))
                except StopAsyncIteration:
                    return
                except TimeoutError:
                    if taken or time.monotonic() >= ends:
                        raise Late(f"not done within {within_s:.1f} s") from None
                    raise Gone("no replica is there") from None
                if isinstance(told, _Fault):
                    raise _KINDS[told.kind](told.line)
                if told is not None:
                    yield told
                taken = True
        finally:
            response.cancel()  # of what is done already it is nothing


@serve.ingress()
class Front:
    """The HTTP API, and the page on it."""

    def __init__(self, drawers: DeploymentHandle, cfg: ServeConfig, token: str | None) -> None:
        _keep_replica_port_here()
        if (
            token is None and cfg.token_file is not None
        ):  # rayservice.py: a Secret of the front's pod
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
    inside = cfg.queue + 2 * cfg.batch
    drawers = serve.deployment(
        Drawer,
        name="drawer",
        num_replicas=cfg.replicas,
        # what is too much the replica's own queue refuses, at once
        max_ongoing_requests=cfg.replicas * inside + 64,
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
        max_ongoing_requests=cfg.replicas * inside + 1000,
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
            line = f"{cfg.replicas} replicas take {needed:g} {kind}s, and there are {have:g}"
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
