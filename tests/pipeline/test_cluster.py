"""What can be said of the cluster's settings without starting one (tests/system does that)."""

import os
from pathlib import Path

import pytest

from pipeline.cluster import _runtime_env, cores, found, memory_gib


def test_the_machine_is_described() -> None:
    assert 1 <= cores() <= (os.cpu_count() or 1)
    assert memory_gib() > 0.1
    assert found().startswith(f"found {cores()} cores, ")


def test_workers_find_the_packages_uninstalled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    paths = _runtime_env()["env_vars"]["PYTHONPATH"].split(os.pathsep)
    assert (Path(paths[0]) / "pipeline" / "cluster.py").is_file()
    assert paths[1:] == ["/elsewhere"]


def test_a_submitted_job_brings_its_own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert _runtime_env() == {}
