"""What pods name is there: kustomize rewrites only the references that it is told of."""

from __future__ import annotations

from collections.abc import Iterator

from infra.checks.findings import Finding, lint, subject
from infra.checks.objects import Pod, dig, groups, pods
from infra.checks.render import Document

# Kubernetes' own classes need no manifest.
_BUILT_IN = {"system-cluster-critical", "system-node-critical"}


@lint("kustomize traps", "config maps, claims and priority classes that pods name are rendered too")
def references_resolve(documents: list[Document]) -> Iterator[Finding]:
    there = {
        (document["kind"], dig(document, "metadata.namespace"), document["metadata"]["name"])
        for document in documents
    }
    for pod in pods(documents):
        for path, kind, name in _references(pod):
            place = None if kind == "PriorityClass" else dig(pod.document, "metadata.namespace")
            if name not in _BUILT_IN and (kind, place, name) not in there:
                wrong = f"no {kind} {name} among what is rendered"
                do = "add it, or list the path under configurations: nameReference"
                yield Finding(subject(pod.document), path, wrong, do)


@lint("kustomize traps", "a patch keeps every worker group whole: name, image and size")
def worker_groups_are_whole(documents: list[Document]) -> Iterator[Finding]:
    for group in groups(documents):
        if not group.ray.spec.get("image"):
            wrong = f"group {group.name!r} has no image: a patch replaced it"
            do = "declare groupName as the merge key (openapi:)"
            yield group.finding("template.spec.containers[0].image", wrong, do)


def _references(pod: Pod) -> Iterator[tuple[str, str, str]]:
    """(path, kind, name) of what a pod cannot start without."""
    for index, volume in enumerate(pod.spec.get("volumes") or ()):
        path = f"{pod.spec_path}.volumes[{index}]"
        sources = [volume, *(dig(volume, "projected.sources") or ())]
        for source in sources:
            if (name := dig(source, "configMap.name")) and not dig(source, "configMap.optional"):
                yield path, "ConfigMap", name
        if name := dig(volume, "persistentVolumeClaim.claimName"):
            yield path, "PersistentVolumeClaim", name
    for container in pod.containers:
        for source in container.spec.get("envFrom") or ():
            if name := dig(source, "configMapRef.name"):
                yield f"{container.path}.envFrom", "ConfigMap", name
        for entry in container.env.values():
            if name := dig(entry, "valueFrom.configMapKeyRef.name"):
                yield f"{container.path}.env", "ConfigMap", name
    if name := pod.spec.get("priorityClassName"):
        yield f"{pod.spec_path}.priorityClassName", "PriorityClass", name
