"""A job's connection to Ray: a private cluster on loopback, or one line on why not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.system, pytest.mark.timeout(900)]
REPOSITORY = Path(__file__).parents[2]


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a fresh process: Ray reads its environment once."""
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_a_private_cluster_is_on_loopback_and_ends_with_the_block() -> None:
    done = python(
        "import os, warnings\n"
        "from pipeline.cluster import connect\n"
        "from pipeline.config import RayConfig\n"
        "with connect(RayConfig(object_store_mib=100)) as ray:\n"
        "    with connect(RayConfig()) as inner:\n"
        "        assert inner is ray and ray.is_initialized()\n"
        "    assert ray.is_initialized()\n"
        "    print(ray.nodes()[0]['NodeManagerAddress'], int(ray.cluster_resources()['CPU']))\n"
        "    def nice():\n"
        "        import pipeline\n"
        "        return os.nice(0)\n"
        "    print(ray.get(ray.remote(nice).remote()) - os.nice(0))\n"
        "print(ray.is_initialized())\n"
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    address, cpus = lines[0].split()
    assert address == "127.0.0.1"
    assert int(cpus) >= 4
    assert lines[1:] == ["0", "False"]
    assert done.stderr == ""


def test_an_address_where_nothing_listens_is_one_line() -> None:
    done = python(
        "from pipeline.cluster import connect\n"
        "from pipeline.config import RayConfig\n"
        "from pipeline.errors import run\n"
        "def main():\n"
        "    with connect(RayConfig(address='127.0.0.1:9')): pass\n"
        "run(main)\n"
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: cannot reach Ray at 127.0.0.1:9: ")
    assert len(done.stderr.splitlines()) == 1
