"""Who listens where: both jobs on this machine, from their first second to their last."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from ipaddress import IPv6Address, ip_address
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from tests.sealed import write_features
from tests.system import training
from tests.system.curating import REPOSITORY, Job
from tests.system.waiting import until

pytestmark = [pytest.mark.system, pytest.mark.timeout(1200)]


class Listener(NamedTuple):
    """A socket that waits for anybody, and the process that it belongs to."""

    process: str
    address: str
    port: int

    @property
    def loopback(self) -> bool:
        address = ip_address(self.address)
        if isinstance(address, IPv6Address):  # ::ffff:127.0.0.1 is 127.0.0.1
            return address.is_loopback or bool(
                address.ipv4_mapped and address.ipv4_mapped.is_loopback
            )
        return address.is_loopback


class Watch:
    """Notes where all that is started with its `environment` listens, until the block ends."""

    def __init__(self, environment: dict[str, str]) -> None:
        mark = uuid.uuid4().hex
        self.environment = {**environment, "SSR_TEST": mark}
        self.environment.pop("RAY_ADDRESS", None)
        self.seen: set[Listener] = set()
        self._mark, self._end = f"SSR_TEST={mark}".encode(), threading.Event()
        self._ours: dict[int, str] = {}

    def __enter__(self) -> Watch:
        self._executor = ThreadPoolExecutor(1)
        self._watching = self._executor.submit(self._watch)
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._executor.shutdown()
        self._watching.result()

    def outside(self) -> list[Listener]:
        return [one for one in self.seen if not one.loopback]

    def has(self, word: str) -> bool:
        return any(word in one.process for one in self.seen)

    def _watch(self) -> None:
        while not self._end.wait(0.3):
            for one in psutil.net_connections("inet"):
                waits = one.status == psutil.CONN_LISTEN or one.type == socket.SOCK_DGRAM
                if waits and one.laddr and not one.raddr and one.pid:
                    name = self._name(one.pid)
                    if name:
                        self.seen.add(Listener(name, one.laddr.ip, one.laddr.port))

    def _name(self, pid: int) -> str:
        """The process's name; "" for a stranger. Ours are known by their environment, or by their
        parent's: Ray's workers write their titles over theirs.
        """
        with contextlib.suppress(psutil.Error, OSError):
            process = psutil.Process(pid)
            marked = self._mark in Path(f"/proc/{pid}/environ").read_bytes()
            if pid not in self._ours and (marked or self._name(process.ppid())):
                self._ours[pid] = " ".join(process.cmdline()).strip()
        return self._ours.get(pid, "")


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


def test_a_curation_here_listens_on_loopback_only(tiny_models: Path, tmp_path: Path) -> None:
    job = Job(tiny_models)
    job.settings |= {"--website.rows": 80, "--filter.unit_rows": 16}
    with Watch(job.environment) as watch:
        job.environment = watch.environment
        code, said = job.run(str(tmp_path))
    assert code == 0, said
    assert watch.outside() == []
    for word in ("jobs/curate.py", "gcs_server", "raylet", "ray::", "miniworld.website"):
        assert watch.has(word), f"{word} was not seen to listen"
    assert_no_dashboard(watch)


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


def assert_no_dashboard(watch: Watch) -> None:
    """Ray's process of that name is there (it keeps the cluster's books), its web server is not:
    what of it listens is its own metrics.
    """
    assert 8265 not in [one.port for one in watch.seen if "dashboard/dashboard.py" in one.process]


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
