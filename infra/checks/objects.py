"""What the lints talk about: Ray clusters, their groups, pods, containers, found in documents."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from infra.checks.findings import Finding, subject
from infra.checks.render import Document

WHOLE_NODE = 8
"""GPUs of the largest nodes, H800s: a pod that takes them has the node to itself."""

# Where a RayClusterSpec lies in each kind that holds one.
_CLUSTERS = {
    "RayCluster": "spec",
    "RayJob": "spec.rayClusterSpec",
    "RayService": "spec.rayClusterConfig",
    "RayCronJob": "spec.jobTemplate.rayClusterSpec",
}
# Where a pod template lies in the others.
_TEMPLATES = {
    "Pod": "",
    "Deployment": "spec.template",
    "DaemonSet": "spec.template",
    "StatefulSet": "spec.template",
    "Job": "spec.template",
    "CronJob": "spec.jobTemplate.spec.template",
    "RayJob": "spec.submitterPodTemplate",
    "RayCronJob": "spec.jobTemplate.submitterPodTemplate",
}
_DECIMAL = {"m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18}
# The commands whose ranks wait for each other: all of their workers start, or none should.
_TRAINING = re.compile(r"jobs/train\.py|pipeline[./]training")


@dataclass(frozen=True)
class Container:
    """A container of `pod`; the first one of a Ray pod runs Ray."""

    path: str
    spec: dict[str, Any]

    @property
    def env(self) -> dict[str, dict[str, Any]]:
        return {entry["name"]: entry for entry in self.spec.get("env") or ()}


@dataclass(frozen=True)
class Pod:
    """A pod template; `labels` as its pods will have them, KubeRay's own included."""

    document: Document
    path: str
    template: dict[str, Any]
    labels: dict[str, str]

    @property
    def spec(self) -> dict[str, Any]:
        return self.template.get("spec") or {}

    @property
    def spec_path(self) -> str:
        return f"{self.path}.spec".removeprefix(".")

    @property
    def namespace(self) -> str:
        return namespace(self.document)

    @property
    def containers(self) -> list[Container]:
        """Init containers too, first the ordinary ones."""
        return [
            Container(f"{self.spec_path}.{kind}[{index}]", spec)
            for kind in ("containers", "initContainers")
            for index, spec in enumerate(self.spec.get(kind) or ())
        ]

    def finding(self, path: str, wrong: str, do: str) -> Finding:
        """`path` within the pod's spec."""
        return Finding(subject(self.document), f"{self.spec_path}.{path}".strip("."), wrong, do)


@dataclass(frozen=True)
class Group:
    """The head (name `headgroup`, as KubeRay calls it) or a group of workers."""

    cluster: Cluster
    name: str
    path: str
    spec: dict[str, Any]

    @property
    def is_head(self) -> bool:
        return self.name == "headgroup"

    @property
    def training(self) -> bool:
        return self.cluster.training and not self.is_head

    @property
    def pod(self) -> Pod:
        template = self.spec.get("template") or {}
        given = dig(template, "metadata.labels") or {}
        labels = {
            **given,
            "app.kubernetes.io/name": "kuberay",
            "app.kubernetes.io/created-by": "kuberay-operator",
            "ray.io/is-ray-node": "yes",
            "ray.io/node-type": "head" if self.is_head else "worker",
            "ray.io/group": self.name,
        }
        if self.cluster.document["kind"] == "RayCluster":  # a job's cluster gets a random name
            labels["ray.io/cluster"] = self.cluster.document["metadata"]["name"]
        return Pod(self.cluster.document, f"{self.path}.template", template, labels)

    @property
    def ray(self) -> Container:
        """The container that runs Ray; an empty one where there is none."""
        return next(iter(self.pod.containers), Container(f"{self.pod.spec_path}.containers[0]", {}))

    @property
    def start(self) -> dict[str, Any]:
        return self.spec.get("rayStartParams") or {}

    @property
    def gpus(self) -> int:
        return int(dig(self.ray.spec, "resources.limits", {}).get("nvidia.com/gpu", 0))

    @property
    def rdma(self) -> str | None:
        """The site's RDMA resource, whatever its name."""
        limits = dig(self.ray.spec, "resources.limits", {})
        return next((name for name in limits if re.search("rdma|hca|infiniband|roce", name)), None)

    def finding(self, path: str, wrong: str, do: str) -> Finding:
        """`path` within the group."""
        return Finding(subject(self.cluster.document), f"{self.path}.{path}", wrong, do)


@dataclass(frozen=True)
class Cluster:
    """A RayClusterSpec in `document`, and the RayJob's spec around it, if any."""

    document: Document
    path: str
    spec: dict[str, Any]
    job: dict[str, Any] | None

    @property
    def service(self) -> dict[str, Any] | None:
        """The RayService's spec around it, if any."""
        return self.document.get("spec") if self.document["kind"] == "RayService" else None

    @property
    def autoscaled(self) -> bool:
        return bool(self.spec.get("enableInTreeAutoscaling"))

    @property
    def training(self) -> bool:
        return bool(self.job and _TRAINING.search(self.job.get("entrypoint", "")))

    @property
    def head(self) -> Group:
        path = f"{self.path}.headGroupSpec"
        return Group(self, "headgroup", path, self.spec.get("headGroupSpec") or {})

    @property
    def workers(self) -> list[Group]:
        return [
            Group(self, spec.get("groupName", ""), f"{self.path}.workerGroupSpecs[{index}]", spec)
            for index, spec in enumerate(self.spec.get("workerGroupSpecs") or ())
        ]

    @property
    def groups(self) -> list[Group]:
        return [self.head, *self.workers]

    def finding(self, path: str, wrong: str, do: str) -> Finding:
        """`path` within the RayClusterSpec."""
        return Finding(subject(self.document), f"{self.path}.{path}", wrong, do)


def clusters(documents: list[Document]) -> Iterator[Cluster]:
    """Every RayClusterSpec; a RayJob that selects a running cluster has none."""
    for document in documents:
        path = _CLUSTERS.get(document.get("kind", ""))
        spec = dig(document, path) if path else None
        if path and spec:
            job = dig(document, path.rpartition(".")[0]) if "rayClusterSpec" in path else None
            yield Cluster(document, path, spec, job)


def groups(documents: list[Document]) -> Iterator[Group]:
    """The head and the worker groups of every cluster."""
    for cluster in clusters(documents):
        yield from cluster.groups


def jobs(documents: list[Document]) -> Iterator[tuple[Document, str, dict[str, Any]]]:
    """(document, path, spec) of every RayJob, scheduled ones included."""
    for document in documents:
        if document.get("kind") == "RayJob":
            yield document, "spec", document.get("spec") or {}
        elif document.get("kind") == "RayCronJob":
            yield document, "spec.jobTemplate", dig(document, "spec.jobTemplate", {})


def pods(documents: list[Document]) -> Iterator[Pod]:
    """Every pod template: Ray's, submitters', and those of core workloads."""
    for group in groups(documents):
        yield group.pod
    for document in documents:
        path = _TEMPLATES.get(document.get("kind", ""))
        template = dig(document, path) if path is not None else None
        if path is not None and template:
            yield Pod(document, path, template, dig(template, "metadata.labels") or {})


def environment(documents: list[Document], pod: Pod, container: Container) -> dict[str, str]:
    """Variable -> value, config maps looked up; "" where only the cluster knows it (a secret's)."""
    maps = {
        entry["metadata"]["name"]: entry.get("data") or {}
        for entry in kind(documents, "ConfigMap")
        if namespace(entry) == pod.namespace
    }
    variables: dict[str, str] = {}
    for source in container.spec.get("envFrom") or ():
        variables.update(maps.get(dig(source, "configMapRef.name"), {}))
    for name, entry in container.env.items():
        key = dig(entry, "valueFrom.configMapKeyRef", {})
        looked_up = maps.get(key.get("name"), {}).get(key.get("key"), "")
        variables[name] = str(entry.get("value", looked_up))
    return variables


def kind(documents: list[Document], *kinds: str) -> list[Document]:
    """The documents of these kinds."""
    return [document for document in documents if document.get("kind") in kinds]


def namespace(document: Document) -> str:
    return str(dig(document, "metadata.namespace") or "default")


def dig(value: Any, path: str, default: Any = None) -> Any:
    """What lies at the dotted `path` of nested mappings; `default` where nothing does."""
    for part in filter(None, path.split(".")):
        if not isinstance(value, dict) or value.get(part) is None:
            return default
        value = value[part]
    return value


def quantity(amount: str | int | float) -> float:
    """Kubernetes' 500m, 16Gi, 2e3 as a number."""
    text = str(amount)
    if text.endswith("i"):
        return float(text[:-2]) * 1024 ** (1 + "KMGTPE".index(text[-2]))
    if text[-1] in _DECIMAL:
        return float(text[:-1]) * _DECIMAL[text[-1]]
    return float(text)


def selects(selector: dict[str, Any] | None, labels: dict[str, str]) -> bool:
    """Whether a label selector takes a pod with `labels`; an empty one takes every pod."""
    selector = selector or {}
    if any(labels.get(key) != value for key, value in (selector.get("matchLabels") or {}).items()):
        return False
    return all(_holds(test, labels) for test in selector.get("matchExpressions") or ())


def _holds(test: dict[str, Any], labels: dict[str, str]) -> bool:
    value, values = labels.get(test["key"]), test.get("values") or ()
    return {
        "In": value in values,
        "NotIn": value not in values,
        "Exists": value is not None,
        "DoesNotExist": value is None,
    }[test["operator"]]


def every_string(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """(path, string) of every string in a document."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield from every_string(part, f"{path}.{key}".removeprefix("."))
    elif isinstance(value, list):
        for index, part in enumerate(value):
            yield from every_string(part, f"{path}[{index}]")
    elif isinstance(value, str):
        yield path, value
