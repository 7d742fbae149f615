"""Ray's logs leave the pods: the sidecar fits in, and makes of a line what it says."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from infra.checks import lints, render, schema

COMPONENTS = render.INFRA / "components"
CONFIG = yaml.safe_load((COMPONENTS / "log-shipping/ray.yaml").read_text())
REMAP = CONFIG["transforms"]["event"]["source"]


@pytest.fixture(scope="module", params=["log-shipping", "log-shipping-s3"])
def shipped(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[render.Document]:
    """The example site with the component."""
    if not render.renderer_found():
        pytest.skip("neither kustomize nor kubectl is installed (infra/checks/kustomize.sh DIR)")
    folder = tmp_path_factory.mktemp("infra") / "infra"
    shutil.copytree(render.INFRA, folder, ignore=shutil.ignore_patterns("checks", "__pycache__"))
    site = folder / "overlays/prod/kustomization.yaml"
    settings = yaml.safe_load(site.read_text())
    settings["components"].append("../../components/log-shipping")
    if request.param != "log-shipping":
        settings["components"].append(f"../../components/{request.param}")
    site.write_text(yaml.safe_dump(settings, sort_keys=False))
    return render.render(site.parent)


def groups(documents: list[render.Document]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(job and group, pod spec) of every Ray node."""
    for job in (document for document in documents if document["kind"] == "RayJob"):
        spec = job["spec"]["rayClusterSpec"]
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
            where = f"{job['metadata']['name']}/{group.get('groupName', 'head')}"
            yield where, group["template"]["spec"]


def test_every_ray_node_has_the_sidecar_and_nothing_is_wrong(
    shipped: list[render.Document],
) -> None:
    found = list(schema.check(shipped))
    assert found + [one for lint in lints.LINTS.values() for one in lint(shipped)] == []
    config = next(d for d in shipped if d["metadata"]["name"].startswith("ssr-log-shipping"))
    assert config["data"].keys() == {"ray.yaml", "sink.yaml"}
    for where, pod in groups(shipped):
        (sidecar,) = pod["initContainers"]
        assert sidecar["restartPolicy"] == "Always" and "@sha256:" in sidecar["image"], where
        mounted = {
            mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]
        }
        read = {mount["name"]: mount["mountPath"] for mount in sidecar["volumeMounts"]}
        assert mounted["ray-logs"] == read["ray-logs"] == "/tmp/ray", where
        assert {"models"} < mounted.keys() and pod["containers"][0]["image"], f"{where}: Ray's own"
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert volumes["log-shipping"]["configMap"]["name"] == config["metadata"]["name"], where


def test_what_is_read_is_what_is_sent(shipped: list[render.Document]) -> None:
    config = next(d for d in shipped if d["metadata"]["name"].startswith("ssr-log-shipping"))
    (sink,) = yaml.safe_load(config["data"]["sink.yaml"])["sinks"].values()
    assert sink["inputs"] == list(CONFIG["transforms"])
    assert CONFIG["transforms"]["event"]["inputs"] == list(CONFIG["sources"])
    assert not [name for name in sink if "key" in name and name != "key_prefix"], "no credentials"


@pytest.mark.parametrize(
    ("message", "level", "moment"),
    [
        ("[2026-11-28 18:14:24,414 I 26033 26033] (raylet) main.cc: x", "INFO", "18:14:24.414"),
        ("2026-11-28 18:14:21,833\tWARNING monitor.py:730 -- y", "WARNING", "18:14:21.833"),
        ("Traceback (most recent call last):\n  File x", "ERROR", None),
        ("error: s3://b is out of reach", "ERROR", None),
        ("warning: training was interrupted", "WARNING", None),
        ("images: 5/20 in 0:05", None, None),
    ],
)
def test_a_line_keeps_its_time_and_level(
    message: str, level: str | None, moment: str | None
) -> None:
    vrl = pytest.importorskip("vrl_python", reason="Vector's language; pip install vrl-python")
    event = {"message": message, "timestamp": "read", "file": "/tmp/ray/session_2026/logs/a/b.out"}
    made = vrl.VRLRuntime.run(REMAP, event, "UTC").processed_event
    assert made["message"] == message and made["log"] == "a/b.out"
    assert made.get("level") == level
    assert moment is None or moment in str(made["timestamp"])
    assert moment is not None or made["timestamp"] == "read"


def test_the_remap_is_the_language_of_vector() -> None:
    vrl = pytest.importorskip("vrl_python", reason="Vector's language; pip install vrl-python")
    assert vrl.VRLRuntime.check_syntax(REMAP) is None
    assert vrl.VRLRuntime.check_syntax(REMAP.replace("string!(.message)", "string(.message)"))


def test_the_files_that_ray_writes_are_read(tmp_path: Path) -> None:
    (source,) = CONFIG["sources"].values()
    logs = tmp_path / "tmp/ray/session_2026-11-28_18-14-12_520807_25392/logs"
    logs.mkdir(parents=True)
    wanted = {"raylet.out", "monitor.log", "job-driver-curate.log", "worker-0-01-9.err"}
    for name in (*wanted, "python-core-driver-01_9.log", "debug_state.txt"):
        (logs / name).touch()
    globs = {
        way: [tmp_path.glob(g.lstrip("/")) for g in source[way]] for way in ("include", "exclude")
    }
    read = {path.name for found in globs["include"] for path in found}
    assert read - {path.name for found in globs["exclude"] for path in found} == wanted
