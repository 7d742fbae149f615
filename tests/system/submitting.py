"""Jobs on a cluster of three nodes, through `ray job submit` and its dashboard, by a token."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO

from tests.system.raylets import REPOSITORY, Raylets

RAY = str(Path(sys.executable).with_name("ray"))


def environment(store: Mapping[str, str]) -> dict[str, str]:
    """The cluster's: `python` is ours, the code is what a job brings."""
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PATH": path}
    return {**{k: v for k, v in os.environ.items() if k != "PYTHONPATH"}, **store, **quiet}


class Client:
    """The laptop of one who submits."""

    def __init__(self, cluster: Raylets, **environment: str) -> None:
        self.environment = {
            **{k: v for k, v in cluster.environment.items() if not k.startswith("AWS_")},
            "RAY_API_SERVER_ADDRESS": f"http://{cluster.dashboard}",
            **environment,
        }
        del self.environment["RAY_ADDRESS"]

    def ray_job(self, *words: str) -> tuple[int, str]:
        done = subprocess.run(
            [RAY, "job", *words],
            env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            cwd=REPOSITORY, timeout=300,
        )  # fmt: skip
        return done.returncode, done.stdout

    def submit(self, command: Iterable[str], **variables: str) -> Submitted:
        """`command` (python jobs/...) with environment `variables` of its own."""
        return Submitted(self, list(command), variables)


class Submitted:
    """A submitted job, as its client's terminal shows it."""

    def __init__(self, client: Client, command: list[str], variables: dict[str, str]) -> None:
        self.client = client
        runtime = ["--runtime-env-json", json.dumps({"env_vars": variables})] if variables else []
        self.process = subprocess.Popen(
            [RAY, "job", "submit", "--working-dir", ".", *runtime, "--", *command],
            env=client.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            cwd=REPOSITORY,
        )  # fmt: skip
        self.said = ""
        self.id = self.wait_for(r"Job '(\w+)' submitted successfully")

    def wait_for(self, pattern: str) -> str:
        """Read on until a line has `pattern`: its first group."""
        for line in self._lines():
            if found := re.search(pattern, line):
                return found[1] if found.groups() else found[0]
        raise AssertionError(f"{pattern} was never said:\n{self.said}")

    def finish(self) -> tuple[int, str]:
        for _ in self._lines():
            pass
        return self.process.wait(60), self.said

    def interrupt(self) -> tuple[int, str]:
        """Ctrl-C at the client."""
        self.process.send_signal(signal.SIGINT)
        return self.finish()

    def status(self) -> str:
        _, said = self.client.ray_job("status", self.id)
        found = re.search(r"PENDING|RUNNING|STOPPED|SUCCEEDED|FAILED", plain(said).upper())
        return found[0] if found else said

    def logs(self) -> str:
        return self.client.ray_job("logs", self.id)[1]

    def stop(self) -> float:
        """`ray job stop`, to its end; how many seconds it took."""
        began = time.monotonic()
        code, said = self.client.ray_job("stop", self.id)
        assert code == 0, said
        return time.monotonic() - began

    def _lines(self) -> Iterable[str]:
        pipe: IO[str] | None = self.process.stdout
        assert pipe is not None
        for raw in pipe:
            line = plain(raw)
            self.said += line
            yield line


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)
