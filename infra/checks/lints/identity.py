"""Who a pod is: a service account per role with workload identity, and keys nowhere."""

from __future__ import annotations

import re
from collections.abc import Iterator

import yaml

from infra.checks.findings import Finding, lint, subject
from infra.checks.objects import (
    clusters,
    dig,
    environment,
    every_string,
    groups,
    jobs,
    kind,
    namespace,
    pods,
)
from infra.checks.render import Document
from pipeline.serving.arguments import IMPORT_PATH

# The role that the policies of infra/policies/s3 know a job's entrypoint by, or a service's config.
_ROLES = (
    ("jobs/curate.py", "ssr-curate"),
    ("jobs/train.py", "ssr-train"),
    ("jobs/generate.py", "ssr-read"),
    ("jobs/evaluate.py", "ssr-read"),
    (IMPORT_PATH, "ssr-serve"),
)
_WORKLOAD_IDENTITY = (
    "eks.amazonaws.com/role-arn",
    "iam.gke.io/gcp-service-account",
    "azure.workload.identity/client-id",
)
_SECRET_NAME = re.compile(r"SECRET|PASSW|TOKEN|CREDENTIAL|ACCESS_KEY|API_KEY|PRIVATE_KEY")
_PATH_NAME = re.compile(r"(_FILE|_PATH|_DIR|_URI)$")
_KEY = re.compile(
    r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"  # AWS
    r"|\bhf_[A-Za-z0-9]{30,}\b|\bgh[pousr]_[A-Za-z0-9]{36}\b"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----"
    r"|[?&]X-Amz-Signature=|[?&]sig=[A-Za-z0-9%]{20,}"
)
_CREDENTIALS_IN_URI = re.compile(r"[a-z][a-z0-9+.-]*://[^\s/:@]+:[^\s/@]+@")


@lint("security", "a service account of its own for every Ray pod, and it is there")
def service_account_is_named(documents: list[Document]) -> Iterator[Finding]:
    there = {
        (namespace(document), document["metadata"]["name"])
        for document in kind(documents, "ServiceAccount")
    }
    for group in groups(documents):
        name = group.pod.spec.get("serviceAccountName")
        if name in (None, "default"):
            yield group.pod.finding("serviceAccountName", f"is {name}", "name the role's")
        elif (group.pod.namespace, name) not in there:
            wrong = f"no ServiceAccount {name} in {group.pod.namespace}"
            yield group.pod.finding("serviceAccountName", wrong, "add it to infra/base")


@lint("security", "each job runs as its role: a leaked training pod cannot rewrite the data")
def job_has_its_role(documents: list[Document]) -> Iterator[Finding]:
    for cluster in clusters(documents):
        entrypoint = (cluster.job or {}).get("entrypoint", "")
        entrypoint += (cluster.service or {}).get("serveConfigV2", "")
        for script, role in _ROLES:
            for group in cluster.groups if script in entrypoint else ():
                name = group.pod.spec.get("serviceAccountName")
                if name and not _is(role, name):
                    wrong = f"is {name} for {script}"
                    yield group.pod.finding("serviceAccountName", wrong, f"say {role}")


@lint(
    "security",
    "service accounts have a workload identity: a cloud's, or a token for the store's STS",
)
def service_account_has_an_identity(documents: list[Document]) -> Iterator[Finding]:
    accounts = {
        (namespace(document), document["metadata"]["name"]): document
        for document in kind(documents, "ServiceAccount")
    }
    for group in groups(documents):
        account = accounts.get((group.pod.namespace, group.pod.spec.get("serviceAccountName", "")))
        notes = dig(account, "metadata.annotations", {})
        variables = environment(documents, group.pod, group.ray)
        by_token = "AWS_WEB_IDENTITY_TOKEN_FILE" in variables  # as stores beside the clouds have it
        if account and not by_token and not any(notes.get(name) for name in _WORKLOAD_IDENTITY):
            do = "add components/s3-irsa, or s3-compatible for a store without it"
            yield group.pod.finding("serviceAccountName", "may reach no store", do)


@lint("security", "no keys in the environment: every process and crash report sees it")
def no_keys_in_env(documents: list[Document]) -> Iterator[Finding]:
    do = "use workload identity, or mount the secret as a file"
    for pod in pods(documents):
        for container in pod.containers:
            for name in environment(documents, pod, container):
                entry = container.env.get(name, {})
                # Ray's own token comes so, from the secret that the operator makes.
                rays = name == "RAY_AUTH_TOKEN" and dig(entry, "valueFrom.secretKeyRef")
                secret = _SECRET_NAME.search(name) and not _PATH_NAME.search(name)
                if not rays and (secret or dig(entry, "valueFrom.secretKeyRef")):
                    path = f"{container.path}.env"
                    yield Finding(subject(pod.document), path, f"{name} is a key", do)
            for source in container.spec.get("envFrom") or ():
                if "secretRef" in source:
                    path = f"{container.path}.envFrom"
                    yield Finding(subject(pod.document), path, "a whole secret", do)
    for document, path, job in jobs(documents):
        variables = (yaml.safe_load(job.get("runtimeEnvYAML") or "") or {}).get("env_vars") or {}
        for name in variables:
            if _SECRET_NAME.search(name) and not _PATH_NAME.search(name):
                where = f"{path}.runtimeEnvYAML"
                yield Finding(subject(document), where, f"{name} is a key", do)


@lint("security", "no credentials in URIs, and nothing that looks like a key")
def no_credentials_in_text(documents: list[Document]) -> Iterator[Finding]:
    do = "revoke it, then use workload identity"
    for document in documents:
        for path, text in every_string(document):
            if _CREDENTIALS_IN_URI.search(text):
                yield Finding(subject(document), path, "a URI with a password", do)
            if _KEY.search(text):
                yield Finding(subject(document), path, "looks like a key", do)


@lint("security", "no secrets in git: they are made in the cluster, by hand or an operator")
def no_secrets_in_git(documents: list[Document]) -> Iterator[Finding]:
    for document in kind(documents, "Secret"):
        if document.get("data") or document.get("stringData"):
            do = "make it in the cluster (infra/README.md)"
            yield Finding(subject(document), "data", "lies in git", do)


@lint("security", "workers have no API token: a picture's exploit is not the cluster's")
def no_api_token_on_workers(documents: list[Document]) -> Iterator[Finding]:
    for group in groups(documents):
        needs_it = group.is_head and group.cluster.autoscaled
        if not needs_it and group.pod.spec.get("automountServiceAccountToken") is not False:
            wrong = "the API server's token is mounted"
            yield group.pod.finding("automountServiceAccountToken", wrong, "say false")


@lint("security", "roles name what they allow: no wildcards, no cluster-admin")
def roles_are_narrow(documents: list[Document]) -> Iterator[Finding]:
    for role in kind(documents, "Role", "ClusterRole"):
        for index, rule in enumerate(role.get("rules") or ()):
            for field in ("apiGroups", "resources", "verbs"):
                if "*" in (rule.get(field) or ()):
                    yield Finding(subject(role), f"rules[{index}].{field}", "is *", "name them")
    for binding in kind(documents, "RoleBinding", "ClusterRoleBinding"):
        if dig(binding, "roleRef.name") in ("cluster-admin", "admin", "edit"):
            wrong = f"binds {binding['roleRef']['name']}"
            yield Finding(subject(binding), "roleRef", wrong, "bind a role of its own")


def _is(role: str, name: str) -> bool:
    """`name` is the role, with a prefix or suffix of the overlay's at most."""
    return bool(re.search(rf"(^|-){re.escape(role)}(-|$)", name))
