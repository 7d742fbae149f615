"""Rules 4 and 8: a training group is a gang of whole H800 nodes on one fabric."""

from __future__ import annotations

from collections.abc import Iterator

from infra.checks.findings import Finding, lint, subject
from infra.checks.lints.jobs import QUEUE
from infra.checks.objects import WHOLE_NODE, Group, clusters, dig, environment, groups, kind
from infra.checks.render import Document

TOPOLOGY = "kueue.x-k8s.io/podset-required-topology"


@lint("rule 4", "the training group has min = max = replicas: ranks do not come one by one")
def training_group_is_fixed(documents: list[Document]) -> Iterator[Finding]:
    for group in _training(documents):
        sizes = [group.spec.get(size) for size in ("minReplicas", "replicas", "maxReplicas")]
        if None in sizes or len(set(sizes)) > 1:
            wrong = "minReplicas, replicas, maxReplicas are " + ", ".join(map(str, sizes))
            yield group.finding("replicas", wrong, "make them equal")


@lint("rule 4", "training has no autoscaler: it would take idle ranks away, and Kueue refuses it")
def training_is_not_autoscaled(documents: list[Document]) -> Iterator[Finding]:
    for cluster in clusters(documents):
        if cluster.training and cluster.autoscaled:
            yield cluster.finding("enableInTreeAutoscaling", "is true for training", "leave it out")


@lint("rule 4", "training waits in a Kueue queue: the whole gang is admitted, or nothing")
def training_is_queued(documents: list[Document]) -> Iterator[Finding]:
    for cluster in clusters(documents):
        labels = dig(cluster.document, "metadata.labels", {})
        if cluster.training and not labels.get(QUEUE):
            where = f"metadata.labels.{QUEUE}"
            wrong = "is missing: half a gang may hold its GPUs for ever"
            yield Finding(subject(cluster.document), where, wrong, "name the queue")


@lint("rule 4", "the training group asks for one topology domain, by a level of our Topology")
def training_asks_for_a_topology(documents: list[Document]) -> Iterator[Finding]:
    levels = {
        level["nodeLabel"]
        for topology in kind(documents, "Topology")
        for level in dig(topology, "spec.levels", [])
    }
    for group in _training(documents):
        level = dig(group.pod.template, "metadata.annotations", {}).get(TOPOLOGY)
        path = f"template.metadata.annotations.{TOPOLOGY}"
        if not level:
            yield group.finding(path, "is missing", "name the level whose nodes share a fabric")
        elif level not in levels:
            do = f"name one of {', '.join(sorted(levels)) or 'a Topology (there is none)'}"
            yield group.finding(path, f"{level} is no level of a Topology", do)


@lint("rule 8", "nodes on the fabric are taken whole: 8 GPUs a pod, request = limit")
def training_takes_whole_nodes(documents: list[Document]) -> Iterator[Finding]:
    for group in _training(documents):
        asked = dig(group.ray.spec, "resources.requests", {}).get("nvidia.com/gpu", group.gpus)
        if _many_nodes(group) and (group.gpus != WHOLE_NODE or int(asked) != group.gpus):
            wrong = f"{group.gpus} GPUs a pod, {asked} requested"
            yield group.finding("template.spec.containers[0].resources", wrong, "say 8 in both")


@lint("rule 8", "training over several nodes has the site's RDMA resource")
def training_has_rdma(documents: list[Document]) -> Iterator[Finding]:
    for group in _training(documents):
        if _many_nodes(group) and not group.rdma:
            do = "add components/rdma-ib or rdma-roce, with the site's resource"
            path = "template.spec.containers[0].resources.limits"
            yield group.finding(path, "no RDMA resource: gradients go over TCP", do)


@lint("rule 8", "RDMA needs IPC_LOCK: memory of queue pairs is pinned")
def rdma_locks_memory(documents: list[Document]) -> Iterator[Finding]:
    for group in _training(documents):
        added = dig(group.ray.spec, "securityContext.capabilities.add") or ()
        if group.rdma and "IPC_LOCK" not in added:
            path = "template.spec.containers[0].securityContext.capabilities.add"
            yield group.finding(path, "lacks IPC_LOCK", "add it")


@lint("rule 8", "NCCL_SOCKET_IFNAME is the front-end NIC, NCCL_IB_HCA the compute HCAs only")
def nccl_names_its_nics(documents: list[Document]) -> Iterator[Finding]:
    for group in _training(documents):
        path = "template.spec.containers[0].env"
        variables = environment(documents, group.pod, group.ray)
        for name in ("NCCL_SOCKET_IFNAME", "NCCL_IB_HCA"):
            if group.rdma and not variables.get(name):
                wrong = f"{name} is not set: NCCL would take any NIC it finds"
                yield group.finding(path, wrong, "name them as the site does")
        adapters = variables.get("NCCL_IB_HCA")
        if group.rdma and adapters and not adapters.startswith("="):
            wrong = f"NCCL_IB_HCA {adapters} matches by prefix: mlx5_1 is mlx5_10 too"
            yield group.finding(path, wrong, f'match exactly: "={adapters}"')


@lint("rule 8", "RoCE has a GID index and a traffic class, both")
def roce_has_gid_and_class(documents: list[Document]) -> Iterator[Finding]:
    for group in _training(documents):
        pair = ("NCCL_IB_GID_INDEX", "NCCL_IB_TC")
        variables = environment(documents, group.pod, group.ray)
        missing = [name for name in pair if not variables.get(name)]
        if len(missing) == 1 or (missing and "roce" in (group.rdma or "")):
            wrong = f"{' and '.join(missing)} not set on RoCE"
            path = "template.spec.containers[0].env"
            yield group.finding(path, wrong, "name the fabric's lossless class")


def _training(documents: list[Document]) -> Iterator[Group]:
    return (group for group in groups(documents) if group.training)


def _many_nodes(group: Group) -> bool:
    """GPU workers on more than one node; a tiny overlay trains on CPUs, or on one node."""
    return group.gpus > 0 and int(group.spec.get("replicas", 0)) > 1
