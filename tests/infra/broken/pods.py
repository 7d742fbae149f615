"""Security: what a pod may do on its node."""

from __future__ import annotations

from typing import Any

from tests.infra.broken.breakage import Documents, breaks, cluster, job, pod, ray, workers


def context(group: dict[str, Any]) -> dict[str, Any]:
    return ray(group)["securityContext"]


@breaks("pods-are-not-root")
def a_root_pod(documents: Documents) -> None:
    pod(workers(documents, "curate"))["securityContext"]["runAsUser"] = 0


@breaks("pods-are-not-root")
def a_root_container(documents: Documents) -> None:
    context(workers(documents, "curate"))["runAsNonRoot"] = False


@breaks("pods-are-not-root")
def a_root_submitter(documents: Documents) -> None:
    spec = job(documents, "train")["submitterPodTemplate"]["spec"]
    spec["securityContext"].pop("runAsNonRoot")


@breaks("no-privilege-escalation")
def escalation(documents: Documents) -> None:
    del context(workers(documents, "curate"))["allowPrivilegeEscalation"]


@breaks("no-privilege-escalation")
def a_privileged_container(documents: Documents) -> None:
    context(workers(documents, "train"))["privileged"] = True


@breaks("root-is-read-only")
def a_root_that_is_written(documents: Documents) -> None:
    del context(workers(documents, "curate"))["readOnlyRootFilesystem"]


@breaks("capabilities-are-dropped")
def capabilities_kept(documents: Documents) -> None:
    context(workers(documents, "curate"))["capabilities"]["drop"] = ["NET_RAW"]


@breaks("ipc-lock-for-training-only")
def ipc_lock_in_curation(documents: Documents) -> None:
    context(workers(documents, "curate"))["capabilities"]["add"] = ["IPC_LOCK"]


@breaks("ipc-lock-for-training-only")
def more_than_ipc_lock_in_training(documents: Documents) -> None:
    context(workers(documents, "train"))["capabilities"]["add"] = ["IPC_LOCK", "SYS_ADMIN"]


@breaks("seccomp-is-the-runtimes")
def no_seccomp(documents: Documents) -> None:
    del pod(workers(documents, "curate"))["securityContext"]["seccompProfile"]


@breaks("seccomp-is-the-runtimes")
def seccomp_unconfined(documents: Documents) -> None:
    context(workers(documents, "curate"))["seccompProfile"] = {"type": "Unconfined"}


@breaks("nothing-of-the-host")
def the_hosts_processes(documents: Documents) -> None:
    pod(workers(documents, "train"))["hostPID"] = True


@breaks("nothing-of-the-host")
def the_hosts_network_in_curation(documents: Documents) -> None:
    pod(workers(documents, "curate"))["hostNetwork"] = True


@breaks("nothing-of-the-host")
def the_hosts_disk(documents: Documents) -> None:
    volume = {"name": "disk", "hostPath": {"path": "/mnt"}}
    pod(workers(documents, "curate")).setdefault("volumes", []).append(volume)


@breaks("operators-pods-are-narrow")
def an_autoscaler_with_capabilities(documents: Documents) -> None:
    del cluster(documents, "curate")["autoscalerOptions"]["securityContext"]


@breaks("operators-pods-are-narrow")
def the_operators_own_submitter(documents: Documents) -> None:
    del job(documents, "train")["submitterPodTemplate"]


@breaks("operators-pods-are-narrow")
def an_autoscaler_that_escalates(documents: Documents) -> None:
    options = cluster(documents, "curate")["autoscalerOptions"]
    del options["securityContext"]["allowPrivilegeEscalation"]


@breaks("operators-pods-are-narrow")
def an_autoscaler_that_keeps_capabilities(documents: Documents) -> None:
    options = cluster(documents, "curate")["autoscalerOptions"]
    options["securityContext"]["capabilities"]["drop"] = ["NET_RAW"]


@breaks("ipc-lock-for-training-only")
def ipc_lock_for_rdma_in_curation(documents: Documents) -> None:
    ray(workers(documents, "curate"))["resources"]["limits"]["nvidia.com/rdma"] = "1"
    context(workers(documents, "curate"))["capabilities"]["add"] = ["IPC_LOCK"]
