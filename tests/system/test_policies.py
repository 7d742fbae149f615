"""infra/policies/s3: with its role's keys and no others a job runs to its end, and what a role must
not do is refused in one line. On a real Ceph gateway, which knows the policies' conditions, and on
moto with IAM enforced, which does not.
"""

from __future__ import annotations

import json
import string
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import boto3
import pytest
import requests
import s3fs

from pipeline import models
from pipeline.errors import UserError
from pipeline.generation.sampler import model_folder
from pipeline.miniworld import links
from pipeline.storage import Storage, glob
from ssr_model.config import SSRConfig
from ssr_model.encoder import SSRAdapter
from ssr_model.weights import save_adapter
from tests.ceph import ceph as running_ceph
from tests.ceph import missing as no_ceph
from tests.faulty_s3 import FaultyS3, faulty
from tests.pipeline.evaluation.folders import write_multi_subject
from tests.sealed import write_features
from tests.system import training
from tests.system.curating import Job

pytestmark = [pytest.mark.system, pytest.mark.timeout(1200)]
REPOSITORY = Path(__file__).resolve().parents[2]
POLICIES = REPOSITORY / "infra" / "policies" / "s3"
ROLES = ("curate", "train", "read")
EVERY = (*ROLES, "serve")
"""The service's role writes nothing, not even the probe."""
PLACES = {
    "BUCKET": "runs-of-roles",
    "RUN": "runs/a",
    "METADATA_BUCKET": "metadata-of-roles",
    "METADATA_PREFIX": "laion",
}
RUN = "s3://runs-of-roles/runs/a"
METADATA = "s3://metadata-of-roles/laion"


def policy(role: str) -> dict[str, Any]:
    text = string.Template((POLICIES / f"{role}.json").read_text()).substitute(PLACES)
    document: dict[str, Any] = json.loads(text)
    return document


@dataclass
class Store:
    """A store that enforces policies: its owner's keys, and those of each role."""

    url: str
    keys: dict[str, tuple[str, str]]
    knows_conditions: bool
    proxy: FaultyS3 | None = field(default=None)

    def environment(self, role: str) -> dict[str, str]:
        key, secret = self.keys[role]
        return {
            "AWS_ENDPOINT_URL": self.proxy.url if self.proxy else self.url,
            "AWS_ACCESS_KEY_ID": key,
            "AWS_SECRET_ACCESS_KEY": secret,
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def client(self, service: str = "s3") -> Any:
        key, secret = self.keys["owner"]
        return boto3.client(
            service,
            endpoint_url=self.url,
            aws_access_key_id=key,
            aws_secret_access_key=secret,
            region_name="us-east-1",
        )

    def fill(self) -> None:
        """Buckets, and in them what is not ours to touch."""
        for name in ("BUCKET", "METADATA_BUCKET"):
            self.client().create_bucket(Bucket=PLACES[name])
        for key in ("runs/a/features/sealed", "runs/a/model/config.json", "runs/b/secret"):
            self.client().put_object(Bucket=PLACES["BUCKET"], Key=key, Body=b"{}")
        self.client().put_object(Bucket=PLACES["METADATA_BUCKET"], Key="laion/m.parquet", Body=b"-")
        self.client().put_object(Bucket=PLACES["METADATA_BUCKET"], Key="other/m", Body=b"-")

    def clear(self, keys: list[str]) -> None:
        for key in keys:
            self.client().delete_object(Bucket=PLACES["BUCKET"], Key=key)


@pytest.fixture(scope="module")
def ceph() -> Iterator[Store]:
    with running_ceph() as cluster:
        keys = {"owner": ("testkey", "testsecret")}
        cluster.admin("caps", "add", "--uid=test", "--caps=user-policy=*;users=*")
        for role in EVERY:
            keys[role] = f"{role}key", f"{role}-not-a-secret"
            named = ("--access-key", keys[role][0], "--secret", keys[role][1])
            cluster.admin("user", "create", f"--uid={role}", f"--display-name={role}", *named)
        store = Store(cluster.url, keys, knows_conditions=True)
        store.fill()
        for role in EVERY:
            document = json.dumps(policy(role))
            store.client("iam").put_user_policy(
                UserName=role, PolicyName="run", PolicyDocument=document
            )
        yield store


@pytest.fixture(scope="module")
def moto(s3_server: dict[str, str]) -> Iterator[Store]:
    """moto takes a policy's condition for a prohibition: here the listing has none."""
    url, keys = s3_server["AWS_ENDPOINT_URL"], {"owner": ("testkey", "testsecret")}
    store = Store(url, keys, knows_conditions=False)
    iam = store.client("iam")
    allowed = [{"Effect": "Allow", "Action": "*", "Resource": "*"}]
    everything = {"Version": "2012-10-17", "Statement": allowed}
    for role in ("owner", *EVERY):
        document = policy(role) if role != "owner" else everything
        for statement in document["Statement"]:
            statement.pop("Condition", None)
        iam.create_user(UserName=role)
        iam.put_user_policy(UserName=role, PolicyName="run", PolicyDocument=json.dumps(document))
    made = {r: iam.create_access_key(UserName=r)["AccessKey"] for r in ("owner", *EVERY)}
    keys.update({r: (key["AccessKeyId"], key["SecretAccessKey"]) for r, key in made.items()})
    store.fill()
    requests.post(f"{url}/moto-api/reset-auth", data=b"0", timeout=300)
    try:
        yield store
    finally:  # the server is the session's, and others' tests have no keys
        requests.post(f"{url}/moto-api/reset-auth", data=b"inf", timeout=300)


@pytest.fixture(params=["moto", "ceph"])
def store(request: pytest.FixtureRequest) -> Store:
    found: Store = request.getfixturevalue(request.param)
    return found


class As:
    """What a role may do, in this process."""

    def __init__(self, store: Store, role: str, patch: pytest.MonkeyPatch) -> None:
        for name, value in store.environment(role).items():
            patch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        self.storage = Storage(RUN)


WRITES = {
    "curate": "units/x scan/x rejects/x images/_done/x scores/x captions/x features/x web/x "
    "_run.json curation.json report.html",
    "train": "train/semantic/x train/_run.json model/x report.html",
    "read": "generate/x.png evaluation/mini/x grid.png report.html",
}
REFUSED = {
    "curate": "model/x train/x generate/x evaluation/x grid.png ../b/x",
    "train": "features/x units/x images/x captions/x generate/x evaluation/x _run.json",
    "read": "features/x units/x train/x model/x _run.json curation.json",
}
KEPT = {
    "curate": "model/config.json",
    "train": "features/sealed",
    "read": "features/sealed model/config.json generate/x.png",
}


@pytest.mark.parametrize("role", ROLES)
def test_a_role_writes_its_own_folders_and_no_others(
    store: Store, role: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = As(store, role, monkeypatch).storage
    storage.check_writable()
    for path in WRITES[role].split():
        storage.write_bytes(path, b"ours")
        assert storage.read_bytes(path) == b"ours"
    for path in REFUSED[role].split():
        above, _, name = path.rpartition("../")
        place = Storage("s3://runs-of-roles/runs") if above or path.startswith("../") else storage
        with pytest.raises(UserError) as caught:
            place.write_bytes(name, b"not ours")
        line = str(caught.value)
        assert line == (
            f"cannot write {place.url(name)}: permission denied, s3:PutObject is not granted; "
            "check the role's policy or the credentials"
        )
    for path in KEPT[role].split():
        with pytest.raises(UserError, match=f"cannot delete {storage.url(path)}: .*DeleteObject"):
            storage.delete(path)
        assert storage.exists(path)
    store.clear([f"runs/a/{path}" for path in WRITES[role].split()])


@pytest.mark.parametrize("role", ROLES)
def test_a_missing_object_is_missing_and_not_forbidden(
    store: Store, role: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store answers 403 to who may not list the bucket; it is told apart by a listing."""
    storage = As(store, role, monkeypatch).storage
    for path in ("features/none", "train/none/x", "none"):
        assert not storage.exists(path) and not storage.is_file(path)
        assert storage.list(path) == [] and storage.sizes(path) == {}
        storage.delete(path)
        with pytest.raises(UserError, match=f"cannot read {storage.url(path)}: no such bucket or"):
            storage.read_bytes(path)
        with pytest.raises(UserError, match="no such bucket or file"):
            storage.open_input(path)
    assert storage.exists("features/sealed") and storage.exists("features")
    assert storage.exists() and "features/sealed" in storage.list()


def test_a_role_sees_its_run_alone(ceph: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    other = Storage("s3://runs-of-roles/runs/b")
    looks = (
        (lambda: other.read_bytes("secret"), "s3:GetObject or s3:ListBucket"),
        (lambda: other.list(), "s3:ListBucket"),
        (lambda: other.exists("secret"), "s3:GetObject or s3:ListBucket"),
        (lambda: Storage("s3://metadata-of-roles/other").list(), "s3:ListBucket"),
        (lambda: Storage("s3://runs-of-roles").list(), "s3:ListBucket"),
    )
    for role in EVERY:
        As(ceph, role, monkeypatch)
        for look, right in looks:
            with pytest.raises(UserError, match=f"permission denied, {right} is not granted"):
                look()
    As(ceph, "curate", monkeypatch)
    assert glob(METADATA) == [f"{METADATA}/m.parquet"] == glob(f"{METADATA}/*.parquet")
    As(ceph, "train", monkeypatch)
    with pytest.raises(UserError, match="permission denied"):
        glob(METADATA)


def test_the_service_copies_its_model_and_does_nothing_else(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = As(store, "serve", monkeypatch).storage
    with model_folder(storage, None) as folder:
        assert [path.name for path in Path(folder).iterdir()] == ["config.json"]
    assert not storage.sub("model").exists("none")
    for place, path in (
        (storage, "features/sealed"),
        (Storage("s3://runs-of-roles"), "runs/b/secret"),
    ):
        with pytest.raises(UserError, match="permission denied, s3:GetObject"):
            place.read_bytes(path)
    for path in ("model/x", "generate/x.png", "evaluation/x", "report.html", ".writable-x"):
        with pytest.raises(UserError, match="permission denied, s3:PutObject is not granted"):
            storage.write_bytes(path, b"not ours")
    with pytest.raises(UserError, match=r"cannot delete .*DeleteObject"):
        storage.delete("model/config.json")


def test_large_files_and_those_broken_off(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.storage_remote.PART_BYTES", 5 * 2**20)
    block = bytes(6 * 2**20)
    mine = As(store, "train", monkeypatch).storage
    with mine.publish("train/large") as sink:
        sink.write(block)
        sink.write(block)
    assert mine.size("train/large") == 2 * len(block)
    with pytest.raises(RuntimeError, match="stop"), mine.publish("train/large") as sink:
        sink.write(block)
        raise RuntimeError("stop")
    with (
        pytest.raises(UserError, match=r"write .*/features/large: .*s3:PutObject is not granted"),
        mine.publish("features/large") as sink,
    ):
        sink.write(block)
    listed = store.client().list_multipart_uploads(Bucket=PLACES["BUCKET"])
    assert listed.get("Uploads", []) == []
    # what a killed writer left is swept by the next one of the same role
    where = {"Bucket": PLACES["BUCKET"], "Key": "runs/a/train/large"}
    store.client().create_multipart_upload(**where)
    with mine.publish("train/large") as sink:
        sink.write(block)
    assert store.client().list_multipart_uploads(Bucket=where["Bucket"]).get("Uploads", []) == []
    mine.delete("train/large")


def test_a_policy_without_the_listing_says_so(ceph: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    document = policy("read")
    document["Statement"] = [s for s in document["Statement"] if s["Sid"] != "ListTheRun"]
    put = ceph.client("iam").put_user_policy
    put(UserName="read", PolicyName="run", PolicyDocument=json.dumps(document))
    try:
        storage = As(ceph, "read", monkeypatch).storage
        with pytest.raises(UserError, match="s3:GetObject or s3:ListBucket is not granted"):
            storage.exists("none")
    finally:
        put(UserName="read", PolicyName="run", PolicyDocument=json.dumps(policy("read")))


# --- whole jobs -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def behind(request: pytest.FixtureRequest) -> Iterator[Store]:
    """The strictest store that is there, behind a proxy that notes what it refuses."""
    found: Store = request.getfixturevalue("moto" if no_ceph() else "ceph")
    with faulty(found.url) as proxy:
        found.proxy = proxy
        yield found
        found.proxy = None


def job(store: Store, role: str, name: str, *words: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, f"jobs/{name}.py", "--root", RUN, *words],
        cwd=REPOSITORY,
        env={
            **training.environment(),
            "HF_HUB_OFFLINE": "1",
            "RAY_raylet_start_wait_time_s": "180",  # beside other tests
            **store.environment(role),
        },
        capture_output=True,
        text=True,
        timeout=900,
    )
    return done.returncode, done.stdout + done.stderr


def check_runs(store: Store, role: str, *jobs: list[str]) -> None:
    """Each of `jobs` (its name and words) runs to its end with the keys of `role`.

    All that was refused were looks at single objects of the run, which it may read (they are
    missing), and deletions of many in one request, which Ceph 16 and moto grant to nobody else than
    the bucket's owner: they come one by one then.
    """
    assert store.proxy is not None
    store.proxy.refused.clear()
    for words in jobs:
        status, said = job(store, role, *words)
        assert status == 0, said
    readable = tuple(f"/{place}/" for place in ("runs-of-roles/runs/a", "metadata-of-roles/laion"))
    for line in store.proxy.refused:
        method, _, url = line.partition(" ")
        path = unquote(urlsplit(url).path) + "/"
        if (method, url) == ("POST", "/runs-of-roles?delete"):
            continue
        assert method in ("HEAD", "GET") and path.startswith(readable), line
        assert "list-type" not in parse_qs(urlsplit(url).query, keep_blank_values=True), line
    assert bool(store.proxy.refused) == store.knows_conditions
    store.proxy.refused.clear()


def begin(store: Store, patch: pytest.MonkeyPatch) -> Storage:
    """The run's root as the buckets' owner has it, empty."""
    for name in ("BUCKET", "METADATA_BUCKET"):
        where = {"Bucket": PLACES[name]}
        for each in store.client().list_objects_v2(**where, Prefix="").get("Contents", []):
            store.client().delete_object(**where, Key=each["Key"])
    return As(store, "owner", patch).storage


def of_models(folder: Path) -> list[str]:
    return ["--models.base", f"{folder}/sd", "--models.vision", f"{folder}/clip"]


def test_curation_runs_as_its_role(
    behind: Store, tiny_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(behind, monkeypatch)
    curation = Job(tiny_models)
    site = f"http://127.0.0.1:{curation.settings['--website.port']}"
    links.write_metadata(Storage(METADATA), "part", site, 120, 0)
    few = {"--website.rows": 120, "--filter.unit_rows": 16, "--filter.test_rows": 8}
    given = {**curation.settings, **few, "--filter.inputs": METADATA}
    words = [str(word) for pair in given.items() for word in pair]
    status, said = job(behind, "train", "curate", *words)
    assert status == 2 and f"error: cannot write {RUN}/_run.json: permission denied, " in said
    check_runs(behind, "curate", ["curate", *words])


def test_training_runs_as_its_role(
    behind: Store, tiny_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(behind, monkeypatch)
    write_features(RUN, tiny_models)
    steps = {"semantic.steps": 4, "multi_scale.steps": 2, "checkpoint_steps": 2, "sample_steps": 2}
    short = {**steps, "sample_denoising": 2, "validate_steps": 2, "validate_rows": 4}
    words = training.command(RUN, tiny_models, 1, **short)[4:]
    for role in ("curate", "read"):
        status, said = job(behind, role, "train", *words)
        assert status == 2 and said.strip().splitlines()[-1] == (
            f"error: cannot write {RUN}/train/_run.json: permission denied, s3:PutObject is not "
            "granted; check the role's policy or the credentials"
        )
    check_runs(behind, "train", ["train", *words])


def test_pictures_and_scores_are_made_as_their_role(
    behind: Store, tiny_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unet, vision = models.load_unet(f"{tiny_models}/sd"), models.load_vision(f"{tiny_models}/clip")
    text = models.load_text_encoder(f"{tiny_models}/sd")
    config = SSRConfig.from_models(vision.config, text.config, unet, scales=3)
    save_adapter(tmp_path / "model", SSRAdapter(config))
    write_multi_subject(tmp_path / "benches" / "kitchen")
    begin(behind, monkeypatch).upload_tree(tmp_path, "")
    few = ["--references", "1", "--steps", "2", "--device", "cpu"]
    words = [*of_models(tiny_models), *few]
    evaluate = ["evaluate", *words, "--methods", "ssr-text"]
    # as infra/jobs/evaluate.yaml: a bench beside the model, workers that draw and that score
    bench = [*evaluate, "--bench", f"{RUN}/benches/kitchen", "--drawing.max_workers", "1"]
    bench += ["--look.segmenter", "null"]  # the mini world's knows none of its subjects
    check_runs(behind, "read", ["generate", *words], evaluate, bench)
    status, said = job(behind, "train", "generate", *words, "--seed", "1")
    last = said.strip().splitlines()[-1]
    assert status == 2 and last.startswith(f"error: cannot write {RUN}/generate/"), said
    assert "s3:PutObject is not granted" in last
