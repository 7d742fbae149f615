"""Rules 4 and 5 for every RayJob: queued, retried, ended; and the typos that schemas let pass."""

from __future__ import annotations

import re
from collections.abc import Iterator

from infra.checks.findings import Finding, lint, subject
from infra.checks.objects import (
    Cluster,
    Pod,
    clusters,
    dig,
    environment,
    jobs,
    kind,
    namespace,
    pods,
    quantity,
)
from infra.checks.render import Document

QUEUE = "kueue.x-k8s.io/queue-name"
_SUBMISSION_MODES = ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode")
_ROOT = re.compile(r"--root[= ]+[\"']?([^\s\"']+)")


@lint("rule 4", "a queued RayJob has shutdownAfterJobFinishes: true, or it keeps its quota")
def queued_job_shuts_down(documents: list[Document]) -> Iterator[Finding]:
    for document, path, job in jobs(documents):
        if _queue(document) and job.get("shutdownAfterJobFinishes") is not True:
            where = f"{path}.shutdownAfterJobFinishes"
            wrong = f"is {job.get('shutdownAfterJobFinishes')} on a queued job"
            yield Finding(subject(document), where, wrong, "say true")


@lint("rule 4", "deletionRules and shutdownAfterJobFinishes exclude each other")
def no_deletion_rules_with_shutdown(documents: list[Document]) -> Iterator[Finding]:
    for document, path, job in jobs(documents):
        if dig(job, "deletionStrategy.deletionRules") and job.get("shutdownAfterJobFinishes"):
            where = f"{path}.deletionStrategy.deletionRules"
            wrong = "stand beside shutdownAfterJobFinishes: the operator refuses the job"
            yield Finding(subject(document), where, wrong, "keep one of them")


@lint("rule 4", "a queue that a job waits in is one of ours, in its namespace")
def queue_exists(documents: list[Document]) -> Iterator[Finding]:
    queues = {
        (namespace(queue), queue["metadata"]["name"]): dig(queue, "spec.clusterQueue")
        for queue in kind(documents, "LocalQueue")
    }
    cluster_queues = {queue["metadata"]["name"] for queue in kind(documents, "ClusterQueue")}
    for document in kind(documents, "RayJob", "RayCluster", "RayCronJob"):
        name = _queue(document)
        if name and (namespace(document), name) not in queues:
            wrong = f"no LocalQueue {name} in {namespace(document)}"
            do = "name one of infra/queues"
            yield Finding(subject(document), f"metadata.labels.{QUEUE}", wrong, do)
    for (place, name), target in queues.items():
        if target not in cluster_queues:
            wrong = f"no ClusterQueue {target}"
            yield Finding(
                f"LocalQueue/{name}", "spec.clusterQueue", wrong, f"add it, or fix {place}"
            )


@lint("rule 4", "a queue covers what its jobs ask for, pods of a kind on one flavor")
def queue_admits_its_jobs(documents: list[Document]) -> Iterator[Finding]:
    """Sidecars and submitters count: Kueue admits what pods ask for in all."""
    queues = {
        (namespace(queue), queue["metadata"]["name"]): dig(queue, "spec.clusterQueue")
        for queue in kind(documents, "LocalQueue")
    }
    cluster_queues = {queue["metadata"]["name"]: queue for queue in kind(documents, "ClusterQueue")}
    flavors = {
        flavor["metadata"]["name"]: dig(flavor, "spec.nodeLabels", {})
        for flavor in kind(documents, "ResourceFlavor")
    }
    for cluster in clusters(documents):
        name = queues.get((namespace(cluster.document), _queue(cluster.document) or ""))
        if name not in cluster_queues:
            continue
        left = _quotas(cluster_queues[name])
        for pod, count in _pod_sets(documents, cluster):
            asked = {resource: count * amount for resource, amount in _asked(pod).items()}
            fits = [flavor for flavor in left if _on(flavors.get(flavor, {}), pod)]
            short = {flavor: _short(asked, left[flavor]) for flavor in fits}
            taken = next((flavor for flavor in fits if not short[flavor]), None)
            if taken:  # as Kueue: the first that has room
                for resource, amount in asked.items():
                    left[taken][resource] -= amount
                continue
            lacks = " and ".join(f"flavor {flavor} lacks {short[flavor]}" for flavor in fits)
            wrong = f"ClusterQueue {name} never admits it: {lacks or 'no flavor is on its nodes'}"
            yield pod.finding("", wrong, "list the resource there with a quota that suffices")


@lint("rule 4", "ray.io/scheduler-name is gone; Kueue's queue-name makes a gang")
def no_scheduler_name(documents: list[Document]) -> Iterator[Finding]:
    label = "ray.io/scheduler-name"
    for document in documents:
        for path in _labels(document, label):
            yield Finding(subject(document), path, "KubeRay reads it no more", f"use {QUEUE}")


@lint("rule 5", "no Redis for RayJobs: each retry is a new cluster, and the store has the truth")
def no_redis(documents: list[Document]) -> Iterator[Finding]:
    do = "leave it out; jobs resume from the object store"
    for cluster in clusters(documents):
        if cluster.spec.get("gcsFaultToleranceOptions"):
            yield cluster.finding("gcsFaultToleranceOptions", "wants a Redis", do)
        if dig(cluster.document, "metadata.annotations", {}).get("ray.io/ft-enabled") == "true":
            where = "metadata.annotations"
            yield Finding(subject(cluster.document), where, "ray.io/ft-enabled wants a Redis", do)
        if "RAY_REDIS_ADDRESS" in cluster.head.ray.env:
            yield Finding(subject(cluster.document), cluster.head.ray.path, "RAY_REDIS_ADDRESS", do)


@lint("rule 5", "backoffLimit is at least 1: the job goes on in a new cluster where a head died")
def job_is_retried(documents: list[Document]) -> Iterator[Finding]:
    for document, path, job in jobs(documents):
        resumes = "jobs/" in job.get(
            "entrypoint", ""
        )  # a smoke test that failed is to be looked at
        if resumes and not job.get("backoffLimit"):
            wrong = f"is {job.get('backoffLimit')}: a lost head ends the run"
            yield Finding(subject(document), f"{path}.backoffLimit", wrong, "say 1 or more")


@lint("rule 5", "activeDeadlineSeconds and preRunningDeadlineSeconds end what hangs")
def job_has_deadlines(documents: list[Document]) -> Iterator[Finding]:
    for document, path, job in jobs(documents):
        for field in ("activeDeadlineSeconds", "preRunningDeadlineSeconds"):
            if not job.get(field):
                wrong = "is not set: nodes of a hung job are paid for"
                yield Finding(subject(document), f"{path}.{field}", wrong, "set it")


@lint("rule 5", "--root is an object store: a pod's disk goes with the pod")
def root_is_an_object_store(documents: list[Document]) -> Iterator[Finding]:
    for cluster in clusters(documents):
        entrypoint = (cluster.job or {}).get("entrypoint", "")
        if "jobs/" not in entrypoint:
            continue
        found = _ROOT.search(entrypoint)
        root = found[1] if found else "not given"
        if root.startswith("$"):
            variables = environment(documents, cluster.head.pod, cluster.head.ray)
            root = variables.get(root.strip("${}"), f"{root}, which is not set")
        if not root.startswith(("s3://", "gs://")):
            path = f"{cluster.path.rpartition('.')[0]}.entrypoint"
            wrong = f"--root is {root}: the run would lie on the head's disk"
            yield Finding(subject(cluster.document), path, wrong, "name an object store")


@lint("schemas miss", "submissionMode is a mode: a typo is accepted, and nothing is submitted")
def submission_mode_is_known(documents: list[Document]) -> Iterator[Finding]:
    for document, path, job in jobs(documents):
        mode = job.get("submissionMode", _SUBMISSION_MODES[0])
        if mode not in _SUBMISSION_MODES:
            do = f"say one of {', '.join(_SUBMISSION_MODES)}"
            yield Finding(subject(document), f"{path}.submissionMode", f"is {mode!r}", do)


@lint(
    "schemas miss", "what the operator refuses of a RayJob: modes and fields that do not go along"
)
def job_fields_go_along(documents: list[Document]) -> Iterator[Finding]:
    for document, path, job in jobs(documents):
        mode, name = job.get("submissionMode"), subject(document)
        if job.get("ttlSecondsAfterFinished") and not job.get("shutdownAfterJobFinishes"):
            where = f"{path}.ttlSecondsAfterFinished"
            yield Finding(name, where, "without shutdownAfterJobFinishes", "set that, or neither")
        if mode == "InteractiveMode" and job.get("backoffLimit"):
            yield Finding(name, f"{path}.backoffLimit", "in InteractiveMode", "leave it out")
        for field in ("submitterPodTemplate", "submitterConfig"):
            if mode in ("SidecarMode", "HTTPMode", "InteractiveMode") and job.get(field):
                yield Finding(name, f"{path}.{field}", f"in {mode}", "only K8sJobMode has it")
        if not job.get("rayClusterSpec") and not job.get("clusterSelector"):
            yield Finding(name, path, "has no cluster", "give rayClusterSpec or clusterSelector")


def _queue(document: Document) -> str | None:
    queue = (dig(document, "metadata.labels") or {}).get(QUEUE)
    return str(queue) if queue else None


def _quotas(queue: Document) -> dict[str, dict[str, float]]:
    """Flavor -> resource -> quota, in order; what is lent by a cohort is not counted on."""
    quotas: dict[str, dict[str, float]] = {}
    for group in dig(queue, "spec.resourceGroups", []):
        for flavor in group["flavors"]:
            for resource in flavor["resources"]:
                amount = quantity(resource["nominalQuota"])
                quotas.setdefault(flavor["name"], {})[resource["name"]] = amount
    return quotas


def _pod_sets(documents: list[Document], cluster: Cluster) -> Iterator[tuple[Pod, int]]:
    """(pod, how many) of what Kueue admits of a job together: groups, and the submitter."""
    for group in cluster.groups:
        yield group.pod, 1 if group.is_head else int(group.spec.get("replicas", 0))
    for pod in pods(documents):
        if pod.document is cluster.document and pod.path.endswith("submitterPodTemplate"):
            yield pod, 1


def _asked(pod: Pod) -> dict[str, float]:
    """Resource -> what the pod's containers and sidecars ask for; a limit stands for a request.

    Init containers that end count too: each by itself, beside the sidecars started before it.
    """
    running: dict[str, float] = {}
    starting: dict[str, float] = {}
    for container in (*pod.spec.get("initContainers", ()), *pod.spec.get("containers", ())):
        resources = container.get("resources") or {}
        ends = container in pod.spec.get("initContainers", ()) and (
            container.get("restartPolicy") != "Always"
        )
        asks = {**(resources.get("limits") or {}), **(resources.get("requests") or {})}
        for name, amount in asks.items():
            together = running.get(name, 0) + quantity(amount)
            if ends:
                starting[name] = max(starting.get(name, 0), together)
            else:
                running[name] = together
    return {
        name: max(running.get(name, 0), starting.get(name, 0)) for name in {**running, **starting}
    }


def _on(node_labels: dict[str, str], pod: Pod) -> bool:
    """Whether a flavor's nodes are among those that the pod selects."""
    selector = pod.spec.get("nodeSelector") or {}
    return all(selector.get(key, value) == value for key, value in node_labels.items())


def _short(asked: dict[str, float], left: dict[str, float]) -> str:
    """What `asked` takes beyond `left`, in words; a resource that is not listed is never given."""
    return ", ".join(
        f"{resource} ({amount:g} asked, {left.get(resource, 0):g} left)"
        for resource, amount in asked.items()
        if resource not in left or amount > left[resource]
    )


def _labels(value: object, label: str, path: str = "") -> Iterator[str]:
    """The paths of `label` among labels and annotations, wherever in a document."""
    if isinstance(value, dict):
        for key, part in value.items():
            where = f"{path}.{key}".removeprefix(".")
            if key == label:
                yield where
            yield from _labels(part, label, where)
    elif isinstance(value, list):
        for index, part in enumerate(value):
            yield from _labels(part, label, f"{path}[{index}]")
