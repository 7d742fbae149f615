"""What a pod may do to its node: nothing (the `restricted` profile, and IPC_LOCK for RDMA)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from infra.checks.findings import Finding, lint, subject
from infra.checks.objects import Container, Pod, clusters, dig, groups, jobs, pods
from infra.checks.render import Document


@lint("security", "pods are not root, by number: runAsNonRoot, runAsUser above 0")
def pods_are_not_root(documents: list[Document]) -> Iterator[Finding]:
    for pod, container in _containers(documents):
        if _of(pod, container, "runAsNonRoot") is not True or not _of(pod, container, "runAsUser"):
            path = f"{container.path}.securityContext"
            do = "say runAsNonRoot: true and runAsUser: 1000"
            yield Finding(subject(pod.document), path, "may run as root", do)


@lint("security", "no privilege escalation, nothing privileged")
def no_privilege_escalation(documents: list[Document]) -> Iterator[Finding]:
    for pod, container in _containers(documents):
        context = container.spec.get("securityContext") or {}
        if context.get("allowPrivilegeEscalation") is not False or context.get("privileged"):
            path = f"{container.path}.securityContext.allowPrivilegeEscalation"
            wrong = "setuid programs may become root"
            yield Finding(subject(pod.document), path, wrong, "say false, and not privileged")


@lint("security", "the root file system is read-only")
def root_is_read_only(documents: list[Document]) -> Iterator[Finding]:
    for pod, container in _containers(documents):
        if dig(container.spec, "securityContext.readOnlyRootFilesystem") is not True:
            path = f"{container.path}.securityContext.readOnlyRootFilesystem"
            wrong = "a process may change the program that runs"
            do = "say true, with an emptyDir where it has to write (/tmp, /home/ray)"
            yield Finding(subject(pod.document), path, wrong, do)


@lint("security", "capabilities: drop ALL")
def capabilities_are_dropped(documents: list[Document]) -> Iterator[Finding]:
    for pod, container in _containers(documents):
        dropped = dig(container.spec, "securityContext.capabilities.drop") or ()
        if "ALL" not in dropped:
            path = f"{container.path}.securityContext.capabilities.drop"
            yield Finding(subject(pod.document), path, f"is {list(dropped)}", "say [ALL]")


@lint("security", "IPC_LOCK for training workers with RDMA, and no other capability for anyone")
def ipc_lock_for_training_only(documents: list[Document]) -> Iterator[Finding]:
    rdma = [group.ray.spec for group in groups(documents) if group.training and group.rdma]
    for pod, container in _containers(documents):
        allowed = {"IPC_LOCK"} if any(container.spec is spec for spec in rdma) else set()
        if extra := set(dig(container.spec, "securityContext.capabilities.add") or ()) - allowed:
            path = f"{container.path}.securityContext.capabilities.add"
            wrong = f"adds {', '.join(sorted(extra))}"
            yield Finding(subject(pod.document), path, wrong, "leave it out")


@lint("security", "seccompProfile: RuntimeDefault")
def seccomp_is_the_runtimes(documents: list[Document]) -> Iterator[Finding]:
    for pod, container in _containers(documents):
        profile = (_of(pod, container, "seccompProfile") or {}).get("type")
        if profile != "RuntimeDefault":
            path = f"{container.path}.securityContext.seccompProfile.type"
            yield Finding(subject(pod.document), path, f"is {profile}", "say RuntimeDefault")


@lint(
    "security", "no part of the node: no hostPID, hostIPC, hostPath; hostNetwork in training only"
)
def nothing_of_the_host(documents: list[Document]) -> Iterator[Finding]:
    training = [group.pod for group in groups(documents) if group.training]
    for pod in pods(documents):
        for field in ("hostPID", "hostIPC"):
            if pod.spec.get(field):
                yield pod.finding(field, "is true", "leave it out")
        if pod.spec.get("hostNetwork") and pod not in training:
            yield pod.finding("hostNetwork", "NetworkPolicy does not hold there", "leave it out")
        for index, volume in enumerate(pod.spec.get("volumes") or ()):
            if "hostPath" in volume:
                do = "use a generic ephemeral volume, or emptyDir"
                yield pod.finding(f"volumes[{index}]", "is a hostPath", do)


@lint("security", "pods that the operator adds are as narrow: autoscaler and submitter")
def operators_pods_are_narrow(documents: list[Document]) -> Iterator[Finding]:
    for cluster in clusters(documents):
        context = dig(cluster.spec, "autoscalerOptions.securityContext", {})
        narrow = context.get("allowPrivilegeEscalation") is False and "ALL" in dig(
            context, "capabilities.drop", []
        )
        if cluster.autoscaled and not narrow:
            do = "say allowPrivilegeEscalation: false and drop ALL there too"
            yield cluster.finding("autoscalerOptions.securityContext", "is not narrow", do)
    for document, path, job in jobs(documents):
        mode = job.get("submissionMode", "K8sJobMode")
        if mode == "K8sJobMode" and not job.get("submitterPodTemplate"):
            where = f"{path}.submitterPodTemplate"
            wrong = "the operator's own submitter may run as root, with a token"
            yield Finding(subject(document), where, wrong, "give a narrow one, or use HTTPMode")


def _containers(documents: list[Document]) -> Iterator[tuple[Pod, Container]]:
    for pod in pods(documents):
        for container in pod.containers:
            yield pod, container


def _of(pod: Pod, container: Container, field: str) -> Any:
    """A setting of the container, else of its pod."""
    own = (container.spec.get("securityContext") or {}).get(field)
    return own if own is not None else (pod.spec.get("securityContext") or {}).get(field)
