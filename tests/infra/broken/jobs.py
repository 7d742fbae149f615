"""Rules 4 and 5: queues, retries, ends, and what the operator refuses of a job."""

from __future__ import annotations

from typing import Any

from infra.checks.lints.training import TOPOLOGY
from tests.infra.broken.breakage import (
    QUEUE,
    Documents,
    allows,
    breaks,
    cluster,
    head,
    job,
    named,
    of_kind,
    pod,
    ray,
    set_env,
    workers,
)

# Rule 4


@breaks("training-group-is-fixed")
def a_gang_that_grows(documents: Documents) -> None:
    workers(documents, "train")["maxReplicas"] += 1


@breaks("training-group-is-fixed")
def a_gang_that_shrinks(documents: Documents) -> None:
    workers(documents, "nccl-smoke")["minReplicas"] -= 1


@breaks(
    "training-is-not-autoscaled",
    "autoscaled-groups-omit-replicas",
    "no-api-token-on-workers",
    "api-server-for-autoscaling-heads",
)
def training_with_an_autoscaler(documents: Documents) -> None:
    spec = cluster(documents, "train")
    spec["enableInTreeAutoscaling"] = True
    spec["autoscalerOptions"] = cluster(documents, "curate")["autoscalerOptions"]
    pod(workers(documents, "train"))["automountServiceAccountToken"] = True


@breaks("training-is-queued")
def training_without_a_queue(documents: Documents) -> None:
    del named(documents, "RayJob", "train")["metadata"]["labels"][QUEUE]


@breaks("queue-exists")
def a_queue_of_nobody(documents: Documents) -> None:
    named(documents, "RayJob", "train")["metadata"]["labels"][QUEUE] = "nobody"


@breaks("queue-exists")
def a_queue_of_no_cluster_queue(documents: Documents) -> None:
    of_kind(documents, "LocalQueue")[0]["spec"]["clusterQueue"] = "nobody"


@breaks("queue-admits-its-jobs")
def a_queue_too_small(documents: Documents) -> None:
    for queue in of_kind(documents, "ClusterQueue"):
        for flavor in queue["spec"]["resourceGroups"][0]["flavors"]:
            for resource in flavor["resources"]:
                if resource["name"] == "nvidia.com/gpu":
                    resource["nominalQuota"] = "7"


def _quotas(documents: Documents, flavor: str) -> list[dict[str, Any]]:
    queue = named(documents, "ClusterQueue", "train")["spec"]["resourceGroups"][0]
    (found,) = (each for each in queue["flavors"] if each["name"] == flavor)
    return found["resources"]


@breaks("queue-admits-its-jobs")
def a_queue_without_room_for_sidecars(documents: Documents) -> None:
    group = workers(documents, "train")
    for resource in _quotas(documents, "h800"):
        if resource["name"] == "cpu":  # just what the training's own containers ask for
            cpus = int(ray(group)["resources"]["requests"]["cpu"])
            resource["nominalQuota"] = str(cpus * group["replicas"])
    guarded = {**ray(group)["securityContext"], "capabilities": {"drop": ["ALL"]}}
    requests = {"requests": {"cpu": "50m", "memory": "128Mi"}}
    sidecar = {**ray(group), "name": "logs", "restartPolicy": "Always"}
    sidecar |= {"resources": requests, "securityContext": guarded}
    pod(group).setdefault("initContainers", []).append(sidecar)


@breaks("queue-admits-its-jobs")
def a_quota_on_other_nodes(documents: Documents) -> None:
    for resource in _quotas(documents, "h800"):
        resource["nominalQuota"] = "0"
    for resource in _quotas(documents, "cpu"):
        resource["nominalQuota"] = "100000"


@breaks("queue-admits-its-jobs")
def a_queue_without_room_for_the_head(documents: Documents) -> None:
    for resource in _quotas(documents, "cpu"):
        if resource["name"] == "cpu":
            resource["nominalQuota"] = "100m"


@breaks("training-asks-for-a-topology")
def a_gang_anywhere(documents: Documents) -> None:
    del workers(documents, "train")["template"]["metadata"]["annotations"][TOPOLOGY]


@breaks("training-asks-for-a-topology")
def a_gang_in_no_level(documents: Documents) -> None:
    workers(documents, "train")["template"]["metadata"]["annotations"][TOPOLOGY] = "a/rack"


@breaks("queued-job-shuts-down")
def a_queued_job_that_stays(documents: Documents) -> None:
    job(documents, "train")["shutdownAfterJobFinishes"] = False
    job(documents, "train").pop("ttlSecondsAfterFinished", None)


@breaks("no-deletion-rules-with-shutdown")
def deletion_rules_beside_shutdown(documents: Documents) -> None:
    rule = {"policy": "DeleteCluster", "condition": {"jobStatus": "SUCCEEDED"}}
    job(documents, "train")["deletionStrategy"] = {"deletionRules": [rule]}


@breaks("no-scheduler-name")
def a_scheduler_by_its_old_label(documents: Documents) -> None:
    labels = named(documents, "RayJob", "train")["metadata"]["labels"]
    labels["ray.io/scheduler-name"] = "volcano"


@breaks("no-scheduler-name")
def a_scheduler_on_a_pod(documents: Documents) -> None:
    labels = workers(documents, "train")["template"]["metadata"]["labels"]
    labels["ray.io/scheduler-name"] = "volcano"


# Rule 5


@breaks("no-redis")
def a_redis(documents: Documents) -> None:
    cluster(documents, "train")["gcsFaultToleranceOptions"] = {"redisAddress": "redis:6379"}


@breaks("no-redis")
def a_redis_by_annotation(documents: Documents) -> None:
    metadata = named(documents, "RayJob", "train")["metadata"]
    metadata.setdefault("annotations", {})["ray.io/ft-enabled"] = "true"


@breaks("no-redis")
def a_redis_by_variable(documents: Documents) -> None:
    set_env(head(documents, "train"), "RAY_REDIS_ADDRESS", "redis:6379")


@breaks("job-is-retried")
def a_job_that_is_not_retried(documents: Documents) -> None:
    del job(documents, "train")["backoffLimit"]


@breaks("job-has-deadlines")
def a_job_without_an_end(documents: Documents) -> None:
    del job(documents, "train")["activeDeadlineSeconds"]


@breaks("job-has-deadlines")
def a_job_that_waits_for_ever(documents: Documents) -> None:
    del job(documents, "curate")["preRunningDeadlineSeconds"]


@breaks("root-is-an-object-store")
def a_run_on_the_heads_disk(documents: Documents) -> None:
    job(documents, "train")["entrypoint"] = "python jobs/train.py --root /tmp/run"


@breaks("root-is-an-object-store")
def a_run_nowhere(documents: Documents) -> None:
    job(documents, "train")["entrypoint"] = "python jobs/train.py"


@breaks("root-is-an-object-store")
def a_run_at_an_unset_variable(documents: Documents) -> None:
    job(documents, "train")["entrypoint"] = 'python jobs/train.py --root "$NOT_SET"'


@breaks("submission-mode-is-known")
def a_mode_with_a_typo(documents: Documents) -> None:
    job(documents, "train")["submissionMode"] = "K8SJobMode"


@breaks("job-fields-go-along")
def a_submitter_that_http_mode_ignores(documents: Documents) -> None:
    job(documents, "train")["submissionMode"] = "HTTPMode"


@breaks("job-fields-go-along")
def a_job_with_no_cluster(documents: Documents) -> None:
    del job(documents, "nccl-smoke")["rayClusterSpec"]


@breaks("job-fields-go-along")
def a_time_to_live_without_shutdown(documents: Documents) -> None:
    job(documents, "curate")["shutdownAfterJobFinishes"] = False
    job(documents, "curate")["ttlSecondsAfterFinished"] = 600


@breaks("training-group-is-fixed")
def a_gang_of_no_size(documents: Documents) -> None:
    for size in ("minReplicas", "replicas", "maxReplicas"):
        del workers(documents, "train")[size]


def _starts_with(documents: Documents, cpus: str) -> None:
    """A container before the training's own, which asks for so many CPUs and ends."""
    group = workers(documents, "train")
    guarded = {**ray(group)["securityContext"], "capabilities": {"drop": ["ALL"]}}
    asked = {"requests": {"cpu": cpus}}
    first = {**ray(group), "name": "first", "resources": asked, "securityContext": guarded}
    pod(group).setdefault("initContainers", []).append(first)


@breaks("queue-admits-its-jobs")
def a_start_that_no_node_has_room_for(documents: Documents) -> None:
    _starts_with(documents, "1000")


@allows
def a_start_that_ends_before_the_training(documents: Documents) -> None:
    _starts_with(documents, "90")


@breaks("queue-admits-its-jobs")
def a_limit_without_a_request(documents: Documents) -> None:
    ray(workers(documents, "train"))["resources"] |= {"requests": {}}
    ray(workers(documents, "train"))["resources"]["limits"]["cpu"] = "1000"


@breaks("job-fields-go-along")
def a_retry_of_what_a_person_submits(documents: Documents) -> None:
    job(documents, "train")["submissionMode"] = "InteractiveMode"
    del job(documents, "train")["submitterPodTemplate"]


@allows
def a_job_that_the_operator_submits(documents: Documents) -> None:
    job(documents, "curate")["submissionMode"] = "HTTPMode"
    del job(documents, "curate")["submitterPodTemplate"]


@allows
def deletion_by_rules_alone(documents: Documents) -> None:
    rule = {"policy": "DeleteCluster", "condition": {"jobStatus": "SUCCEEDED"}}
    curate = job(documents, "curate")
    for field in ("shutdownAfterJobFinishes", "ttlSecondsAfterFinished"):
        del curate[field]
    curate["deletionStrategy"] = {"deletionRules": [rule]}
