"""Ray's logs leave the pods: the sidecar fits in, and makes of a line what it says."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest
import yaml

from infra.checks import lints, render, schema
from infra.checks.objects import groups

COMPONENTS = render.INFRA / "components"
CONFIG = yaml.safe_load((COMPONENTS / "log-shipping/ray.yaml").read_text())
REMAP = CONFIG["transforms"]["event"]["source"]


@pytest.fixture(
    scope="module",
    params=[("prod", "log-shipping"), ("prod", "log-shipping-s3"), ("dev", "log-shipping")],
    ids="-".join,
)
def shipped(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[render.Document]:
    """An example site with the component."""
    name, component = request.param
    if not render.renderer_found():
        pytest.skip("neither kustomize nor kubectl is installed (infra/checks/kustomize.sh DIR)")
    folder = tmp_path_factory.mktemp("infra") / "infra"
    shutil.copytree(render.INFRA, folder, ignore=shutil.ignore_patterns("checks", "__pycache__"))
    site = folder / "overlays" / name / "kustomization.yaml"
    settings = yaml.safe_load(site.read_text())
    settings["components"].append("../../components/log-shipping")
    if component != "log-shipping":
        settings["components"].append(f"../../components/{component}")
    site.write_text(yaml.safe_dump(settings, sort_keys=False))
    return render.render(site.parent)


def test_every_ray_node_has_the_sidecar_and_nothing_is_wrong(
    shipped: list[render.Document],
) -> None:
    found = list(schema.check(shipped))
    assert found + [one for lint in lints.LINTS.values() for one in lint(shipped)] == []
    config = next(d for d in shipped if d["metadata"]["name"].startswith("ssr-log-shipping"))
    assert config["data"].keys() == {"ray.yaml", "sink.yaml"}
    kinds = {group.cluster.document["kind"] for group in groups(shipped)}
    assert kinds in ({"RayJob", "RayService"}, {"RayCluster"})
    for group in groups(shipped):
        where, pod = group.path, group.pod.spec
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
        (
            "WARNING 2026-11-28 18:14:21,833 ssr_drawer p0x 8f3c -- a device failed",
            "WARNING",
            "18:14:21.833",
        ),
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


def test_a_line_of_the_service_is_as_the_installed_ray_writes_it() -> None:
    vrl = pytest.importorskip("vrl_python", reason="Vector's language; pip install vrl-python")
    from ray.serve._private.logging_utils import ServeFormatter

    record = logging.LogRecord("ray.serve", logging.ERROR, "replica.py", 1, "no model", None, None)
    said = ServeFormatter("ssr_drawer", "p0x").format(record)
    event = {"message": said, "timestamp": "read", "file": "/tmp/ray/session_2/logs/serve/a.log"}
    made = vrl.VRLRuntime.run(REMAP, event, "UTC").processed_event
    assert made["level"] == "ERROR" and made["timestamp"] != "read", said


def test_the_remap_is_the_language_of_vector() -> None:
    vrl = pytest.importorskip("vrl_python", reason="Vector's language; pip install vrl-python")
    assert vrl.VRLRuntime.check_syntax(REMAP) is None
    assert vrl.VRLRuntime.check_syntax(REMAP.replace("string!(.message)", "string(.message)"))


def test_the_files_that_ray_writes_are_read(tmp_path: Path) -> None:
    (source,) = CONFIG["sources"].values()
    logs = tmp_path / "tmp/ray/session_2026-11-28_18-14-12_520807_25392/logs"
    logs.mkdir(parents=True)
    (logs / "serve").mkdir()
    wanted = {
        "raylet.out", "monitor.log", "job-driver-curate.log", "worker-0-01-9.err",
        "serve/replica_ssr_drawer_p0x.log",
    }  # fmt: skip
    for name in (*wanted, "python-core-driver-01_9.log", "debug_state.txt"):
        (logs / name).touch()
    globs = {
        way: [tmp_path.glob(g.lstrip("/")) for g in source[way]] for way in ("include", "exclude")
    }
    read, left = (
        {str(path.relative_to(logs)) for found in globs[way] for path in found} for way in globs
    )
    assert read - left == wanted
