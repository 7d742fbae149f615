"""Rules 2, 3, 7 and 9: the head, the worker groups, and what a default operator refuses."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator

from infra.checks.findings import Finding, lint, subject
from infra.checks.objects import WHOLE_NODE, Pod, clusters, dig, environment, groups, jobs, selects
from infra.checks.render import Document

# As GKE, EKS, Karpenter and AKS mark nodes that may be taken away at any time.
_SPOT = re.compile("spot|preemptible", re.IGNORECASE)
_ALPHA = ("networkPolicy", "tlsOptions", "historyServerOptions")


@lint("rule 2", 'the head has num-cpus: "0", a string: no task of ours runs beside the driver')
def head_takes_no_tasks(documents: list[Document]) -> Iterator[Finding]:
    for cluster in clusters(documents):
        cpus = cluster.head.start.get("num-cpus")
        if cpus != "0":
            do = 'say num-cpus: "0"'
            yield cluster.head.finding("rayStartParams.num-cpus", f"is {cpus!r}", do)


@lint("rule 2", "rayStartParams are strings")
def start_parameters_are_strings(documents: list[Document]) -> Iterator[Finding]:
    for group in groups(documents):
        for name, value in group.start.items():
            if not isinstance(value, str):
                path = f"rayStartParams.{name}"
                yield group.finding(path, f"{value!r} is no string", f'quote it: "{value}"')


@lint("rule 2", "the head runs on demand: with it, the whole cluster is lost")
def head_on_demand(documents: list[Document]) -> Iterator[Finding]:
    for cluster in clusters(documents):
        for path, wrong in _spot(cluster.head.pod):
            yield cluster.head.pod.finding(path, wrong, "keep the head on on-demand nodes")


@lint("rule 2", "the head's memory request = limit: it is not evicted for its neighbours")
def head_memory_guaranteed(documents: list[Document]) -> Iterator[Finding]:
    for cluster in clusters(documents):
        resources = cluster.head.ray.spec.get("resources") or {}
        asked, limit = dig(resources, "requests.memory"), dig(resources, "limits.memory")
        if limit is None or asked != limit:
            path = f"{cluster.head.ray.path}.resources"
            wrong = f"memory request {asked}, limit {limit}"
            yield Finding(subject(cluster.document), path, wrong, "make them equal")


@lint("rule 2", "entrypointNumCpus stays 0, or the driver lands on a spot worker")
def driver_stays_on_the_head(documents: list[Document]) -> Iterator[Finding]:
    for document, path, job in jobs(documents):
        for field in ("entrypointNumCpus", "entrypointNumGpus", "entrypointResources"):
            if job.get(field):
                wrong = f"{job[field]!r} is only to be had on workers"
                yield Finding(subject(document), f"{path}.{field}", wrong, "leave it out")


@lint("rule 3", "one worker pod per node: Ray's view of memory, disk and network is the node's")
def one_worker_per_node(documents: list[Document]) -> Iterator[Finding]:
    for group in groups(documents):
        if group.is_head or group.gpus >= WHOLE_NODE:  # no second one fits
            continue
        terms = dig(
            group.pod.spec,
            "affinity.podAntiAffinity.requiredDuringSchedulingIgnoredDuringExecution",
        )
        apart = any(
            term.get("topologyKey") == "kubernetes.io/hostname"
            and term.get("labelSelector")  # without one, a term is about no pods
            and selects(term["labelSelector"], group.pod.labels)
            for term in terms or ()
        )
        if not apart:
            do = "require podAntiAffinity by kubernetes.io/hostname among ray.io/node-type: worker"
            yield group.pod.finding("affinity", "two workers may share a node", do)


@lint("rule 3", "autoscaled groups have no replicas: a second apply would undo the autoscaler")
def autoscaled_groups_omit_replicas(documents: list[Document]) -> Iterator[Finding]:
    for group in groups(documents):
        if group.cluster.autoscaled and not group.is_head and "replicas" in group.spec:
            yield group.finding("replicas", "is set on an autoscaled group", "leave it out")


@lint("rule 3", "autoscalerOptions.version: v2, the one that drains nodes")
def autoscaler_v2(documents: list[Document]) -> Iterator[Finding]:
    for cluster in clusters(documents):
        version = dig(cluster.spec, "autoscalerOptions.version")
        if cluster.autoscaled and version != "v2":
            yield cluster.finding("autoscalerOptions.version", f"is {version!r}", "say v2")


@lint("rule 3", "Ray pods have restartPolicy: Never, or none: Ray replaces nodes, not processes")
def pods_are_not_restarted(documents: list[Document]) -> Iterator[Finding]:
    for group in groups(documents):
        policy = group.pod.spec.get("restartPolicy")
        if policy not in (None, "Never"):
            yield group.pod.finding("restartPolicy", f"is {policy}", "say Never, or nothing")


@lint("rule 7", "/dev/shm is injected by the operator, as large as the memory asks for")
def shared_memory_is_the_operators(documents: list[Document]) -> Iterator[Finding]:
    for group in groups(documents):
        for mount in group.ray.spec.get("volumeMounts") or ():
            if mount.get("mountPath", "").rstrip("/") == "/dev/shm":
                path = f"{group.ray.path}.volumeMounts"
                wrong = "mounts /dev/shm itself"
                yield Finding(subject(group.cluster.document), path, wrong, "leave it out")


@lint("rule 7", "spilling goes to a mounted volume, by object-spilling-directory")
def spills_to_a_volume(documents: list[Document]) -> Iterator[Finding]:
    for group in groups(documents):
        variables = environment(documents, group.pod, group.ray)
        for setting in ("RAY_object_spilling_config", "RAY_object_spilling_directory"):
            if setting in variables:
                do = "use rayStartParams object-spilling-directory"
                path = f"{group.ray.path}.env"
                yield Finding(subject(group.cluster.document), path, f"has {setting}", do)
        folder = group.start.get("object-spilling-directory")
        mounts = [mount["mountPath"] for mount in group.ray.spec.get("volumeMounts") or ()]
        if folder and not any(posixpath.commonpath([folder, mount]) == mount for mount in mounts):
            wrong = f"{folder} lies on the container's own layer"
            path = "rayStartParams.object-spilling-directory"
            yield group.finding(path, wrong, "mount a volume there")


@lint("rule 9", "no alpha fields, which a default operator refuses; plain NetworkPolicy instead")
def no_alpha_fields(documents: list[Document]) -> Iterator[Finding]:
    for cluster in clusters(documents):
        for field in _ALPHA:
            if field in cluster.spec:
                do = "leave it out (tlsOptions: a mesh; networkPolicy: a NetworkPolicy)"
                yield cluster.finding(field, "needs a feature gate that is off", do)
        if dig(cluster.spec, "gcsFaultToleranceOptions.backend") == "rocksdb":
            wrong = "rocksdb needs a feature gate that is off"
            yield cluster.finding("gcsFaultToleranceOptions.backend", wrong, "leave it out")


def _spot(pod: Pod) -> Iterator[tuple[str, str]]:
    """(path, what) of everything that lets or sends a pod onto spot nodes."""
    for key, value in (pod.spec.get("nodeSelector") or {}).items():
        if _SPOT.search(value) or (_SPOT.search(key) and value == "true"):
            yield f"nodeSelector.{key}", f"selects {value}"
    for index, toleration in enumerate(pod.spec.get("tolerations") or ()):
        key, value = toleration.get("key"), toleration.get("value", "")
        if key is None or _SPOT.search(key) or _SPOT.search(value):
            yield f"tolerations[{index}]", f"tolerates {key or 'every taint'}"
    node = "affinity.nodeAffinity"
    required = dig(pod.spec, f"{node}.requiredDuringSchedulingIgnoredDuringExecution", {})
    preferred = dig(pod.spec, f"{node}.preferredDuringSchedulingIgnoredDuringExecution", [])
    terms = [*required.get("nodeSelectorTerms", ()), *(term["preference"] for term in preferred)]
    for term in terms:
        for test in term.get("matchExpressions", ()):
            words = " ".join([test["key"], *test.get("values", ())])
            if test["operator"] in ("In", "Exists") and _SPOT.search(words):
                yield node, f"wants {words}"
