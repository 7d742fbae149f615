"""A RayService: its config and its pods agree on the port, the token, and when a pod is ready."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator
from typing import Any

import yaml

from infra.checks.findings import Finding, lint, subject
from infra.checks.lints.network import Outsider, admits
from infra.checks.objects import (
    Cluster,
    Group,
    Pod,
    clusters,
    dig,
    groups,
    kind,
    namespace,
    selects,
)
from infra.checks.render import Document
from pipeline.serving.arguments import HOST, PORT

_READY, _READY_S = "/readyz", 5
"""Answered within so many seconds (pipeline/serving/api.py)."""
_STRANGER = Outsider("default", {})


def config(cluster: Cluster) -> dict[str, Any]:
    """What Ray Serve is given; empty where it is no mapping (told by service-is-understood)."""
    try:
        found = yaml.safe_load((cluster.service or {}).get("serveConfigV2") or "")
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}


def applications(cluster: Cluster) -> list[dict[str, Any]]:
    """Those of the config that are mappings."""
    found = config(cluster).get("applications")
    return [each for each in found if isinstance(each, dict)] if isinstance(found, list) else []


@lint("serving", "proxies listen on the pod's address and port 8000, in each pod with a replica")
def service_listens_where_it_is_asked(documents: list[Document]) -> Iterator[Finding]:
    for cluster in _services(documents):
        told, path = config(cluster), "spec.serveConfigV2"
        for field, wanted in (("host", HOST), ("port", PORT)):
            given = dig(told, f"http_options.{field}")
            if given != wanted:
                wrong = f"http_options.{field} is {given}"
                yield Finding(subject(cluster.document), path, wrong, f"say {wanted}")
        if told.get("proxy_location", "EveryNode") != "EveryNode":
            wrong = f"proxy_location is {told['proxy_location']}"
            yield Finding(subject(cluster.document), path, wrong, "say EveryNode")
        for group in cluster.workers:
            ports = [entry.get("containerPort") for entry in group.ray.spec.get("ports") or ()]
            if PORT not in ports:
                path = "template.spec.containers[0].ports"
                do = f"add {{name: serve, containerPort: {PORT}}}"
                yield group.finding(path, f"{PORT} is not among {ports}", do)


@lint("serving", "the head is not asked: nothing works there")
def head_serves_nobody(documents: list[Document]) -> Iterator[Finding]:
    for cluster in _services(documents):
        if (cluster.service or {}).get("excludeHeadPodFromServeSvc") is not True:
            path, wrong = "spec.excludeHeadPodFromServeSvc", "the head is sent requests"
            yield Finding(subject(cluster.document), path, wrong, "say true")


@lint("serving", "a pod is asked at /readyz before it is sent requests, and has time to answer")
def ready_when_pictures_can_be_asked_for(documents: list[Document]) -> Iterator[Finding]:
    for group in _serving(documents):
        probe = group.ray.spec.get("readinessProbe") or {}
        asked = (dig(probe, "httpGet.path"), dig(probe, "httpGet.port"))
        path = "template.spec.containers[0].readinessProbe"
        if asked not in ((_READY, PORT), (_READY, "serve")):
            do = f"say httpGet: {{path: {_READY}, port: {PORT}}}"
            yield group.finding(path, f"asks {asked[0]} at {asked[1]}", do)
        elif probe.get("timeoutSeconds", 1) <= _READY_S:
            wrong = f"waits {probe.get('timeoutSeconds', 1)} s, and {_READY} may take {_READY_S}"
            yield group.finding(f"{path}.timeoutSeconds", wrong, f"say {_READY_S + 1}")


@lint("serving", "the token is a file of a Secret in every pod, and not written in the config")
def token_is_a_mounted_secret(documents: list[Document]) -> Iterator[Finding]:
    for cluster in _services(documents):
        for each in applications(cluster):
            token = dig(each, "args.token_file")
            for group in cluster.groups if token else ():
                if not any(posixpath.dirname(str(token)) == at for at in _secret_mounts(group)):
                    path = f"{group.ray.path}.volumeMounts"
                    wrong = f"no Secret is mounted where token_file is, {token}"
                    do = "mount it in every group, by a volume with secret"
                    yield Finding(subject(cluster.document), path, wrong, do)


@lint("serving", "port 8000 is for those that a policy names: no other role, no other namespace")
def only_clients_reach_the_service(documents: list[Document]) -> Iterator[Finding]:
    others = [group.pod for group in groups(documents) if group.cluster.service is None]
    asking: list[Pod | Outsider] = [_STRANGER, *others]
    for group in _serving(documents):
        for by in asking:
            if admits(documents, group.pod, by, PORT):
                who = by.labels.get("ssr/role", "any pod") if by.labels else "any namespace"
                do = "name its clients in a NetworkPolicy (serving-clients)"
                yield group.finding("template", f"lets {who} in, on port {PORT}", do)
                break


@lint("serving", "a PodDisruptionBudget of minAvailable keeps some workers of a service")
def serving_workers_are_kept(documents: list[Document]) -> Iterator[Finding]:
    for group in _serving(documents):
        if not any(
            isinstance(least := dig(budget, "spec.minAvailable"), int)
            and least >= 1
            and namespace(budget) == group.pod.namespace
            and selects(dig(budget, "spec.selector"), group.pod.labels)
            for budget in kind(documents, "PodDisruptionBudget")
        ):
            wrong = "no PodDisruptionBudget with a minAvailable selects its pods"
            yield group.finding("template", wrong, "add one, with a number: a share is not counted")


def _services(documents: list[Document]) -> Iterator[Cluster]:
    return (cluster for cluster in clusters(documents) if cluster.service is not None)


def _serving(documents: list[Document]) -> Iterator[Group]:
    return (group for cluster in _services(documents) for group in cluster.workers)


def _secret_mounts(group: Group) -> list[str]:
    secrets = {
        volume["name"] for volume in group.pod.spec.get("volumes") or () if volume.get("secret")
    }
    return [
        mount["mountPath"].rstrip("/")
        for mount in group.ray.spec.get("volumeMounts") or ()
        if mount["name"] in secrets
    ]
