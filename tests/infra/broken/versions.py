"""Rules 1 and 10, and kustomize's traps: another Ray, other images, names, lost references."""

from __future__ import annotations

from tests.infra.broken.breakage import (
    Documents,
    allows,
    breaks,
    cluster,
    head,
    job,
    named,
    pod,
    ray,
    workers,
)

# Rule 1


@breaks("ray-version-is-pinned", "ray-version-equals-image")
def an_older_ray(documents: Documents) -> None:
    cluster(documents, "train")["rayVersion"] = "2.59.0"


@breaks("ray-version-is-pinned")
def an_older_ray_throughout(documents: Documents) -> None:
    spec = cluster(documents, "curate")
    spec["rayVersion"] = "2.59.0"
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        ray(group)["image"] = ray(group)["image"].replace("2.60.0", "2.59.0")


@breaks("ray-version-equals-image")
def an_image_of_another_ray(documents: Documents) -> None:
    container = ray(workers(documents, "curate"))
    container["image"] = container["image"].replace("2.60.0", "2.60.1")


@breaks("image-not-latest", "ray-version-equals-image")
def an_image_called_latest(documents: Documents) -> None:
    container = ray(head(documents, "train"))
    name, digest = container["image"].split("@")
    container["image"] = f"{name.rpartition(':')[0]}:latest@{digest}"


@breaks("image-by-digest")
def an_image_by_tag(documents: Documents) -> None:
    container = ray(head(documents, "train"))
    container["image"] = container["image"].split("@")[0]


@breaks("image-by-digest")
def an_autoscaler_by_tag(documents: Documents) -> None:
    image = ray(head(documents, "curate"))["image"].split("@")[0]
    cluster(documents, "curate")["autoscalerOptions"]["image"] = image


@breaks("image-by-digest")
def a_submitter_by_tag(documents: Documents) -> None:
    container = job(documents, "train")["submitterPodTemplate"]["spec"]["containers"][0]
    container["image"] = container["image"].split("@")[0]


@breaks("no-installs-at-run-time")
def pip_in_the_runtime_environment(documents: Documents) -> None:
    job(documents, "curate")["runtimeEnvYAML"] = "pip: [requests]\n"


@breaks("no-installs-at-run-time")
def pip_in_the_entrypoint(documents: Documents) -> None:
    job(documents, "curate")["entrypoint"] = (
        "pip install requests && " + job(documents, "curate")["entrypoint"]
    )


@breaks("no-installs-at-run-time")
def apt_in_an_init_container(documents: Documents) -> None:
    spec = pod(workers(documents, "curate"))
    own = {**spec["containers"][0], "name": "tools", "args": ["apt-get install -y vim"]}
    spec["initContainers"] = [own]


# Rule 10


@breaks("names-fit")
def a_long_name(documents: Documents) -> None:
    named(documents, "RayJob", "train")["metadata"]["name"] = "t" * 48


@breaks("names-fit")
def a_name_with_a_dot(documents: Documents) -> None:
    named(documents, "RayJob", "train")["metadata"]["name"] = "train.1"


@breaks("token-auth-needs-its-ray", "ray-version-is-pinned", "ray-version-equals-image")
def tokens_before_ray_knew_them(documents: Documents) -> None:
    cluster(documents, "train")["rayVersion"] = "2.51.2"


# Kustomize traps


@breaks("references-resolve", "root-is-an-object-store")
def a_config_map_without_its_hash(documents: Documents) -> None:
    ray(head(documents, "train"))["envFrom"] = [{"configMapRef": {"name": "ssr-site"}}]


@breaks("references-resolve")
def a_claim_of_nobody(documents: Documents) -> None:
    pod(workers(documents, "curate"))["volumes"].append(
        {"name": "lost", "persistentVolumeClaim": {"claimName": "lost"}}
    )


@breaks(
    "worker-groups-are-whole", "image-by-digest", "image-not-latest", "ray-version-equals-image"
)
def a_group_without_an_image(documents: Documents) -> None:
    del ray(workers(documents, "curate"))["image"]


@breaks("references-resolve")
def a_config_map_of_nobody_as_a_volume(documents: Documents) -> None:
    pod(workers(documents, "curate"))["volumes"].append(
        {"name": "lost", "configMap": {"name": "lost"}}
    )


@breaks("references-resolve")
def a_config_map_of_nobody_in_a_projection(documents: Documents) -> None:
    projected = {"sources": [{"configMap": {"name": "lost"}}]}
    pod(workers(documents, "curate"))["volumes"].append({"name": "lost", "projected": projected})


@breaks("references-resolve")
def a_variable_of_no_config_map(documents: Documents) -> None:
    source = {"configMapKeyRef": {"name": "lost", "key": "a"}}
    ray(workers(documents, "curate"))["env"].append({"name": "A", "valueFrom": source})


@breaks("references-resolve")
def a_priority_of_nobody(documents: Documents) -> None:
    pod(workers(documents, "curate"))["priorityClassName"] = "lost"


@breaks("no-installs-at-run-time")
def pip_as_a_command(documents: Documents) -> None:
    spec = pod(workers(documents, "curate"))
    own = {**spec["containers"][0], "name": "tools", "command": ["pip", "install", "vim"]}
    spec["initContainers"] = [own]


@allows
def a_name_that_just_fits(documents: Documents) -> None:
    named(documents, "RayJob", "train")["metadata"]["name"] = "t" * 47


@allows
def a_priority_of_kubernetes_own(documents: Documents) -> None:
    pod(workers(documents, "curate"))["priorityClassName"] = "system-cluster-critical"


@allows
def a_config_map_that_may_be_missing(documents: Documents) -> None:
    pod(workers(documents, "curate"))["volumes"].append(
        {"name": "lost", "configMap": {"name": "lost", "optional": True}}
    )
