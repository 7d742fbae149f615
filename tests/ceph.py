"""A real S3 server: one node of Ceph, by a script (CEPH_RGW, see CONTRIBUTING.md)."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ports import free_ports

SCRIPT = Path(
    os.environ.get("CEPH_RGW", Path(__file__).parents[2] / "shared" / "tools" / "ceph-rgw")
)
TOOLS = ("ceph", "ceph-mon", "ceph-osd", "radosgw", "radosgw-admin", "curl")
TRIES = 3
PATIENCE_S = 180
"""It comes up in 20 s. With a part missing the script waits for a quarter of an hour."""


def missing() -> str:
    """Why there is no Ceph gateway here, or nothing."""
    if not SCRIPT.is_file():
        return "no ceph-rgw script (set CEPH_RGW to one)"
    tools = [tool for tool in TOOLS if shutil.which(tool) is None]
    return f"Ceph is not installed: {', '.join(tools)} missing" if tools else ""


class Ceph:
    """A cluster that runs: its address, its owner's keys, and `admin`, which makes users."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        port = free_ports(2)[0]  # the gateway's, and the next is the monitor's
        self.url = f"http://127.0.0.1:{port}"
        self.environment = {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "testkey",
            "AWS_SECRET_ACCESS_KEY": "testsecret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        start = subprocess.Popen(
            ["bash", SCRIPT, "up", folder, str(port)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            said = start.communicate(timeout=PATIENCE_S)[1]
            if start.returncode != 0:
                raise RuntimeError(f"{said}\n{self.log()}")
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(start.pid, signal.SIGKILL)
            start.communicate()
            with contextlib.suppress(RuntimeError, subprocess.TimeoutExpired):
                self.end()
            raise

    def admin(self, *words: str) -> None:
        start = ["radosgw-admin", "-c", f"{self.folder}/ceph.conf", "-n", "client.rgw"]
        subprocess.run([*start, *words], check=True, capture_output=True, timeout=PATIENCE_S)

    def log(self) -> str:
        with contextlib.suppress(OSError):
            return (self.folder / "log" / "up.log").read_text()[-2000:]
        return ""

    def end(self) -> None:
        """The script gives up where a daemon ends while it looks at it: it is asked again then."""
        for _ in range(TRIES):
            done = subprocess.run(["bash", SCRIPT, "down", self.folder], timeout=PATIENCE_S)
            if done.returncode == 0:
                return
        raise RuntimeError(f"the Ceph in {self.folder} does not end")


@contextlib.contextmanager
def ceph() -> Iterator[Ceph]:
    """A fresh cluster, or the test is skipped. One that does not come up is given up and made anew:
    its daemons' own ports can be taken by a neighbour.
    """
    if why := missing():
        pytest.skip(why)
    with tempfile.TemporaryDirectory(
        prefix="ceph-", dir="/tmp", ignore_cleanup_errors=True
    ) as above:  # short, for sockets
        for attempt in range(TRIES):
            try:
                cluster = Ceph(Path(above, str(attempt)))
                break
            except (RuntimeError, subprocess.TimeoutExpired):
                if attempt == TRIES - 1:
                    raise
        try:
            yield cluster
        finally:
            cluster.end()
