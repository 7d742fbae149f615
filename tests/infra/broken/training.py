"""Rule 8: whole nodes, RDMA, and NCCL's variables."""

from __future__ import annotations

from tests.infra.broken.breakage import Documents, breaks, pod, ray, set_env, unset, workers


@breaks("training-takes-whole-nodes")
def half_a_node(documents: Documents) -> None:
    for amounts in ray(workers(documents, "train"))["resources"].values():
        amounts["nvidia.com/gpu"] = "4"
    spec = pod(workers(documents, "train"))
    spec["affinity"] = pod(workers(documents, "curate"))["affinity"]


@breaks("training-has-rdma", "ipc-lock-for-training-only")
def gradients_over_tcp(documents: Documents) -> None:
    for amounts in ray(workers(documents, "train"))["resources"].values():
        for name in [name for name in amounts if "rdma" in name or "hca" in name]:
            del amounts[name]


@breaks("rdma-locks-memory")
def no_pinned_memory(documents: Documents) -> None:
    del ray(workers(documents, "train"))["securityContext"]["capabilities"]["add"]


@breaks("nccl-names-its-nics")
def any_front_end_nic(documents: Documents) -> None:
    unset(documents, "NCCL_SOCKET_IFNAME")


@breaks("nccl-names-its-nics")
def any_adapter(documents: Documents) -> None:
    unset(documents, "NCCL_IB_HCA")


@breaks("nccl-names-its-nics")
def adapters_by_prefix(documents: Documents) -> None:
    set_env(workers(documents, "train"), "NCCL_IB_HCA", "mlx5_1")


@breaks("roce-has-gid-and-class")
def a_gid_without_a_class(documents: Documents) -> None:
    unset(documents, "NCCL_IB_TC")
    set_env(workers(documents, "train"), "NCCL_IB_GID_INDEX", "3")


@breaks("training-takes-whole-nodes")
def a_node_of_which_half_is_asked_for(documents: Documents) -> None:
    ray(workers(documents, "train"))["resources"]["requests"]["nvidia.com/gpu"] = "4"


@breaks("roce-has-gid-and-class", "queue-admits-its-jobs")
def roce_by_its_name_without_either(documents: Documents) -> None:
    for name in ("NCCL_IB_GID_INDEX", "NCCL_IB_TC"):
        unset(documents, name)
    for amounts in ray(workers(documents, "train"))["resources"].values():
        amounts["site/roce"] = amounts.pop("nvidia.com/rdma")
