"""Overlays are found and rendered, YAML is read as Kubernetes reads it; the exit codes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from infra.checks import render
from pipeline.errors import UserError

REPOSITORY = render.INFRA.parent
Rendered = Callable[[str], list[render.Document]]

KUSTOMIZATION = "resources: [objects.yaml]\n"
CONFIG_MAP = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: notes}\n"


def overlay(folder: Path, objects: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "kustomization.yaml").write_text(KUSTOMIZATION)
    (folder / "objects.yaml").write_text(objects)
    return folder


def checks(*arguments: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    """`python -m infra.checks`, as one types it; `path` instead of this machine's PATH."""
    environment = {"PATH": path} if path is not None else None
    return subprocess.run(
        [sys.executable, "-m", "infra.checks", *arguments],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
    )


def test_a_key_given_twice_is_refused() -> None:
    with pytest.raises(UserError, match=r"notes\.yaml:3: key 'name' is given twice"):
        render.load("metadata:\n  name: a\n  name: b\n", "notes.yaml")


def test_a_key_given_twice_inside_a_list_is_refused() -> None:
    with pytest.raises(UserError, match="key 'a' is given twice"):
        render.load("items: [{a: 1, a: 2}]", "notes.yaml")


def test_merged_keys_may_be_given_again() -> None:
    text = "one: &one {a: 1, b: 2}\ntwo: {<<: *one, a: 3}\n"
    assert render.load(text, "notes.yaml")[0]["two"] == {"a": 3, "b": 2}


def test_dates_stay_strings() -> None:
    assert render.load("day: 2026-01-01", "notes.yaml") == [{"day": "2026-01-01"}]


@pytest.mark.parametrize(
    ("text", "problem"), [("a: [", r"notes\.yaml:1: "), ("- a", "no mapping"), ("a: b: c", ":1: ")]
)
def test_what_is_no_object_is_refused(text: str, problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        render.load(text, "notes.yaml")


def test_every_yaml_of_infra_has_each_key_once() -> None:
    sources = list(render.sources())
    assert len(sources) > 20
    for source in sources:
        render.parse(source.read_text(), str(source))


def test_without_names_every_overlay_is_meant() -> None:
    names = [folder.name for folder in render.overlays([])]
    assert names == sorted(names)
    assert {"dev", "ci", "prod"} <= set(names)


def test_an_overlay_is_named_or_pointed_at(tmp_path: Path) -> None:
    elsewhere = overlay(tmp_path / "mine", CONFIG_MAP)
    assert render.overlays(["prod", str(elsewhere)]) == [render.OVERLAYS / "prod", elsewhere]
    with pytest.raises(UserError, match="nowhere: no such overlay"):
        render.overlays(["nowhere"])


@pytest.mark.parametrize("name", ["dev", "ci", "prod"])
def test_what_is_rendered_are_objects_each_once(name: str, rendered: Rendered) -> None:
    documents = rendered(name)
    keys = [
        (document["kind"], metadata.get("namespace"), metadata["name"])
        for document in documents
        for metadata in [document["metadata"]]
    ]
    assert len(keys) == len(set(keys)) > 10


@pytest.mark.usefixtures("rendered")
def test_exit_0_without_findings(tmp_path: Path) -> None:
    done = checks(str(overlay(tmp_path / "mine", CONFIG_MAP)))
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr == "mine: 1 objects, 0 findings\n"


@pytest.mark.usefixtures("rendered")
def test_exit_1_and_a_line_for_each_finding(tmp_path: Path) -> None:
    secret = CONFIG_MAP.replace("ConfigMap", "Secret") + "data: {key: aXQ=}\n"
    done = checks(str(overlay(tmp_path / "mine", secret)))
    assert done.returncode == 1
    assert done.stdout == (
        "mine: Secret/notes: data: lies in git; "
        "make it in the cluster (infra/README.md) [no-secrets-in-git]\n"
    )


@pytest.mark.usefixtures("rendered")
def test_lints_wait_for_the_schemas(tmp_path: Path) -> None:
    """They read fields by the types that schemas promise: no traceback where these are broken."""
    job = "apiVersion: ray.io/v1\nkind: RayJob\nmetadata: {name: a}\nspec: {rayClusterSpec: [7]}\n"
    done = checks(str(overlay(tmp_path / "mine", job)))
    assert done.returncode == 1
    assert done.stdout.startswith("mine: RayJob/a: spec.rayClusterSpec: [7] is not of type")
    assert done.stderr == "mine: 1 objects, 1 findings\n"


@pytest.mark.usefixtures("rendered")
def test_exit_2_where_kustomize_refuses(tmp_path: Path) -> None:
    folder = overlay(tmp_path / "mine", CONFIG_MAP)
    (folder / "objects.yaml").unlink()
    done = checks(str(folder))
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {folder}: kustomize refuses it: ")
    assert done.stderr.count("\n") == 1


def test_exit_2_for_an_unknown_overlay() -> None:
    done = checks("nowhere")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: nowhere: no such overlay;")


def test_exit_2_where_nothing_renders(tmp_path: Path) -> None:
    done = checks(path=str(tmp_path))
    assert done.returncode == 2
    assert done.stderr == (
        "error: neither kustomize nor kubectl is installed; "
        "infra/checks/kustomize.sh fetches the former\n"
    )


def test_kubectl_renders_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`kubectl kustomize FOLDER` where kustomize is absent."""
    kubectl = tmp_path / "kubectl"
    kubectl.write_text('#!/bin/sh\n[ "$1" = kustomize ] && cat "$2/objects.yaml"\n')
    kubectl.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    if Path("/bin/kustomize").exists():
        pytest.skip("kustomize lies in /bin, where it cannot be hidden")
    assert render.render(overlay(tmp_path / "mine", CONFIG_MAP)) == render.load(CONFIG_MAP, "")


def test_the_lints_are_listed() -> None:
    done = checks("--list")
    assert done.returncode == 0
    assert "token-auth: authOptions.mode: token on every cluster (CVE-2023-48022)" in done.stdout
