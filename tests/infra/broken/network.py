"""Security: who reaches a cluster, and what it reaches."""

from __future__ import annotations

from typing import Any

from infra.checks.objects import dig
from infra.checks.render import Document
from tests.infra.broken.breakage import (
    Documents,
    allows,
    breaks,
    cluster,
    head,
    named,
    of_kind,
    ray,
    set_env,
)


@breaks("token-auth")
def no_tokens(documents: Documents) -> None:
    del cluster(documents, "train")["authOptions"]


@breaks("token-auth")
def tokens_turned_off(documents: Documents) -> None:
    cluster(documents, "curate")["authOptions"] = {"mode": "disabled"}


@breaks("token-auth")
def tokens_turned_off_by_variable(documents: Documents) -> None:
    set_env(head(documents, "curate"), "RAY_AUTH_MODE", "disabled")


@breaks("head-is-internal")
def a_head_behind_a_load_balancer(documents: Documents) -> None:
    head(documents, "train")["serviceType"] = "LoadBalancer"


@breaks("head-is-internal")
def a_head_on_a_node_port(documents: Documents) -> None:
    head(documents, "train")["headService"] = {"spec": {"type": "NodePort"}}


@breaks("head-is-internal")
def a_head_with_an_ingress(documents: Documents) -> None:
    head(documents, "train")["enableIngress"] = True


@breaks("nothing-is-exposed")
def an_ingress(documents: Documents) -> None:
    metadata = {"name": "dashboard", "namespace": "ssr"}
    documents.append(
        {"apiVersion": "networking.k8s.io/v1", "kind": "Ingress", "metadata": metadata}
    )


def service(**spec: Any) -> Document:
    metadata = {"name": "dashboard", "namespace": "ssr"}
    return {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": spec}


@breaks("nothing-is-exposed")
def a_node_port(documents: Documents) -> None:
    documents.append(service(type="NodePort", ports=[{"port": 8265}]))


@breaks("nothing-is-exposed")
def a_load_balancer(documents: Documents) -> None:
    documents.append(service(type="LoadBalancer", ports=[{"port": 8265}]))


@breaks("nothing-is-exposed")
def an_external_address(documents: Documents) -> None:
    documents.append(service(externalIPs=["198.51.100.1"], ports=[{"port": 8265}]))


@breaks("nothing-is-exposed")
def a_host_port(documents: Documents) -> None:
    port = {"containerPort": 8265, "hostPort": 8265}
    ray(head(documents, "curate")).setdefault("ports", []).append(port)


def _policies(documents: Documents) -> Documents:
    return of_kind(documents, "NetworkPolicy")


@breaks("ingress-is-denied-by-default")
def no_default_deny(documents: Documents) -> None:
    for policy in _policies(documents):
        if not policy["spec"]["podSelector"] and not policy["spec"].get("ingress"):
            kept = [kind for kind in policy["spec"]["policyTypes"] if kind != "Ingress"]
            policy["spec"]["policyTypes"] = kept or ["Egress"]


@breaks("ingress-names-its-peers")
def everyone_is_let_in(documents: Documents) -> None:
    _ingress(documents)[0].pop("from")


@breaks("ingress-names-its-peers", "pods-of-a-cluster-reach-each-other")
def the_internet_is_let_in(documents: Documents) -> None:
    _ingress(documents)[0]["from"] = [{"ipBlock": {"cidr": "0.0.0.0/0"}}]


@breaks("ingress-names-its-peers")
def every_namespace_is_let_in(documents: Documents) -> None:
    _ingress(documents)[0]["from"] = [{"namespaceSelector": {}}]


@breaks("ingress-names-its-peers")
def every_port_for_another_namespace(documents: Documents) -> None:
    for rule in _ingress(documents):
        if "ports" in rule:
            del rule["ports"]


def _ingress(documents: Documents) -> list[dict[str, Any]]:
    return [rule for policy in _policies(documents) for rule in policy["spec"].get("ingress", ())]


@breaks("egress-is-limited")
def no_egress_policy(documents: Documents) -> None:
    for policy in _policies(documents):
        policy["spec"]["policyTypes"] = ["Ingress"]
        policy["spec"].pop("egress", None)


@breaks("egress-is-limited", "pods-of-a-cluster-reach-each-other")
def no_names(documents: Documents) -> None:
    for policy in _policies(documents):
        for rule in policy["spec"].get("egress", ()):
            if "ports" in rule:
                rule["ports"] = [port for port in rule["ports"] if port["port"] != 53] or [
                    {"protocol": "TCP", "port": 443}
                ]
            else:  # among the pods of a cluster every port is open
                rule["ports"] = [{"protocol": "TCP", "port": 6379}]


@breaks("egress-is-not-open")
def egress_to_everything(documents: Documents) -> None:
    _web(documents)["spec"]["egress"].append({"ports": [{"protocol": "TCP", "port": 443}]})


@breaks("egress-is-not-open")
def egress_on_every_port(documents: Documents) -> None:
    del _web(documents)["spec"]["egress"][0]["ports"]


@breaks("egress-is-not-open")
def egress_to_the_metadata_service(documents: Documents) -> None:
    for peer in _web(documents)["spec"]["egress"][0]["to"]:
        block = peer["ipBlock"]
        block["except"] = [entry for entry in block["except"] if not entry.startswith("169.254.")]


@breaks("egress-is-not-open")
def egress_to_both_halves(documents: Documents) -> None:
    halves = [{"ipBlock": {"cidr": cidr}} for cidr in ("0.0.0.0/1", "128.0.0.0/1")]
    _web(documents)["spec"]["egress"][0]["to"] = halves


def _web(documents: Documents) -> Document:
    """The policy that opens the web to downloads."""
    return next(
        policy
        for policy in _policies(documents)
        for rule in policy["spec"].get("egress", ())
        for peer in rule.get("to", ())
        if dig(peer, "ipBlock.cidr") == "0.0.0.0/0"
    )


def _delete(documents: Documents, policy: str) -> None:
    documents.remove(named(documents, "NetworkPolicy", policy))


@breaks("api-server-for-autoscaling-heads")
def an_autoscaler_cut_off(documents: Documents) -> None:
    _delete(documents, "egress-api-server")


@breaks("api-server-for-autoscaling-heads")
def a_role_whose_autoscaler_is_cut_off(documents: Documents) -> None:
    selector = named(documents, "NetworkPolicy", "egress-api-server")["spec"]["podSelector"]
    selector["matchExpressions"][0]["values"].remove("read")


@breaks("object-store-for-every-pod")
def no_way_to_the_store(documents: Documents) -> None:
    _delete(documents, "egress-object-store")


@breaks("object-store-for-every-pod")
def a_role_without_a_way_to_the_store(documents: Documents) -> None:
    selector = named(documents, "NetworkPolicy", "egress-object-store")["spec"]["podSelector"]
    selector["matchExpressions"][0]["values"].remove("train")


@breaks("pods-of-a-cluster-reach-each-other")
def a_curation_in_pieces(documents: Documents) -> None:
    _delete(documents, "cluster-curate")


@breaks("pods-of-a-cluster-reach-each-other")
def an_evaluation_in_pieces(documents: Documents) -> None:
    _delete(documents, "cluster-read")


@breaks("pods-of-a-cluster-reach-each-other")
def a_training_that_sends_to_nobody(documents: Documents) -> None:
    named(documents, "NetworkPolicy", "cluster-train")["spec"]["egress"] = []


@breaks("operator-reaches-the-heads")
def an_operator_shut_out(documents: Documents) -> None:
    _delete(documents, "operator-to-heads")


@breaks("prometheus-reaches-what-it-scrapes")
def a_prometheus_shut_out(documents: Documents) -> None:
    _delete(documents, "prometheus-to-ray")


@breaks("downloads-reach-the-web")
def no_way_to_the_web(documents: Documents) -> None:
    _delete(documents, "egress-web")


@breaks("ingress-is-denied-by-default")
def a_denial_for_some(documents: Documents) -> None:
    denial = named(documents, "NetworkPolicy", "default-deny")["spec"]
    denial["podSelector"] = {"matchLabels": {"app": "nginx"}}


@breaks("ingress-is-denied-by-default", "only-clients-reach-the-service")
def a_denial_with_a_door(documents: Documents) -> None:
    denial = named(documents, "NetworkPolicy", "default-deny")["spec"]
    denial["ingress"] = [{"from": [{"podSelector": {}}]}]


@allows
def a_resolver_wherever_it_is(documents: Documents) -> None:
    ports = [{"protocol": "UDP", "port": 53}, {"protocol": "TCP", "port": 53}]
    named(documents, "NetworkPolicy", "egress-dns")["spec"]["egress"] = [{"ports": ports}]


@allows
def a_service_within_the_cluster(documents: Documents) -> None:
    metadata, spec = {"name": "it", "namespace": "ssr"}, {"type": "ClusterIP"}
    documents.append({"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": spec})
