"""A store that is busy, breaks the line, refuses: it is tried again, or it is one line.

Real requests, by the real clients, to a real server (moto) behind a proxy that makes the faults.
"""

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import boto3
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs
import trustme

from pipeline.errors import StoreHiccup, UserError, user_message
from pipeline.storage import _REQUESTS, Storage, glob
from pipeline.storage_faults import PATIENCE_VARIABLE, public, transient
from tests.faulty_s3 import Fault, FaultyS3, faulty

BUCKET = "faults"
PART = 5 * 2**20  # the smallest part that S3 takes


@pytest.fixture(scope="module")
def proxy(s3_server: dict[str, str]) -> Iterator[FaultyS3]:
    with pytest.MonkeyPatch.context() as patch, faulty(s3_server["AWS_ENDPOINT_URL"]) as server:
        for name, value in {**s3_server, "AWS_ENDPOINT_URL": server.url}.items():
            patch.setenv(name, value)
        boto3.client("s3").create_bucket(Bucket=BUCKET)
        yield server


@pytest.fixture
def storage(proxy: FaultyS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Storage]:
    """A root with one file, and a proxy without faults yet; parts of uploads end with the test."""
    monkeypatch.setattr("pipeline.storage_remote.PART_BYTES", PART)
    proxy.faults.clear()
    storage = Storage(f"s3://{BUCKET}/{tmp_path.name}")
    storage.write_bytes("old", b"what was there")
    proxy.requests.clear()
    yield storage
    proxy.faults.clear()
    assert uploads(proxy) == [], "a multipart upload was left behind"


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PATIENCE_VARIABLE, "1.5")


def uploads(proxy: FaultyS3) -> list[str]:
    client = boto3.client("s3", endpoint_url=proxy.url)
    listed = client.list_multipart_uploads(Bucket=BUCKET)
    return [upload["Key"] for upload in listed.get("Uploads", [])]


def publish(storage: Storage, path: str, data: bytes) -> None:
    with storage.publish(path) as sink:
        for start in range(0, len(data), 1 << 20):
            sink.write(data[start : start + (1 << 20)])


BIG = np.random.default_rng(0).bytes(2 * PART + 12345)


def every_operation(storage: Storage) -> None:
    """All that Storage does, with small files and one of three parts."""
    table = pa.table({"n": list(range(50_000))})
    storage.check_writable()
    storage.write_json("a/b.json", {"x": 1})
    storage.write_bytes("a/empty", b"")
    with storage.publish("a/t.parquet") as sink:
        pq.write_table(table, sink)
    publish(storage, "big", BIG)
    assert storage.list("a") == ["a/b.json", "a/empty", "a/t.parquet"]
    assert glob(storage.url("a")) == [storage.url("a/t.parquet")]
    assert storage.exists("a/empty") and not storage.exists("a/none")
    assert storage.size("big") == len(BIG)
    assert storage.read_bytes("big") == BIG
    assert storage.read_many(["a/empty", "a/b.json"])["a/empty"] == b""
    with storage.open_input("a/t.parquet") as file:
        assert pq.read_table(file).equals(table)
    with storage.local_copy("big", [(0, 10), (5 << 20, 6 << 20)]) as copy:
        data = copy.read_bytes()
        assert len(data) == len(BIG) and data[:10] == BIG[:10]
        assert data[5 << 20 : 6 << 20] == BIG[5 << 20 : 6 << 20]
        assert not any(data[10 : 5 << 20])
    with storage.local_copy("a/t.parquet") as copy:
        assert pq.read_table(copy).equals(table)
    storage.delete("a")
    assert storage.list() == ["big", "old"]
    storage.delete("big")


@pytest.mark.parametrize(("kind", "code"), [("503", "SlowDown"), ("reset", ""), ("lost", "")])
def test_what_passes_is_not_noticed(
    storage: Storage, proxy: FaultyS3, kind: str, code: str
) -> None:
    fault = Fault(kind, code, share=0.15)
    proxy.faults.append(fault)
    every_operation(storage)
    assert fault.met > 2
    assert storage.read_bytes("old") == b"what was there"


@pytest.mark.parametrize("kind", ["cut", "short", "reset", "500", "503"])
def test_a_broken_read_is_read_again(storage: Storage, proxy: FaultyS3, kind: str) -> None:
    table = pa.table({"n": np.random.default_rng(0).integers(0, 1 << 60, 50_000)})
    with storage.publish("t.parquet") as sink:
        pq.write_table(table, sink)
    broken = [Fault(kind, methods="GET", times=2), Fault(kind, methods="GET", times=2)]
    proxy.faults[:] = broken[:1]
    whole = storage.read_bytes("t.parquet")
    with storage.open_input("t.parquet") as file:
        footer = pq.ParquetFile(file)
        proxy.faults[:] = broken[1:]
        assert footer.read().equals(table)
    assert len(whole) == sink.bytes
    assert [fault.met for fault in broken] == [2, 2]


def test_a_storm_passes(storage: Storage, proxy: FaultyS3) -> None:
    storm = Fault("503", "SlowDown", times=8)
    proxy.faults.append(storm)
    storage.write_bytes("old", b"new")
    assert storm.met == 8
    assert storage.read_bytes("old") == b"new"


def test_an_error_inside_a_success_is_tried_again(storage: Storage, proxy: FaultyS3) -> None:
    inside = Fault("200", "SlowDown", methods="POST", path="uploadId=", times=2)
    proxy.faults.append(inside)
    publish(storage, "big", BIG)
    assert inside.met == 2
    assert storage.read_bytes("big") == BIG


def test_a_completion_whose_answer_was_lost_is_a_success(storage: Storage, proxy: FaultyS3) -> None:
    proxy.faults.append(Fault("lost", methods="POST", path="uploadId=", times=1))
    publish(storage, "big", BIG)
    assert storage.read_bytes("big") == BIG


def test_a_small_file_is_one_request_and_a_large_one_goes_in_parts(
    storage: Storage, proxy: FaultyS3
) -> None:
    publish(storage, "small", BIG[:PART])
    assert [line.split()[0] for line in proxy.requests] == ["PUT"]
    assert "uploadId" not in proxy.requests[0]
    proxy.requests.clear()
    publish(storage, "big", BIG)
    assert sum("partNumber=" in line for line in proxy.requests) == 3
    assert storage.read_bytes("small") == BIG[:PART]


@pytest.mark.parametrize("kind", ["503", "reset"])
@pytest.mark.parametrize("method", ["GET", "PUT"])
def test_what_lasts_is_one_line_and_leaves_what_was_there(
    storage: Storage, proxy: FaultyS3, kind: str, method: str, impatient: None
) -> None:
    proxy.faults.append(Fault(kind, "SlowDown", methods=method, path=BUCKET))
    started = time.monotonic()
    with pytest.raises(StoreHiccup, match=r"tried \d+ times in \d+ s") as caught:
        if method == "GET":
            storage.read_bytes("old")
        else:
            storage.write_bytes("old", b"new")
    assert time.monotonic() - started < 25
    line = user_message(caught.value)
    assert line is not None and storage.url("old") in line and "run the same command again" in line
    assert ("SlowDown (HTTP 503)" in line) == (kind == "503")
    proxy.faults.clear()
    assert storage.read_bytes("old") == b"what was there"
    assert storage.list() == ["old"]


def test_pyarrow_hands_the_line_through(storage: Storage, proxy: FaultyS3, impatient: None) -> None:
    """A reader in C++ threads, and a writer: the fault arrives as what it is, for the runner."""
    table = pa.table({"n": np.random.default_rng(0).integers(0, 1 << 60, 2_000_000)})
    with storage.publish("t.parquet") as sink:
        pq.write_table(table, sink)
    with storage.open_input("t.parquet") as file:
        footer = pq.ParquetFile(file, pre_buffer=True)
        proxy.faults.append(Fault("503", "SlowDown", methods="GET PUT"))
        with pytest.raises(StoreHiccup, match="SlowDown"):
            footer.read()
    with pytest.raises(StoreHiccup, match="SlowDown"), storage.publish("t.parquet") as sink:
        pq.write_table(table, sink)


def test_a_half_sent_upload_is_dropped(storage: Storage, proxy: FaultyS3, impatient: None) -> None:
    proxy.faults.append(Fault("503", "SlowDown", methods="PUT", path="partNumber=2"))
    with pytest.raises(StoreHiccup, match="SlowDown"):
        publish(storage, "old", BIG)
    proxy.faults.clear()
    assert storage.read_bytes("old") == b"what was there"  # and the fixture: no upload is left


def test_the_next_writer_sweeps_what_a_killed_one_began(storage: Storage, proxy: FaultyS3) -> None:
    _, _, key = storage.url("big").partition(f"{BUCKET}/")
    client = boto3.client("s3")
    begun = client.create_multipart_upload(Bucket=BUCKET, Key=key)["UploadId"]
    client.upload_part(Bucket=BUCKET, Key=key, UploadId=begun, PartNumber=1, Body=b"half")
    assert uploads(proxy) == [key]
    publish(storage, "big", BIG)
    assert uploads(proxy) == []
    assert storage.read_bytes("big") == BIG


def test_a_stalled_store_is_given_up(
    storage: Storage, proxy: FaultyS3, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(_REQUESTS, "read_timeout", 0.5)
    s3fs.S3FileSystem.clear_instance_cache()
    proxy.faults.append(Fault("stall", seconds=3))
    with pytest.raises(StoreHiccup, match="tried"):
        storage.read_bytes("old")
    s3fs.S3FileSystem.clear_instance_cache()


def test_a_read_only_bucket_is_one_line_at_once(storage: Storage, proxy: FaultyS3) -> None:
    denied = Fault("403", "AccessDenied", methods="PUT POST DELETE")
    proxy.faults.append(denied)
    with pytest.raises(UserError, match="permission denied, s3:PutObject is not granted") as caught:
        storage.check_writable()
    assert type(caught.value) is UserError and denied.met == 1, "a refusal was tried again"
    with pytest.raises(UserError, match=f"cannot write {storage.url('old')}: permission denied"):
        publish(storage, "old", BIG)
    with pytest.raises(UserError, match="cannot delete"):
        storage.delete("old")
    assert storage.read_bytes("old") == b"what was there"


def test_a_deletion_that_the_store_passes_over_is_one_line(
    storage: Storage, proxy: FaultyS3
) -> None:
    """S3 answers a bulk deletion with 200 and the refusals inside."""
    _, _, key = storage.url("old").partition(f"{BUCKET}/")
    refused = f"<Error><Key>{key}</Key><Code>AccessDenied</Code><Message>no</Message></Error>"
    proxy.faults.append(
        Fault("200", methods="POST", path="delete", body=f"<DeleteResult>{refused}</DeleteResult>")
    )
    proxy.faults.append(Fault("403", "AccessDenied", methods="DELETE"))
    with pytest.raises(UserError, match="cannot delete"):
        storage.delete("old")


@pytest.mark.parametrize("code", ["InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken"])
def test_wrong_credentials_are_one_line(storage: Storage, proxy: FaultyS3, code: str) -> None:
    proxy.faults.append(Fault("403", code))
    with pytest.raises(UserError, match=rf"does not accept the credentials \({code}\)") as caught:
        storage.check_writable()
    assert "testkey" not in str(caught.value) and "testsecret" not in str(caught.value)


def test_no_credentials_are_one_line(
    storage: Storage, proxy: FaultyS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(UserError, match=r"credentials; check endpoint and credentials") as caught:
        storage.read_bytes("old")
    assert type(caught.value) is UserError
    s3fs.S3FileSystem.clear_instance_cache()


def test_a_bucket_elsewhere_is_one_line(storage: Storage, proxy: FaultyS3) -> None:
    proxy.faults.append(Fault("301", "PermanentRedirect"))
    with pytest.raises(UserError, match="AWS_DEFAULT_REGION or AWS_ENDPOINT_URL") as caught:
        storage.write_bytes("old", b"new")
    assert type(caught.value) is UserError


@pytest.fixture
def old_store(
    storage: Storage,
    s3_server: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Fault]:
    """The store behind TLS, where clients send trailing checksums, and it refuses them."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    certificate = authority.issue_cert("127.0.0.1")
    with faulty(s3_server["AWS_ENDPOINT_URL"], certificate=certificate) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        monkeypatch.setenv("AWS_CA_BUNDLE", str(tmp_path / "ca.pem"))
        refusal = Fault("411", "MissingContentLength", header="x-amz-trailer")
        server.faults.append(refusal)
        s3fs.S3FileSystem.clear_instance_cache()
        yield refusal
    s3fs.S3FileSystem.clear_instance_cache()


def test_a_store_without_trailing_checksums_gets_none(storage: Storage, old_store: Fault) -> None:
    every_operation(storage)
    assert old_store.met == 0


def test_one_that_is_asked_for_them_is_one_line(
    storage: Storage, old_store: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_supported")
    for data in (b"new", BIG):
        with pytest.raises(UserError, match="unset AWS_REQUEST_CHECKSUM_CALCULATION") as caught:
            publish(storage, "old", data)
        assert type(caught.value) is UserError
    assert old_store.met > 1
    assert storage.read_bytes("old") == b"what was there"


def test_many_that_fail_together_come_back_apart(storage: Storage, proxy: FaultyS3) -> None:
    """Sixteen writers in a storm: all get through, and not all at the same moment."""
    proxy.faults.append(Fault("503", "SlowDown", methods="PUT", times=64))
    ended: list[float] = []

    def write(number: int) -> None:
        storage.write_bytes(f"w/{number}", b"x")
        ended.append(time.monotonic())

    threads = [threading.Thread(target=write, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(storage.list("w")) == 16
    assert max(ended) - min(ended) > 0.2


@pytest.mark.parametrize(
    "url",
    ["s3://key:secret@bucket/x", "s3://key:se/cr+et@bucket/x", "s3://token@bucket", "gs://a:b@c/d"],
)
def test_credentials_in_an_address_are_refused_unseen(url: str) -> None:
    for use in (Storage, glob, Storage.for_path):
        with pytest.raises(UserError, match="credentials do not belong into an address") as caught:
            use(url)
        assert "***@" in str(caught.value)
        assert not any(part in str(caught.value) for part in ("key", "se/cr", "secret@", "token@"))


@pytest.mark.parametrize(
    "url", ["s3://bucket/user@host/x:y@z", "http://127.0.0.1:9000/b/x@y", "/home/a:b@c/d"]
)
def test_an_address_without_credentials_is_left_alone(url: str) -> None:
    assert public(url) == url


def test_local_faults_are_not_retried(tmp_path: Path) -> None:
    assert transient(TimeoutError()) and not transient(PermissionError())
    started = time.monotonic()
    with pytest.raises(UserError, match="no such file") as caught:
        Storage(tmp_path).read_bytes("none")
    assert type(caught.value) is UserError and time.monotonic() - started < 10
