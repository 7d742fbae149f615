"""Where the autoscaler of autoscaling.py gets its nodes: Ray's own provider for tests, with memory,
which KubeRay tells of every group and that provider takes for a custom resource.
"""

from __future__ import annotations

import functools
from typing import Any
from unittest import mock

from ray._private import parameter
from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider


class Provider(FakeMultiNodeProvider):
    def _create_node_with_resources_and_labels(
        self, node_config: Any, tags: Any, count: int, resources: dict[str, Any], labels: Any
    ) -> None:
        rest = {name: value for name, value in resources.items() if name != "memory"}
        sized = functools.partial(parameter.RayParams, memory=resources.get("memory"))
        with mock.patch.object(parameter, "RayParams", sized):
            super()._create_node_with_resources_and_labels(node_config, tags, count, rest, labels)
