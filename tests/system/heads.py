"""The head of a Ray cluster by `ray start`, in a folder of its own, and the end of all that runs in
such a folder.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

REPOSITORY = Path(__file__).resolve().parents[2]
TRIES = 3
"""Ray gives a node half a minute to come up, which a busy machine may miss."""
PATIENT = {"RAY_gcs_server_port_wait_time_s": "120", "RAY_JOB_STOP_WAIT_TIME_S": "120"}
"""The same for a head's own server, and for a job between `ray job stop` and the kill. Not for
clients: they would ask so long where there is no server.
"""


def start_head(words: Sequence[str], environment: Mapping[str, str], folder: str | Path) -> None:
    """`ray start --head` with more `words`; `environment` names `folder` as HOME and RAY_TMPDIR."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", *words]
    said = ""
    for _ in range(TRIES):
        try:
            done = subprocess.run(
                command, env={**environment, **PATIENT}, cwd=REPOSITORY, text=True, timeout=300,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            said = str(error)
        else:
            if done.returncode == 0:
                return
            said = done.stdout
        end(folder)
    raise RuntimeError(f"the head did not start: {said}"[-3000:])


def end(folder: str | Path) -> None:
    """kill -9 everything that runs in a cluster's folder. `ray stop` would end the clusters of
    others too.
    """
    until = time.monotonic() + 30
    while (
        ours := [process for process in psutil.process_iter() if _runs_in(process, str(folder))]
    ) and (time.monotonic() < until):
        for process in ours:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        time.sleep(0.2)


def _runs_in(process: psutil.Process, folder: str) -> bool:
    """By its environment as it lies in memory: Ray's processes write their titles into it."""
    with contextlib.suppress(psutil.Error, OSError):
        given = Path(f"/proc/{process.pid}/environ").read_bytes()
        return process.status() != psutil.STATUS_ZOMBIE and folder.encode() in given
    return False
