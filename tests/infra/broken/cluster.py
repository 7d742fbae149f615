"""Rules 2, 3, 7 and 9: heads, groups of workers, shared memory, alpha fields."""

from __future__ import annotations

from infra.checks.render import Document
from tests.infra.broken.breakage import (
    Documents,
    allows,
    breaks,
    cluster,
    head,
    job,
    pod,
    ray,
    set_env,
    workers,
)

# Rule 2


@breaks("head-takes-no-tasks")
def a_head_that_works(documents: Documents) -> None:
    head(documents, "curate")["rayStartParams"]["num-cpus"] = "1"


@breaks("head-takes-no-tasks")
def a_head_that_says_nothing(documents: Documents) -> None:
    head(documents, "train")["rayStartParams"] = {}


@breaks("head-takes-no-tasks", "start-parameters-are-strings")
def a_head_with_a_number(documents: Documents) -> None:
    head(documents, "curate")["rayStartParams"]["num-cpus"] = 0


@breaks("start-parameters-are-strings")
def workers_with_a_number(documents: Documents) -> None:
    workers(documents, "curate")["rayStartParams"]["num-cpus"] = 15


@breaks("head-on-demand")
def a_head_in_the_spot_pool(documents: Documents) -> None:
    pod(head(documents, "curate"))["nodeSelector"] = {"ssr/pool": "cpu-spot"}


@breaks("head-on-demand")
def a_head_that_tolerates_spot(documents: Documents) -> None:
    pod(head(documents, "curate"))["tolerations"] = [{"key": "cloud.google.com/gke-spot"}]


@breaks("head-on-demand")
def a_head_that_tolerates_all(documents: Documents) -> None:
    pod(head(documents, "curate"))["tolerations"] = [{"operator": "Exists"}]


@breaks("head-on-demand")
def a_head_that_prefers_spot(documents: Documents) -> None:
    wish = {"key": "karpenter.sh/capacity-type", "operator": "In", "values": ["spot"]}
    pod(head(documents, "curate"))["affinity"] = {
        "nodeAffinity": {
            "preferredDuringSchedulingIgnoredDuringExecution": [
                {"weight": 1, "preference": {"matchExpressions": [wish]}}
            ]
        }
    }


@breaks("head-memory-guaranteed")
def a_head_with_less_memory_asked(documents: Documents) -> None:
    ray(head(documents, "train"))["resources"]["requests"]["memory"] = "1Gi"


@breaks("head-memory-guaranteed")
def a_head_without_a_limit(documents: Documents) -> None:
    del ray(head(documents, "train"))["resources"]["limits"]


@breaks("driver-stays-on-the-head")
def a_driver_that_asks_for_a_cpu(documents: Documents) -> None:
    job(documents, "curate")["entrypointNumCpus"] = 1


# Rule 3


@breaks("one-worker-per-node")
def workers_that_share_nodes(documents: Documents) -> None:
    pod(workers(documents, "curate")).pop("affinity")


@breaks("one-worker-per-node")
def workers_kept_from_others_only(documents: Documents) -> None:
    _apart(documents)["labelSelector"] = {"matchLabels": {"app": "nginx"}}


@breaks("autoscaled-groups-omit-replicas")
def replicas_of_an_autoscaled_group(documents: Documents) -> None:
    workers(documents, "curate")["replicas"] = 1


@breaks("autoscaler-v2")
def the_old_autoscaler(documents: Documents) -> None:
    cluster(documents, "curate")["autoscalerOptions"]["version"] = "v1"


@breaks("autoscaler-v2")
def the_default_autoscaler(documents: Documents) -> None:
    del cluster(documents, "curate")["autoscalerOptions"]["version"]


@breaks("pods-are-not-restarted")
def workers_that_are_restarted(documents: Documents) -> None:
    pod(workers(documents, "curate"))["restartPolicy"] = "Always"


# Rule 7


@breaks("shared-memory-is-the-operators")
def a_shared_memory_of_ones_own(documents: Documents) -> None:
    mounts = ray(workers(documents, "train")).setdefault("volumeMounts", [])
    mounts.append({"name": "shm", "mountPath": "/dev/shm"})
    volume = {"name": "shm", "emptyDir": {"medium": "Memory"}}
    pod(workers(documents, "train")).setdefault("volumes", []).append(volume)


@breaks("spills-to-a-volume")
def spilling_beside_the_volume(documents: Documents) -> None:
    workers(documents, "curate")["rayStartParams"]["object-spilling-directory"] = "/elsewhere"


@breaks("spills-to-a-volume")
def spilling_by_the_old_setting(documents: Documents) -> None:
    set_env(workers(documents, "curate"), "RAY_object_spilling_config", "{}")


# Rule 9


@breaks("no-alpha-fields")
def the_operators_network_policy(documents: Documents) -> None:
    cluster(documents, "train")["networkPolicy"] = {"mode": "DenyAll"}


@breaks("no-alpha-fields")
def the_operators_tls(documents: Documents) -> None:
    cluster(documents, "train")["tlsOptions"] = {"enabled": True}


@breaks("no-alpha-fields")
def the_history_server(documents: Documents) -> None:
    cluster(documents, "train")["historyServerOptions"] = {}


@breaks("no-alpha-fields", "no-redis")
def gcs_on_rocksdb(documents: Documents) -> None:
    cluster(documents, "train")["gcsFaultToleranceOptions"] = {"backend": "rocksdb"}


@breaks("head-memory-guaranteed")
def a_head_that_asks_for_nothing(documents: Documents) -> None:
    del ray(head(documents, "train"))["resources"]


@breaks("head-on-demand")
def a_head_on_nodes_labelled_spot(documents: Documents) -> None:
    pod(head(documents, "curate"))["nodeSelector"] = {"cloud.google.com/gke-spot": "true"}


@breaks("head-on-demand")
def a_head_that_tolerates_a_kind_of_capacity(documents: Documents) -> None:
    taint = {"key": "karpenter.sh/capacity-type", "value": "spot"}
    pod(head(documents, "curate"))["tolerations"] = [taint]


def _apart(documents: Documents) -> Document:
    """What keeps the workers of a curation apart."""
    required = "requiredDuringSchedulingIgnoredDuringExecution"
    term: Document = pod(workers(documents, "curate"))["affinity"]["podAntiAffinity"][required][0]
    return term


@breaks("one-worker-per-node")
def workers_kept_from_nobody(documents: Documents) -> None:
    del _apart(documents)["labelSelector"]


@breaks("one-worker-per-node")
def workers_apart_by_zone(documents: Documents) -> None:
    _apart(documents)["topologyKey"] = "topology.kubernetes.io/zone"


@allows
def a_head_that_keeps_off_spot(documents: Documents) -> None:
    test = {"key": "karpenter.sh/capacity-type", "operator": "NotIn", "values": ["spot"]}
    term = {"nodeSelectorTerms": [{"matchExpressions": [test]}]}
    pod(head(documents, "curate"))["affinity"] = {
        "nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": term}
    }
    pod(head(documents, "curate"))["tolerations"] = [{"key": "dedicated", "value": "ray"}]
