"""What can be said of the cluster's settings without starting one (tests/system does that)."""

import os
from pathlib import Path

import pytest

from pipeline.cluster import _check_room, _runtime_env, cores, found, memory_gib
from pipeline.config import StageResources
from pipeline.errors import UserError


def test_the_machine_is_described() -> None:
    assert 1 <= cores() <= (os.cpu_count() or 1)
    assert memory_gib() > 0.1
    assert found().startswith(f"found {cores()} cores, ")


def test_a_worker_without_room_is_refused_on_a_cluster_of_our_own(
    capsys: pytest.CaptureFixture[str],
) -> None:
    there, workers = {"CPU": 4.0}, [StageResources(cpus=2), StageResources(cpus=1, gpus=1)]
    with pytest.raises(UserError, match="takes 1 GPUs, and the cluster has 0"):
        _check_room(there, workers, own=True)
    with pytest.raises(UserError, match="takes 6 CPUs, and the cluster has 4"):
        _check_room(there, [StageResources(cpus=6)], own=True)
    _check_room(there, workers[:1], own=True)
    assert capsys.readouterr().out == ""
    _check_room(there, workers, own=False)
    assert "autoscaler" in capsys.readouterr().out


def test_workers_find_the_packages_uninstalled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    paths = _runtime_env()["env_vars"]["PYTHONPATH"].split(os.pathsep)
    assert (Path(paths[0]) / "pipeline" / "cluster.py").is_file()
    assert paths[1:] == ["/elsewhere"]


def test_a_submitted_job_brings_its_own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert _runtime_env() == {}
