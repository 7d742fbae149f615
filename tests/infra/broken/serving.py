"""The service: what its config says, and what its pods and policies say beside it."""

from __future__ import annotations

from typing import Any

from infra.checks.render import Document
from tests.infra.broken.breakage import Documents, breaks, named, pod, ray


def service(documents: Documents) -> dict[str, Any]:
    return named(documents, "RayService", "ssr")["spec"]


def served_by(documents: Documents) -> dict[str, Any]:
    """The group of workers."""
    return service(documents)["rayClusterConfig"]["workerGroupSpecs"][0]


def policy(documents: Documents, name: str) -> Document:
    return named(documents, "NetworkPolicy", name)


def say(documents: Documents, before: str, after: str) -> None:
    """Change the config's text."""
    told = service(documents)["serveConfigV2"]
    assert before in told
    service(documents)["serveConfigV2"] = told.replace(before, after)


@breaks("service-listens-where-it-is-asked")
def proxies_on_loopback(documents: Documents) -> None:
    say(documents, "host: 0.0.0.0", "host: 127.0.0.1")


@breaks("service-listens-where-it-is-asked")
def proxies_on_another_port(documents: Documents) -> None:
    say(documents, "port: 8000", "port: 9000")


@breaks("service-listens-where-it-is-asked")
def no_proxies_on_workers(documents: Documents) -> None:
    say(documents, "EveryNode", "HeadOnly")


@breaks("service-listens-where-it-is-asked", "prometheus-reaches-what-it-scrapes")
def a_port_that_nobody_finds(documents: Documents) -> None:
    del ray(served_by(documents))["ports"]


@breaks("head-serves-nobody")
def a_head_that_serves(documents: Documents) -> None:
    del service(documents)["excludeHeadPodFromServeSvc"]


@breaks("ready-when-pictures-can-be-asked-for")
def the_operators_own_probe(documents: Documents) -> None:
    del ray(served_by(documents))["readinessProbe"]


@breaks("ready-when-pictures-can-be-asked-for")
def ready_while_no_replica_draws(documents: Documents) -> None:
    ray(served_by(documents))["readinessProbe"]["httpGet"]["path"] = "/healthz"


@breaks("ready-when-pictures-can-be-asked-for")
def an_impatient_probe(documents: Documents) -> None:
    del ray(served_by(documents))["readinessProbe"]["timeoutSeconds"]


@breaks("token-is-a-mounted-secret")
def a_token_that_is_not_there(documents: Documents) -> None:
    say(documents, "/var/run/ssr/serve/token", "/var/run/ssr/elsewhere/token")


@breaks("token-is-a-mounted-secret")
def a_token_on_a_plain_disk(documents: Documents) -> None:
    for volume in pod(served_by(documents))["volumes"]:
        if volume.pop("secret", None):
            volume["emptyDir"] = {}


@breaks("only-clients-reach-the-service")
def a_curation_that_asks_the_service(documents: Documents) -> None:
    peers = policy(documents, "serving-clients")["spec"]["ingress"][0]["from"]
    peers.append({"podSelector": {"matchLabels": {"ssr/role": "curate"}}})


@breaks("only-clients-reach-the-service")
def a_namespace_by_its_name_alone(documents: Documents) -> None:
    peers = policy(documents, "serving-clients")["spec"]["ingress"][0]["from"]
    labels = {"kubernetes.io/metadata.name": "default"}
    peers.append({"namespaceSelector": {"matchLabels": labels}})


@breaks("serving-workers-are-kept")
def serving_workers_without_a_budget(documents: Documents) -> None:
    documents.remove(named(documents, "PodDisruptionBudget", "serving-workers"))


@breaks("serving-workers-are-kept")
def a_budget_that_kubernetes_cannot_count(documents: Documents) -> None:
    named(documents, "PodDisruptionBudget", "serving-workers")["spec"]["minAvailable"] = "50%"


# Lints of the other modules, on a service


@breaks("job-has-its-role")
def a_service_that_may_train(documents: Documents) -> None:
    pod(served_by(documents))["serviceAccountName"] = "ssr-train"


@breaks("nothing-is-exposed")
def a_service_behind_a_load_balancer(documents: Documents) -> None:
    service(documents)["serveService"] = {"spec": {"type": "LoadBalancer"}}


@breaks("no-installs-at-run-time")
def a_service_that_installs(documents: Documents) -> None:
    say(documents, "    args:", "    runtime_env: {pip: [torch]}\n    args:")


@breaks("no-api-token-on-workers")
def a_service_with_the_servers_token(documents: Documents) -> None:
    del pod(served_by(documents))["automountServiceAccountToken"]


@breaks("token-auth")
def a_service_whose_dashboard_is_open(documents: Documents) -> None:
    del service(documents)["rayClusterConfig"]["authOptions"]


@breaks("object-store-for-every-pod")
def a_service_without_a_way_to_the_store(documents: Documents) -> None:
    selector = policy(documents, "egress-object-store")["spec"]["podSelector"]
    selector["matchExpressions"][0]["values"].remove("serve")


@breaks("prometheus-reaches-what-it-scrapes")
def a_service_that_prometheus_cannot_read(documents: Documents) -> None:
    documents.remove(policy(documents, "prometheus-to-serve"))


@breaks("operator-reaches-the-heads")
def an_operator_shut_out_of_the_service(documents: Documents) -> None:
    selector = policy(documents, "operator-to-heads")["spec"]["podSelector"]
    selector["matchExpressions"] = [{"key": "ssr/role", "operator": "NotIn", "values": ["serve"]}]


@breaks("serving-workers-are-kept")
def a_budget_of_none(documents: Documents) -> None:
    named(documents, "PodDisruptionBudget", "serving-workers")["spec"]["minAvailable"] = 0


@breaks("serving-workers-are-kept")
def a_serving_budget_of_another_namespace(documents: Documents) -> None:
    budget = named(documents, "PodDisruptionBudget", "serving-workers")
    budget["metadata"]["namespace"] = "elsewhere"


@breaks("serving-workers-are-kept")
def a_serving_budget_of_another_group(documents: Documents) -> None:
    budget = named(documents, "PodDisruptionBudget", "serving-workers")
    budget["spec"]["selector"] = {"matchLabels": {"ray.io/group": "gpu"}}


@breaks("ready-when-pictures-can-be-asked-for")
def a_probe_that_gives_up_with_the_answer(documents: Documents) -> None:
    ray(served_by(documents))["readinessProbe"]["timeoutSeconds"] = 5
