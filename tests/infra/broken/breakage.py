"""How breakages are registered, and the parts of rendered documents that they change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from infra.checks.render import Document

Documents = list[Document]
QUEUE = "kueue.x-k8s.io/queue-name"


@dataclass(frozen=True)
class Breakage:
    """`apply` changes documents in place; `lints` are the names of those that then find something.

    The first is the one that it is made for.
    """

    name: str
    lints: tuple[str, ...]
    apply: Callable[[Documents], None]


BREAKAGES: list[Breakage] = []


def breaks(*lints: str) -> Callable[[Callable[[Documents], None]], None]:
    """Register the function as a way to break what `lints` guard."""

    def register(apply: Callable[[Documents], None]) -> None:
        BREAKAGES.append(Breakage(apply.__name__, lints, apply))

    return register


ALLOWED: list[Breakage] = []


def allows(apply: Callable[[Documents], None]) -> None:
    """Register the function as a change that no lint has anything against."""
    ALLOWED.append(Breakage(apply.__name__, (), apply))


def named(documents: Documents, kind: str, name: str) -> Document:
    """The one document of this kind and name."""
    (found,) = (d for d in documents if d["kind"] == kind and d["metadata"]["name"] == name)
    return found


def of_kind(documents: Documents, kind: str) -> Documents:
    return [document for document in documents if document["kind"] == kind]


def job(documents: Documents, name: str) -> dict[str, Any]:
    return named(documents, "RayJob", name)["spec"]


def cluster(documents: Documents, name: str) -> dict[str, Any]:
    return job(documents, name)["rayClusterSpec"]


def head(documents: Documents, name: str) -> dict[str, Any]:
    return cluster(documents, name)["headGroupSpec"]


def workers(documents: Documents, name: str) -> dict[str, Any]:
    """The first group of workers."""
    return cluster(documents, name)["workerGroupSpecs"][0]


def pod(group: dict[str, Any]) -> dict[str, Any]:
    return group["template"]["spec"]


def ray(group: dict[str, Any]) -> dict[str, Any]:
    return pod(group)["containers"][0]


def set_env(group: dict[str, Any], name: str, value: str | None) -> None:
    """Give the Ray container a variable; None takes it away."""
    entries = [entry for entry in ray(group).get("env", []) if entry["name"] != name]
    ray(group)["env"] = entries + ([{"name": name, "value": value}] if value is not None else [])


def unset(documents: Documents, variable: str) -> None:
    """Take a variable from the training workers, wherever it comes from."""
    for name in ("train", "nccl-smoke"):
        set_env(workers(documents, name), variable, None)
    for config in of_kind(documents, "ConfigMap"):
        config.get("data", {}).pop(variable, None)
