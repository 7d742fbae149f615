"""Rule 6: grace periods and disruption budgets."""

from __future__ import annotations

from tests.infra.broken.breakage import Documents, breaks, head, named, pod, ray, set_env, workers


@breaks("grace-exceeds-drain")
def too_little_grace(documents: Documents) -> None:
    pod(workers(documents, "train"))["terminationGracePeriodSeconds"] = 30


@breaks("grace-exceeds-drain")
def kubernetes_own_grace(documents: Documents) -> None:
    del pod(head(documents, "train"))["terminationGracePeriodSeconds"]


@breaks("grace-exceeds-drain")
def a_drain_beyond_the_grace(documents: Documents) -> None:
    set_env(workers(documents, "train"), "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", "600")


@breaks("stopped-jobs-end-by-themselves")
def a_stop_that_kills_at_once(documents: Documents) -> None:
    set_env(head(documents, "train"), "RAY_JOB_STOP_WAIT_TIME_S", "3")


@breaks("stopped-jobs-end-by-themselves")
def rays_own_stop(documents: Documents) -> None:
    env = ray(head(documents, "train"))["env"]
    env[:] = [one for one in env if one["name"] != "RAY_JOB_STOP_WAIT_TIME_S"]


@breaks("no-ray-stop")
def ray_stop_before_the_end(documents: Documents) -> None:
    hook = {"exec": {"command": ["/bin/sh", "-c", "ray stop"]}}
    ray(workers(documents, "train"))["lifecycle"] = {"preStop": hook}


@breaks("heads-are-kept")
def heads_without_a_budget(documents: Documents) -> None:
    _drop_budgets(documents, "heads")


@breaks("heads-are-kept")
def heads_that_one_may_lose(documents: Documents) -> None:
    named(documents, "PodDisruptionBudget", "heads")["spec"]["maxUnavailable"] = 1


@breaks("training-workers-are-kept")
def training_workers_without_a_budget(documents: Documents) -> None:
    _drop_budgets(documents, "training-workers")


@breaks("training-workers-are-kept")
def a_budget_of_another_group(documents: Documents) -> None:
    budget = named(documents, "PodDisruptionBudget", "training-workers")
    budget["spec"]["selector"] = {"matchLabels": {"ray.io/group": "h100"}}


def _drop_budgets(documents: Documents, name: str) -> None:
    documents.remove(named(documents, "PodDisruptionBudget", name))


@breaks("heads-are-kept")
def a_budget_of_another_namespace(documents: Documents) -> None:
    named(documents, "PodDisruptionBudget", "heads")["metadata"]["namespace"] = "elsewhere"
