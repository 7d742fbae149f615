"""Who reaches a cluster, and what it reaches: Ray runs whatever arrives at its ports."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from infra.checks.findings import Finding, lint, subject
from infra.checks.objects import (
    Pod,
    clusters,
    dig,
    environment,
    groups,
    kind,
    namespace,
    pods,
    selects,
)
from infra.checks.render import Document

# What a fetch from the open web must not reach: our own network, and the node's metadata service.
_PRIVATE = (
    "10.0.0.0/8",
    "100.64.0.0/10",
    "169.254.0.0/16",
    "172.16.0.0/12",
    "192.168.0.0/16",
    "fc00::/7",
    "fe80::/10",
)
_API_SERVER_PORTS = (443, 6443)
DASHBOARD, METRICS = 8265, 8080
# An address does not say whose it is, so these two are known by their policies' names.
API_SERVER, OBJECT_STORE = "egress-api-server", "egress-object-store"


@dataclass(frozen=True)
class Outsider:
    """A pod that is not rendered here, as a policy sees it."""

    namespace: str
    labels: dict[str, str]


OPERATOR = Outsider("kuberay-system", {"app.kubernetes.io/name": "kuberay-operator"})
PROMETHEUS = Outsider("monitoring", {"app.kubernetes.io/name": "prometheus"})


@lint("security", "authOptions.mode: token on every cluster (CVE-2023-48022)")
def token_auth(documents: list[Document]) -> Iterator[Finding]:
    for cluster in clusters(documents):
        mode = dig(cluster.spec, "authOptions.mode")
        if mode != "token":
            wrong = f"is {mode}: whoever reaches the dashboard runs code"
            yield cluster.finding("authOptions.mode", wrong, "say token")
        for group in cluster.groups:
            mode = environment(documents, group.pod, group.ray).get("RAY_AUTH_MODE", "token")
            if mode != "token":
                path = f"{group.ray.path}.env"
                wrong = "RAY_AUTH_MODE turns tokens off"
                yield Finding(subject(cluster.document), path, wrong, "leave it out")


@lint("security", "the head is a ClusterIP service, with no Ingress")
def head_is_internal(documents: list[Document]) -> Iterator[Finding]:
    do = "use kubectl port-forward"
    for cluster in clusters(documents):
        for path in ("serviceType", "headService.spec.type"):
            service = dig(cluster.head.spec, path, "ClusterIP")
            if service != "ClusterIP":
                yield cluster.head.finding(path, f"is {service}", do)
        if cluster.head.spec.get("enableIngress"):
            yield cluster.head.finding("enableIngress", "is true", do)


@lint("security", "no Ingress, NodePort, LoadBalancer, external address or host port")
def nothing_is_exposed(documents: list[Document]) -> Iterator[Finding]:
    do = "use kubectl port-forward"
    for document in kind(documents, "Ingress", "Gateway", "HTTPRoute", "TCPRoute", "Route"):
        yield Finding(subject(document), "kind", "opens the cluster to its outside", do)
    for service in kind(documents, "Service"):
        how = dig(service, "spec.type", "ClusterIP")
        if how not in ("ClusterIP",):
            yield Finding(subject(service), "spec.type", f"is {how}", do)
        if dig(service, "spec.externalIPs"):
            yield Finding(subject(service), "spec.externalIPs", "are given", do)
    for cluster in clusters(documents):
        how = dig(cluster.service, "serveService.spec.type", "ClusterIP")
        if how != "ClusterIP":
            where = "spec.serveService.spec.type"
            yield Finding(subject(cluster.document), where, f"is {how}", do)
    for pod in pods(documents):
        for container in pod.containers:
            for port in container.spec.get("ports") or ():
                if port.get("hostPort") and not pod.spec.get("hostNetwork"):
                    wrong = f"hostPort {port['hostPort']} listens on the node"
                    yield Finding(subject(pod.document), f"{container.path}.ports", wrong, do)


@lint("security", "default-deny ingress in every namespace with pods of ours")
def ingress_is_denied_by_default(documents: list[Document]) -> Iterator[Finding]:
    closed = {
        namespace(policy)
        for policy in kind(documents, "NetworkPolicy")
        if "Ingress" in _types(policy)
        and not dig(policy, "spec.podSelector")
        and not dig(policy, "spec.ingress")
    }
    for place in sorted({pod.namespace for pod in pods(documents)} - closed):
        wrong = "every pod of the cluster reaches Ray's ports"
        do = "add a NetworkPolicy: podSelector {}, policyTypes [Ingress], no rules"
        yield Finding(f"Namespace/{place}", "NetworkPolicy", wrong, do)


@lint("security", "what is let in is named: no ingress rule from everywhere")
def ingress_names_its_peers(documents: list[Document]) -> Iterator[Finding]:
    for policy in kind(documents, "NetworkPolicy"):
        for index, rule in enumerate(dig(policy, "spec.ingress") or ()):
            peers = rule.get("from") or []
            if not peers or any(_everywhere(peer) for peer in peers):
                where = f"spec.ingress[{index}]"
                yield Finding(subject(policy), where, "lets everyone in", "name the pods in from")
            elif not rule.get("ports") and any("namespaceSelector" in peer for peer in peers):
                where = f"spec.ingress[{index}].ports"
                wrong = "opens every port to another namespace"
                yield Finding(subject(policy), where, wrong, "name the ports")


@lint("security", "egress of every Ray pod is limited, DNS is part of what it has")
def egress_is_limited(documents: list[Document]) -> Iterator[Finding]:
    for pod in _ray_pods(documents):
        policies = _egress_policies(documents, pod)
        if not policies:
            wrong = "no NetworkPolicy limits the egress of its pods"
            yield pod.finding("", wrong, "select them in one with policyTypes [Egress]")
        elif not _reaches_port(policies, 53):
            yield pod.finding("", "may not reach DNS", "allow port 53, UDP and TCP")


@lint("security", "no egress to everything: ports are named, private ranges excepted")
def egress_is_not_open(documents: list[Document]) -> Iterator[Finding]:
    for policy in kind(documents, "NetworkPolicy"):
        for index, rule in enumerate(dig(policy, "spec.egress") or ()):
            where = f"spec.egress[{index}]"
            peers = rule.get("to") or []
            if not peers:
                if {port.get("port") for port in rule.get("ports") or ()} != {53}:
                    yield Finding(subject(policy), where, "goes everywhere", "name peers in to")
                continue
            for peer in peers:
                if not _everywhere(peer):
                    continue
                if not rule.get("ports"):
                    wrong = "the open internet on every port"
                    yield Finding(subject(policy), where, wrong, "name the ports")
                if missing := _private_within(peer.get("ipBlock")):
                    wrong = f"reaches {', '.join(missing)}: ours, or the node's credentials"
                    yield Finding(subject(policy), where, wrong, "list them in ipBlock.except")


@lint("security", "autoscaling heads reach the API server: they ask it for pods")
def api_server_for_autoscaling_heads(documents: list[Document]) -> Iterator[Finding]:
    for cluster in clusters(documents):
        pod = cluster.head.pod
        policies = _egress_policies(documents, pod)
        named = _called(policies, API_SERVER)
        reached = any(_reaches_port(named, port) for port in _API_SERVER_PORTS)
        if cluster.autoscaled and policies and not reached:
            wrong = "an autoscaling head may not reach the API server"
            yield pod.finding("", wrong, f"select it in {API_SERVER}, with port 443 or 6443")


@lint("security", "every Ray pod reaches the object store: what is not there is lost")
def object_store_for_every_pod(documents: list[Document]) -> Iterator[Finding]:
    for pod in _ray_pods(documents):
        policies = _egress_policies(documents, pod)
        if policies and not any(
            dig(policy, "spec.egress") for policy in _called(policies, OBJECT_STORE)
        ):
            yield pod.finding("", "may not reach the object store", f"select it in {OBJECT_STORE}")


@lint("security", "the pods of a cluster reach each other on every port, a submitter the dashboard")
def pods_of_a_cluster_reach_each_other(documents: list[Document]) -> Iterator[Finding]:
    do = "add a policy that lets the pods of its role in, and out to each other"
    for cluster in clusters(documents):
        nodes = [group.pod for group in cluster.groups]
        pairs: list[tuple[Pod, Pod, int | None]] = [
            (one, other, None) for one in nodes for other in nodes
        ]
        submitters = (
            pod
            for pod in pods(documents)
            if pod.document is cluster.document and pod.path.endswith("submitterPodTemplate")
        )
        pairs += [(pod, cluster.head.pod, DASHBOARD) for pod in submitters]
        for one, other, port in pairs:
            if not _sends(documents, one, other, port) or not admits(documents, other, one, port):
                yield one.finding("", f"may not reach {other.path or 'its cluster'}", do)


@lint(
    "security",
    "the operator reaches the heads of jobs and services: it asks the dashboard how they are",
)
def operator_reaches_the_heads(documents: list[Document]) -> Iterator[Finding]:
    for cluster in clusters(documents):
        head = cluster.head.pod
        asked = cluster.job is not None or cluster.service is not None
        if asked and not admits(documents, head, OPERATOR, DASHBOARD):
            wrong = "the operator may not ask it how its job or service is"
            yield head.finding("", wrong, f"let the operator in, on port {DASHBOARD}")


@lint("security", "what a PodMonitor selects lets Prometheus in, or alerts stay silent")
def prometheus_reaches_what_it_scrapes(documents: list[Document]) -> Iterator[Finding]:
    for monitor in kind(documents, "PodMonitor"):
        names = {entry.get("port") for entry in dig(monitor, "spec.podMetricsEndpoints", [])}
        for pod in pods(documents):
            if not selects(dig(monitor, "spec.selector"), pod.labels):
                continue
            for name in sorted(filter(None, names)):
                port = _port(pod, name)
                if port is None or not admits(documents, pod, PROMETHEUS, port):
                    wrong = f"Prometheus may not read its metrics ({subject(monitor)})"
                    do = f"let Prometheus in, on port {port or name}"
                    yield pod.finding("", wrong, do)


def _port(pod: Pod, name: str) -> int | None:
    """The container port of this name; `metrics` is KubeRay's, in every Ray container."""
    ports = [port for each in pod.containers for port in each.spec.get("ports") or ()]
    named = {"metrics": METRICS} | {port.get("name"): port["containerPort"] for port in ports}
    return named.get(name)


@lint("security", "what is labelled ssr/web: allowed reaches the web, for downloads")
def downloads_reach_the_web(documents: list[Document]) -> Iterator[Finding]:
    for pod in pods(documents):
        if pod.labels.get("ssr/web") != "allowed":
            continue
        policies = _egress_policies(documents, pod)
        opened = [
            {**policy, "spec": {"egress": [rule]}}
            for policy in policies
            for rule in dig(policy, "spec.egress") or ()
            if any(_everywhere(peer) for peer in rule.get("to") or ())
        ]
        if policies and not all(_reaches_port(opened, port) for port in (80, 443)):
            yield pod.finding("", "may not reach the web", "allow 80 and 443 to public addresses")


def _ray_pods(documents: list[Document]) -> Iterator[Pod]:
    return (group.pod for group in groups(documents))


def _types(policy: Document) -> list[str]:
    given = dig(policy, "spec.policyTypes")
    if given:
        return list(given)
    return ["Ingress", *(["Egress"] if dig(policy, "spec.egress") else [])]


def _egress_policies(documents: list[Document], pod: Pod) -> list[Document]:
    return [
        policy
        for policy in kind(documents, "NetworkPolicy")
        if "Egress" in _types(policy)
        and namespace(policy) == pod.namespace
        and selects(dig(policy, "spec.podSelector"), pod.labels)
    ]


def _reaches_port(policies: list[Document], port: int) -> bool:
    return any(
        not rule.get("ports") or any(entry.get("port") in (port, None) for entry in rule["ports"])
        for policy in policies
        for rule in dig(policy, "spec.egress") or ()
    )


def _called(policies: list[Document], name: str) -> list[Document]:
    """Those of this name, with an overlay's prefix or suffix at most."""
    return [policy for policy in policies if name in policy["metadata"]["name"]]


def _sends(documents: list[Document], pod: Pod, to: Pod | Outsider, port: int | None) -> bool:
    """Whether policies let `pod` out to `to`, on `port`; None is every port."""
    policies = _egress_policies(documents, pod)
    return not policies or any(
        _takes(documents, pod.namespace, rule, "to", to, port)
        for policy in policies
        for rule in dig(policy, "spec.egress") or ()
    )


def admits(documents: list[Document], pod: Pod, by: Pod | Outsider, port: int | None) -> bool:
    """Whether policies let `by` in to `pod`, on `port`; None is every port."""
    policies = [
        policy
        for policy in kind(documents, "NetworkPolicy")
        if "Ingress" in _types(policy)
        and namespace(policy) == pod.namespace
        and selects(dig(policy, "spec.podSelector"), pod.labels)
    ]
    return not policies or any(
        _takes(documents, pod.namespace, rule, "from", by, port)
        for policy in policies
        for rule in dig(policy, "spec.ingress") or ()
    )


def _takes(
    documents: list[Document],
    place: str,
    rule: dict[str, Any],
    peers: str,
    pod: Pod | Outsider,
    port: int | None,
) -> bool:
    """Whether a rule of a policy in the namespace `place` is for `pod` and `port`."""
    ports = rule.get("ports")
    if ports and not any(entry.get("port") == port for entry in ports if port):
        return False
    if not rule.get(peers):
        return True
    known = {"kubernetes.io/metadata.name": pod.namespace}
    for document in kind(documents, "Namespace"):
        if document["metadata"]["name"] == pod.namespace:
            known.update(dig(document, "metadata.labels", {}))
    return any(
        "ipBlock" not in peer  # addresses of pods are nobody's to know
        and selects(peer.get("podSelector"), pod.labels)
        and (
            selects(peer["namespaceSelector"], known)
            if "namespaceSelector" in peer
            else pod.namespace == place
        )
        for peer in rule[peers]
    )


def _everywhere(peer: dict[str, Any]) -> bool:
    """A peer that is the whole internet, or every pod of every namespace."""
    if "ipBlock" in peer:  # a half of the internet is no less open
        return ipaddress.ip_network(peer["ipBlock"]["cidr"], strict=False).prefixlen < 8
    return peer.get("namespaceSelector") == {} and not peer.get("podSelector")


def _private_within(block: dict[str, Any] | None) -> list[str]:
    """The private ranges that an ipBlock lets through; all, for every pod of every namespace."""
    if block is None:
        return list(_PRIVATE)
    excepted = block.get("except") or ()
    return [
        private
        for private in _PRIVATE
        if _within(private, block["cidr"]) and not any(_within(private, e) for e in excepted)
    ]


def _within(inner: str, outer: str) -> bool:
    small, large = ipaddress.ip_network(inner), ipaddress.ip_network(outer, strict=False)
    return small.version == large.version and small.subnet_of(large)  # type: ignore[arg-type]
