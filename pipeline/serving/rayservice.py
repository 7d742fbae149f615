"""The service as an application of a Ray Serve config, which KubeRay's RayService gives a cluster.

applications:
  - {name: ssr, route_prefix: /, import_path: "pipeline.serving.rayservice:build", args: {...}}
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ray import serve

from pipeline.config.shared import RayConfig
from pipeline.serving.access import read_token
from pipeline.serving.arguments import FRONT_CPUS, settings
from pipeline.serving.deployment import application


def build(args: dict[str, Any]) -> serve.Application:
    """Called by Ray Serve, in a task on any node. Every node has the token's file: it is read here
    to fail at once, and by the front for itself, so that no record of Ray's holds the token.
    """
    cfg = replace(settings(args), ray=RayConfig(address="auto"))
    read_token(cfg)
    return application(cfg, None, front_cpus=FRONT_CPUS)
