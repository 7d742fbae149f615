"""Who listens where: a training on this machine, from its first second to its last (a curation:
test_curate.py).
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.sealed import write_features
from tests.system import training
from tests.system.curating import REPOSITORY
from tests.system.listening import Watch, assert_no_dashboard
from tests.system.waiting import until

pytestmark = [pytest.mark.system, pytest.mark.timeout(1200)]


@pytest.fixture
def in_a_container(tmp_path: Path) -> list[str]:
    """Words before a command for which the machine's name leads to its outer address, as in
    containers; libraries that look for an address of their own find that one.
    """
    outer = [
        address.address
        for addresses in psutil.net_if_addrs().values()
        for address in addresses
        if address.family == socket.AF_INET and not address.address.startswith("127.")
    ]
    if not outer:
        pytest.skip("this machine has no address but loopback")
    hosts = tmp_path / "hosts"
    hosts.write_text(f"127.0.0.1 localhost\n{outer[0]} elsewhere\n")
    script = 'mount --bind "$0" /etc/hosts && hostname elsewhere && exec "$@"'
    words = ["unshare", "--mount", "--uts", "sh", "-c", script, str(hosts)]
    if shutil.which("unshare") is None or subprocess.run([*words, "true"], check=False).returncode:
        return []  # it takes root
    return words


def test_a_training_here_listens_on_loopback_only(
    tiny_models: Path, tmp_path: Path, in_a_container: list[str]
) -> None:
    write_features(tmp_path, tiny_models)
    few = {"semantic.steps": 8, "multi_scale.steps": 0, "validate_steps": 4}
    with Watch(training.environment()) as watch:
        done = subprocess.run(
            [*in_a_container, *training.command(tmp_path, tiny_models, 2, **few)],
            cwd=REPOSITORY, env=watch.environment, capture_output=True, text=True, timeout=600,
        )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert watch.outside() == []
    for word in ("jobs/train.py", "gcs_server", "raylet", "ray::"):
        assert watch.has(word), f"{word} was not seen to listen"
    assert_no_dashboard(watch)


def test_the_watch_sees_what_listens_outside() -> None:
    code = (
        "import socket, time; s = socket.create_server(('0.0.0.0', 0)); print(1); time.sleep(600)"
    )
    with Watch(dict(os.environ)) as watch:
        shell = ["sh", "-c", f'"{sys.executable}" -uc "$0"; true', code]
        process = subprocess.Popen(
            shell, env=watch.environment, stdout=subprocess.PIPE, start_new_session=True
        )
        until(watch.outside)
        os.killpg(process.pid, 9)
        process.communicate()
    assert [one.address for one in watch.outside()] == ["0.0.0.0"]
