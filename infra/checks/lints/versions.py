"""Rules 1 and 10: one Ray everywhere, images that cannot change, names that fit."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import yaml

from infra.checks.findings import Finding, lint, subject
from infra.checks.lints.serving import applications
from infra.checks.objects import clusters, dig, groups, jobs, pods
from infra.checks.render import Document

_PYPROJECT = Path(__file__).parents[3] / "pyproject.toml"
_RAY_IN_TAG = re.compile(r"(?:^|[-_.])ray-?(\d+\.\d+\.\d+)(?![\d.])")
_DIGEST = re.compile(r"@sha256:[0-9a-f]{64}$")
_INSTALLERS = ("pip", "uv", "conda", "container", "image_uri")
_INSTALL = re.compile(r"\b(?:pip3?|uv|conda|mamba|apt|apt-get|npm)\s+(?:pip\s+)?(?:install|add)\b")
# What is left of 63 characters when KubeRay has appended its suffixes.
_LONGEST = {"RayCluster": 53, "RayJob": 47, "RayService": 47}
_DNS_LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_TOKENS_SINCE = (2, 52, 0)


@cache
def pinned_ray() -> str:
    """The Ray that pyproject.toml pins, the one source of it."""
    for requirement in tomllib.loads(_PYPROJECT.read_text())["project"]["dependencies"]:
        if found := re.match(r"ray(?:\[[^]]*\])?==([\d.]+)", requirement):
            return found[1]
    raise ValueError(f"{_PYPROJECT} pins no Ray")


@lint("rule 1", "rayVersion is the Ray that pyproject.toml pins")
def ray_version_is_pinned(documents: list[Document]) -> Iterator[Finding]:
    for cluster in clusters(documents):
        version = cluster.spec.get("rayVersion")
        if version != pinned_ray():
            do = f'say rayVersion: "{pinned_ray()}", as pyproject.toml'
            yield cluster.finding("rayVersion", f"is {version!r}", do)


@lint("rule 1", "rayVersion equals the image exactly: its tag names the Ray inside")
def ray_version_equals_image(documents: list[Document]) -> Iterator[Finding]:
    for group in groups(documents):
        image = group.ray.spec.get("image", "")
        found = _RAY_IN_TAG.search(_tag(image))
        version = group.cluster.spec.get("rayVersion")
        if not found or found[1] != version:
            wrong = f"{image!r} is not told to hold Ray {version}"
            do = f"use the image whose tag ends in ray{version}"
            yield Finding(subject(group.cluster.document), f"{group.ray.path}.image", wrong, do)


@lint("rule 1", "images by digest: what runs is what was built and scanned")
def image_by_digest(documents: list[Document]) -> Iterator[Finding]:
    for document, path, image in _images(documents):
        if not _DIGEST.search(image):
            do = "append @sha256:... (kustomize: images: digest)"
            yield Finding(subject(document), path, f"{image!r} has no digest", do)


@lint("rule 1", "never `latest`, nor neither tag nor digest, which means latest")
def image_not_latest(documents: list[Document]) -> Iterator[Finding]:
    for document, path, image in _images(documents):
        if _tag(image) == "latest" or not (_tag(image) or _DIGEST.search(image)):
            do = "name the release, and its digest"
            yield Finding(subject(document), path, f"{image!r} is whatever was pushed last", do)


@lint(
    "rule 1",
    "nothing is installed at run time: no pip in a runtime environment, none in commands",
)
def no_installs_at_run_time(documents: list[Document]) -> Iterator[Finding]:
    do = "put it into the image"
    for document, path, job in jobs(documents):
        environment = yaml.safe_load(job.get("runtimeEnvYAML") or "") or {}
        for installer in _INSTALLERS:
            if installer in environment:
                where = f"{path}.runtimeEnvYAML"
                yield Finding(subject(document), where, f"has {installer}", do)
        if _INSTALL.search(job.get("entrypoint", "")):
            yield Finding(subject(document), f"{path}.entrypoint", "installs packages", do)
    for cluster in clusters(documents):
        for each in applications(cluster):
            for installer in sorted({*_INSTALLERS, "working_dir", "py_modules"}):
                if installer in (each.get("runtime_env") or {}):
                    path, wrong = "spec.serveConfigV2", f"runtime_env has {installer}"
                    yield Finding(subject(cluster.document), path, wrong, do)
    for pod in pods(documents):
        for container in pod.containers:
            words = [*(container.spec.get("command") or ()), *(container.spec.get("args") or ())]
            if _INSTALL.search(" ".join(words)):
                yield Finding(subject(pod.document), container.path, "installs packages", do)


@lint("rule 10", "RayCluster <= 53 characters, RayJob <= 47; letters, digits, dashes")
def names_fit(documents: list[Document]) -> Iterator[Finding]:
    for document in documents:
        longest = _LONGEST.get(document.get("kind", ""))
        name = str(dig(document, "metadata.name", ""))
        if longest and len(name) > longest:
            wrong = f"{len(name)} characters, {longest} are allowed"
            yield Finding(subject(document), "metadata.name", wrong, "shorten it")
        elif longest and not _DNS_LABEL.fullmatch(name):
            do = "start with a letter; lower case letters, digits and dashes only"
            yield Finding(subject(document), "metadata.name", "is no DNS label", do)


@lint("rule 10", "token authentication needs Ray >= 2.52")
def token_auth_needs_its_ray(documents: list[Document]) -> Iterator[Finding]:
    for cluster in clusters(documents):
        version = str(cluster.spec.get("rayVersion") or "0")
        numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:3])
        if dig(cluster.spec, "authOptions.mode") == "token" and numbers < _TOKENS_SINCE:
            wrong = f"Ray {version} knows no tokens: the operator refuses the cluster"
            yield cluster.finding("rayVersion", wrong, "take Ray 2.52 or newer")


def _images(documents: list[Document]) -> Iterator[tuple[Document, str, str]]:
    for pod in pods(documents):
        for container in pod.containers:
            yield pod.document, f"{container.path}.image", str(container.spec.get("image", ""))
    for cluster in clusters(documents):
        image = dig(cluster.spec, "autoscalerOptions.image")
        if image:  # without one, the autoscaler runs the head's
            yield cluster.document, f"{cluster.path}.autoscalerOptions.image", image


def _tag(image: str) -> str:
    """The tag of registry:5000/name:tag@digest."""
    return image.partition("@")[0].rpartition("/")[2].partition(":")[2]
