"""Both jobs by `ray job submit` on a cluster of three nodes, with a token and an S3 store: what
comes out is what comes out of the same commands on this machine, whoever is stopped or killed.
"""

from __future__ import annotations

import contextlib
import json
import random
import re
import secrets
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import psutil
import pytest
import torch
from safetensors.torch import load

from pipeline import lease
from pipeline.storage import Storage
from pipeline.units import Ledger
from tests.system import training
from tests.system.curating import Job, shards
from tests.system.raylets import REPOSITORY, Raylets, raylets
from tests.system.submitting import Client, Submitted, environment, plain

pytestmark = [pytest.mark.system, pytest.mark.timeout(1500)]
STEPS = {"semantic.steps": 24, "multi_scale.steps": 24, "validate_steps": 12}


@pytest.fixture(scope="module")
def token() -> str:
    return secrets.token_hex(32)


@pytest.fixture(scope="module")
def cluster(s3_server: dict[str, str], token: str) -> Iterator[Raylets]:
    with raylets(environment(s3_server), token) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def client(cluster: Raylets) -> Client:
    return Client(cluster)


class Commands:
    """The two commands of a run, alike wherever they run."""

    def __init__(self, models: Path) -> None:
        self.models, self.job = models, Job(models)
        self.job.settings |= {"--website.rows": 200}

    def curate(self, root: str, **more: Any) -> list[str]:
        settings = {**self.job.settings, **{f"--{key}": value for key, value in more.items()}}
        words = [str(word) for pair in settings.items() for word in pair]
        return ["python", "jobs/curate.py", "--root", root, *words]

    def train(self, root: str) -> list[str]:
        return ["python", *training.command(root, self.models, 2, **STEPS)[1:]]


@pytest.fixture(scope="module")
def commands(tiny_models: Path) -> Commands:
    return Commands(tiny_models)


@pytest.fixture(scope="module")
def here(commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> Storage:
    """Without submit: the same scripts start a Ray of their own."""
    root = str(tmp_path_factory.mktemp("here"))
    alone = {k: v for k, v in training.environment().items() if k != "RAY_ADDRESS"}
    for command in (commands.curate(root), commands.train(root)):
        done = subprocess.run(
            [sys.executable, *command[1:]],
            cwd=REPOSITORY, env=alone, capture_output=True, text=True, timeout=900,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
    return Storage(root)


def model(storage: Storage) -> dict[str, torch.Tensor]:
    return load(storage.read_bytes("model/model.safetensors"))


def assert_same(ours: Storage, theirs: Storage) -> None:
    assert shards(ours) == shards(theirs)
    one, other = model(ours), model(theirs)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def wait(reached: Callable[[], Any], seconds: float = 400) -> None:
    until = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < until, "it did not come to it"
        time.sleep(0.1)


@pytest.mark.long
def test_both_jobs_say_what_they_do_and_leave_what_they_leave_here(
    client: Client, commands: Commands, here: Storage, bucket: str
) -> None:
    """On a Ceph gateway the jobs run in test_policies.py."""
    root = f"{bucket}/calm"
    code, said = client.submit(commands.curate(root)).finish()
    assert code == 0, said
    assert "filter:   kept" in said and re.search(r"images: (\d+)/\1 in", said), said
    assert f"features: {root}/features" in said, said
    assert f"next:     python jobs/train.py --root {root}" in said, said
    code, said = client.submit(commands.train(root)).finish()
    assert code == 0, said
    assert "training: 2 CPU workers" in said and "multi_scale: 24/24" in said, said
    assert f"model:    {root}/model" in said and "next:     python jobs/generate.py" in said, said
    assert "Traceback" not in said and "testsecret" not in said
    assert_same(Storage(root), here)


def test_a_stopped_curation_goes_on_where_it_was_and_a_training_without_a_node(
    cluster: Raylets, client: Client, commands: Commands, here: Storage, bucket: str
) -> None:
    root = f"{bucket}/disturbed"
    storage = Storage(root)
    kept = stop_curation(cluster, client, commands, root)
    assert_curated(client.submit(commands.curate(root)), storage, kept, here)
    code, said = train_without_a_node(cluster, client, commands, root)
    assert code == 0, said
    assert f"model:    {root}/model" in said and "next:     python jobs/generate.py" in said, said
    assert "Traceback" not in said and "testsecret" not in said
    assert storage.list("train/tensorboard")
    assert_same(storage, here)


@pytest.mark.long
def test_a_stopped_job_of_each_goes_on_without_a_node(
    cluster: Raylets, client: Client, commands: Commands, here: Storage, bucket: str
) -> None:
    root = f"{bucket}/stopped"
    storage = Storage(root)
    kept = stop_curation(cluster, client, commands, root)
    job = client.submit(commands.curate(root))
    wait(cluster.workers)
    cluster.kill_node(random.Random(0))
    assert_curated(job, storage, kept, here)

    train = storage.sub("train")
    job = client.submit(commands.train(root))
    wait(lambda: train.list("semantic/checkpoints"))
    with held_up(cluster.workers()):
        job.stop()
    assert_stopped(job, cluster, train)
    assert not storage.exists("train/done.json")
    code, said = train_without_a_node(cluster, client, commands, root)
    assert code == 0, said
    assert_same(storage, here)


def assert_curated(job: Submitted, ours: Storage, kept: dict[str, bytes], here: Storage) -> None:
    code, said = job.finish()
    assert code == 0, said
    assert kept.items() <= markers(ours).items(), "what was finished was made again"
    assert shards(ours) == shards(here)


def stop_curation(
    cluster: Raylets, client: Client, commands: Commands, root: str
) -> dict[str, bytes]:
    """Ctrl-C at the client, which stops nothing, then `ray job stop`; the markers that are left."""
    storage = Storage(root)
    job = client.submit(commands.curate(root))
    wait(lambda: Ledger(storage, "images").done())
    with held_up(cluster.workers()):
        code, said = job.interrupt()
        assert code != 0 and f"ray job stop {job.id}" in said, said
        assert job.status() == "RUNNING", "Ctrl-C at the client is not the job's"
        job.stop()
    assert_stopped(job, cluster, storage)
    kept = markers(storage)
    assert kept and not storage.exists("features/manifest.json")
    return kept


def train_without_a_node(
    cluster: Raylets, client: Client, commands: Commands, root: str
) -> tuple[int, str]:
    job = client.submit(commands.train(root))
    job.wait_for("training: 2 CPU workers")
    wait(cluster.workers)
    cluster.kill_node(random.Random(0))
    return job.finish()


@contextlib.contextmanager
def held_up(workers: list[psutil.Process]) -> Iterator[None]:
    """So little work could be over before anything happens to it."""
    for worker in workers:
        with contextlib.suppress(psutil.Error):  # it has just ended
            worker.suspend()
    try:
        yield
    finally:
        for worker in workers:
            with contextlib.suppress(psutil.Error):
                worker.resume()


def assert_stopped(job: Submitted, cluster: Raylets, storage: Storage) -> None:
    """By itself, not killed; no lease, no worker, nothing half-written."""
    assert job.status() == "STOPPED"
    assert "stopped; the same command goes on from here" in job.logs()
    supervisor = next(Path(cluster.environment["HOME"]).rglob(f"supervisor-{job.id}.log"))
    assert "terminated gracefully" in supervisor.read_text(), supervisor.read_text()
    assert not storage.exists(lease.PATH)
    wait(lambda: not cluster.workers(), seconds=180)
    assert [path for path in storage.list() if path.endswith(".tmp")] == []
    name = storage.url().removeprefix("s3://").partition("/")[0]
    assert "Uploads" not in boto3.client("s3").list_multipart_uploads(Bucket=name)


def markers(storage: Storage) -> dict[str, bytes]:
    return {path: storage.read_bytes(path) for path in storage.list() if "/_done/" in path}


def test_a_bad_setting_is_one_line_in_the_job_s_log(client: Client, commands: Commands) -> None:
    job = client.submit(commands.curate("s3://no-such-bucket/run", **{"caption.promt": "x"}))
    code, said = job.finish()
    assert code == 1 and "failed with exit code 2" in said, said
    assert job.status() == "FAILED"
    lines = [line for line in plain(job.logs()).splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "caption.prompt" in lines[0], lines
    assert "Traceback" not in said


def test_without_the_token_nobody_submits_or_looks(cluster: Raylets, tmp_path: Path) -> None:
    """CVE-2023-48022: whoever reaches the port of a dashboard runs what they like."""
    for own in (
        {"HOME": str(tmp_path), "RAY_AUTH_MODE": "disabled"},
        {"HOME": str(tmp_path)},
        {"RAY_AUTH_TOKEN": "0" * 64},
    ):
        stranger = Client(cluster, **own)
        code, said = stranger.ray_job("submit", "--", "touch", str(tmp_path / "here"))
        assert code != 0 and "Authentication" in said, said
    agents = [node.agent for node in (cluster.head, *cluster.nodes)]
    for base in (cluster.dashboard, *(f"127.0.0.1:{port}" for port in agents)):
        for path in ("api/jobs/", "api/job_agent/jobs/", "api/packages/gcs/x", "nodes", "logs"):
            for header in ({}, {"Authorization": f"Bearer {'0' * 64}"}):
                assert ask(f"http://{base}/{path}", tmp_path, header) in (401, 403), path
    assert not (tmp_path / "here").exists()
    code, said = Client(cluster).ray_job("list")
    assert code == 0 and "touch" not in said, said


def ask(url: str, folder: Path, headers: dict[str, str]) -> int:
    """POST of a job, as an attacker's script does; the answer's status."""
    body = json.dumps({"entrypoint": f"touch {folder / 'here'}"}).encode()
    kind = {"Content-Type": "application/json", "User-Agent": "curl/8"}
    request = urllib.request.Request(url, body, {**kind, **headers}, method="POST")
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_without_the_token_nobody_joins(cluster: Raylets, tmp_path: Path) -> None:
    """The cluster's own port asks for it too."""
    code = (
        f"import ray; ray.init(address={cluster.address!r}, logging_level='ERROR'); print('joined')"
    )
    known = cluster.environment
    joining = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env={**known, "HOME": str(tmp_path), **own},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for own in ({"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_TOKEN": "0" * 64})
    ]
    try:
        for process in joining:  # each tries for long
            said, _ = process.communicate(timeout=300)
            assert process.returncode != 0 and "uthenticat" in said and "joined" not in said, said
    finally:
        for process in joining:
            process.kill()


def test_what_is_uploaded_is_the_code(tmp_path: Path) -> None:
    """Neither runs nor environments nor tests: Ray takes 500 MiB at most."""
    from ray._private.runtime_env.packaging import create_package

    tree = tmp_path / "clone"
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    for name in tracked:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes((REPOSITORY / name).read_bytes())
    for name in ("runs/mini/features/a.parquet", ".venv/bin/python", ".venv-lavis/x", ".git/HEAD"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes(b"x")
    package = tmp_path / "package.zip"
    create_package(str(tree), package, include_gitignore=True)
    names = zipfile.ZipFile(package).namelist()
    tops = {name.partition("/")[0] for name in names if not name.endswith("/")}
    code = {"jobs", "pipeline", "ssr_model"}
    assert code <= tops
    assert not tops & {"runs", ".venv", ".venv-lavis", ".git", "tests", "docs", "infra"}
    assert {top for top in tops - code if (tree / top).is_dir()} == set()
    assert package.stat().st_size < 50 * 2**20
