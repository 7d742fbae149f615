"""Security: accounts, keys, tokens, roles."""

from __future__ import annotations

from tests.infra.broken.breakage import (
    Documents,
    allows,
    breaks,
    head,
    job,
    named,
    of_kind,
    pod,
    ray,
    set_env,
    workers,
)


@breaks("service-account-is-named")
def the_default_account(documents: Documents) -> None:
    del pod(workers(documents, "train"))["serviceAccountName"]


@breaks("service-account-is-named", "job-has-its-role")
def an_account_of_nobody(documents: Documents) -> None:
    pod(workers(documents, "train"))["serviceAccountName"] = "nobody"


@breaks("job-has-its-role")
def training_that_may_curate(documents: Documents) -> None:
    pod(workers(documents, "train"))["serviceAccountName"] = "ssr-curate"


@breaks("job-has-its-role")
def an_evaluation_that_may_train(documents: Documents) -> None:
    pod(workers(documents, "evaluate"))["serviceAccountName"] = "ssr-train"


@breaks("service-account-has-an-identity")
def an_account_without_an_identity(documents: Documents) -> None:
    del named(documents, "ServiceAccount", "ssr-train")["metadata"]["annotations"]


@breaks("no-keys-in-env")
def a_key_in_the_environment(documents: Documents) -> None:
    set_env(workers(documents, "train"), "AWS_SECRET_ACCESS_KEY", "it")


@breaks("no-keys-in-env")
def rays_own_token_in_the_environment(documents: Documents) -> None:
    set_env(head(documents, "train"), "RAY_AUTH_TOKEN", "it")


@breaks("no-keys-in-env")
def a_key_from_a_secret(documents: Documents) -> None:
    source = {"secretKeyRef": {"name": "bucket", "key": "key"}}
    ray(workers(documents, "train"))["env"].append({"name": "BUCKET", "valueFrom": source})


@breaks("no-keys-in-env")
def a_whole_secret_in_the_environment(documents: Documents) -> None:
    ray(workers(documents, "train")).setdefault("envFrom", []).append(
        {"secretRef": {"name": "bucket"}}
    )


@breaks("no-keys-in-env")
def a_key_in_the_sites_config_map(documents: Documents) -> None:
    for config in of_kind(documents, "ConfigMap"):
        config.setdefault("data", {})["HF_TOKEN"] = "it"


@breaks("no-keys-in-env")
def a_key_in_the_runtime_environment(documents: Documents) -> None:
    job(documents, "train")["runtimeEnvYAML"] = "env_vars: {WANDB_API_KEY: it}\n"


@breaks("no-credentials-in-text")
def a_password_in_a_uri(documents: Documents) -> None:
    job(documents, "train")["entrypoint"] += " --trackers.uri https://me:secret@mlflow.example.org"


@breaks("no-credentials-in-text")
def something_like_a_key(documents: Documents) -> None:
    for config in of_kind(documents, "ConfigMap")[:1]:
        config.setdefault("data", {})["NOTE"] = "AKIA" + "A" * 16


@breaks("no-secrets-in-git")
def a_secret_in_git(documents: Documents) -> None:
    metadata = {"name": "bucket", "namespace": "ssr"}
    data = {"key": "aXQ="}
    documents.append({"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "data": data})


@breaks("no-api-token-on-workers")
def an_api_token_on_workers(documents: Documents) -> None:
    del pod(workers(documents, "curate"))["automountServiceAccountToken"]


@breaks("no-api-token-on-workers")
def an_api_token_on_a_head_that_does_not_scale(documents: Documents) -> None:
    pod(head(documents, "train"))["automountServiceAccountToken"] = True


@breaks("roles-are-narrow")
def a_role_for_everything(documents: Documents) -> None:
    group = "rbac.authorization.k8s.io"
    rules = [{"apiGroups": [""], "resources": ["*"], "verbs": ["get"]}]
    metadata = {"name": "all", "namespace": "ssr"}
    role = {"apiVersion": f"{group}/v1", "kind": "Role", "metadata": metadata, "rules": rules}
    documents.append(role)


@breaks("roles-are-narrow")
def a_cluster_admin(documents: Documents) -> None:
    group = "rbac.authorization.k8s.io"
    target = {"apiGroup": group, "kind": "ClusterRole", "name": "cluster-admin"}
    metadata = {"name": "all", "namespace": "ssr"}
    documents.append(
        {
            "apiVersion": f"{group}/v1",
            "kind": "RoleBinding",
            "metadata": metadata,
            "roleRef": target,
        }
    )


@breaks("service-account-is-named", "service-account-has-an-identity")
def the_default_account_by_name(documents: Documents) -> None:
    pod(workers(documents, "nccl-smoke"))["serviceAccountName"] = "default"


@breaks("no-secrets-in-git")
def a_secret_in_git_as_plain_text(documents: Documents) -> None:
    metadata = {"name": "bucket", "namespace": "ssr"}
    text = {"key": "it"}
    documents.append(
        {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "stringData": text}
    )


@allows
def rays_own_token_from_the_operators_secret(documents: Documents) -> None:
    source = {"secretKeyRef": {"name": "train", "key": "auth_token"}}
    ray(head(documents, "train"))["env"].append({"name": "RAY_AUTH_TOKEN", "valueFrom": source})


@allows
def the_path_of_a_key_and_names_that_are_none(documents: Documents) -> None:
    set_env(workers(documents, "train"), "AWS_SHARED_CREDENTIALS_FILE", "/var/run/keys")
    job(documents, "train")["runtimeEnvYAML"] = (
        "env_vars: {WANDB_PROJECT: ssr, WANDB_API_KEY_FILE: /var/run/key}\n"
    )


@allows
def a_secret_that_is_filled_elsewhere(documents: Documents) -> None:
    metadata = {"name": "bucket", "namespace": "ssr"}
    documents.append({"apiVersion": "v1", "kind": "Secret", "metadata": metadata})
