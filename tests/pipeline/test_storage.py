"""Storage: the same promises on a local folder, S3 over HTTP (moto) and a real Ceph gateway."""

import errno
import hashlib
import os
import pickle
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import UserError
from pipeline.storage import Storage, glob
from pipeline.storage_faults import PATIENCE_VARIABLE
from tests.ceph import ceph


@pytest.fixture(scope="module")
def ceph_environment() -> Iterator[dict[str, str]]:
    with ceph() as cluster:
        yield cluster.environment


def use_s3(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    client = s3fs.S3FileSystem(endpoint_url=environment["AWS_ENDPOINT_URL"])
    if not client.exists("bucket"):
        client.mkdir("bucket")


@pytest.fixture(params=["local", "moto", "ceph"])
def storage(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Storage:
    if request.param == "local":
        return Storage(tmp_path / "root")
    if request.param == "moto":
        use_s3(request.getfixturevalue("s3_server"), monkeypatch)
    else:
        use_s3(request.getfixturevalue("ceph_environment"), monkeypatch)
    return Storage(f"s3://bucket/{tmp_path.name}")


def test_a_file_is_written_listed_read_and_deleted(storage: Storage) -> None:
    assert storage.list() == []
    assert not storage.exists("a/b.json")
    storage.write_json("a/b.json", {"x": 1})
    storage.write_bytes("a/c/d.bin", b"123")
    storage.write_bytes("e.bin", b"")
    assert storage.list() == ["a/b.json", "a/c/d.bin", "e.bin"]
    assert storage.list("a/c") == ["a/c/d.bin"]
    assert storage.list("nowhere") == []
    assert list(storage.names("a")) == ["b.json"] and list(storage.names("nowhere")) == []
    assert list(storage.names("e.bin")) == []
    assert storage.read_json("a/b.json") == {"x": 1}
    assert storage.read_many(["a/c/d.bin"]) == {"a/c/d.bin": b"123"}
    assert storage.read_many(["a/c/d.bin", "e.bin"]) == {"a/c/d.bin": b"123", "e.bin": b""}
    assert storage.size("a/c/d.bin") == 3
    assert storage.sizes("a/c") == {"a/c/d.bin": 3} and storage.sizes("nowhere") == {}
    assert storage.sub("a").sizes() == {"b.json": storage.size("a/b.json"), "c/d.bin": 3}
    assert storage.sub("a").read_bytes("c/d.bin") == b"123"
    storage.delete("a")
    storage.delete("a")
    assert storage.list() == ["e.bin"]


def test_a_link_to_a_file_is_a_file_of_its_folder(tmp_path: Path) -> None:
    """Where a user links data in; a link to a folder is not entered."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/a.bin").write_bytes(b"123")
    storage = Storage(tmp_path / "run")
    storage.write_bytes("b.bin", b"1")
    (tmp_path / "run/a.bin").symlink_to(tmp_path / "elsewhere/a.bin")
    (tmp_path / "run/folder").symlink_to(tmp_path / "elsewhere")
    assert storage.sizes().items() >= {"a.bin": 3, "b.bin": 1}.items()
    assert {"a.bin", "b.bin"} <= set(storage.list()) == set(storage.sizes())
    assert "folder/a.bin" not in storage.list()
    assert storage.read_bytes("a.bin") == b"123"


def test_pipes_and_devices_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/zero")
    storage = Storage(tmp_path)
    for name in ("pipe", "device"):
        for read in (storage.read_bytes, storage.open_input, storage.open_ranges):
            with pytest.raises(UserError, match=f"{name} is a pipe or a device, not a file"):
                read(name)
        with pytest.raises(UserError, match="is a pipe or a device"):
            storage.read_many([name, "none"])


def test_names_by_their_beginnings_on_several_pages(storage: Storage) -> None:
    wanted = [f"train-{n:05d}.json" for n in range(1005 if not storage.local else 20)]
    for name in [*wanted, "test-00000.json", "train-00001.json/deeper"]:
        if not (storage.local and "/" in name):
            storage.create(f"done/{name}", b"{}")
    assert sorted(storage.names("done", ["train-0"])) == wanted
    assert sorted(storage.names("done")) == ["test-00000.json", *wanted]
    few = ["train-00000.json", "test-00000.json"]
    assert sorted(storage.names("done", ["train-00000", "test-", "no"])) == sorted(few)
    assert list(storage.names("done", [])) == []


def test_publish_counts_hashes_and_parquet_opens(storage: Storage) -> None:
    table = pa.table({"n": list(range(1000))})
    with storage.publish("t.parquet") as sink:
        pq.write_table(table, sink)
        assert not storage.exists("t.parquet")
    data = storage.read_bytes("t.parquet")
    assert (sink.bytes, sink.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    with storage.open_input("t.parquet") as file:
        assert pq.ParquetFile(file).read().equals(table)
    assert glob(storage.root) == [storage.url("t.parquet")]
    assert glob(storage.url("*.parquet")) == [storage.url("t.parquet")]
    folder, name = Storage.for_path(storage.url("t.parquet"))
    assert folder.read_bytes(name) == data


def test_publish_of_many_parts_is_atomic(storage: Storage) -> None:
    block = os.urandom(1 << 20)
    storage.write_bytes("big", b"old")
    with pytest.raises(ValueError, match="stop"), storage.publish("big") as sink:
        for _ in range(60 if not storage.local else 3):  # past one part of a multipart upload
            sink.write(block)
        raise ValueError("stop")
    assert storage.read_bytes("big") == b"old"
    assert storage.list() == ["big"]
    with storage.publish("big") as sink:
        for _ in range(60 if not storage.local else 3):
            sink.write(block)
    assert storage.size("big") == sink.bytes


def test_an_unwritten_sink_publishes_nothing(storage: Storage) -> None:
    with storage.publish("empty"):
        pass
    assert storage.list() == []


def test_trees_go_up_and_down(storage: Storage, tmp_path: Path) -> None:
    (tmp_path / "up" / "deep").mkdir(parents=True)
    (tmp_path / "up" / "deep" / "x").write_bytes(b"x")
    (tmp_path / "up" / "none").write_bytes(b"")
    storage.upload_tree(tmp_path / "up", "tree")
    assert storage.list() == ["tree/deep/x", "tree/none"]
    storage.download_tree("tree", tmp_path / "down")
    assert (tmp_path / "down" / "deep" / "x").read_bytes() == b"x"
    assert (tmp_path / "down" / "none").read_bytes() == b""


def test_a_tree_brings_nothing_beside_its_folder(
    s3_server: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An object's name may hold "..": a hostile model/ would write where it likes."""
    import boto3

    use_s3(s3_server, monkeypatch)
    key = f"{tmp_path.name}/model/../../outside/x"
    boto3.client("s3").put_object(Bucket="bucket", Key=key, Body=b"x")
    with pytest.raises(UserError, match="is no name of ours"):
        Storage(f"s3://bucket/{tmp_path.name}").download_tree("model", tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []


def test_it_pickles_and_checks_that_it_can_write(storage: Storage) -> None:
    again = pickle.loads(pickle.dumps(storage))  # noqa: S301 - our own bytes
    assert again == storage
    again.check_writable()
    assert storage.list() == []


def test_a_missing_file_is_one_line(storage: Storage) -> None:
    with pytest.raises(UserError, match="no such") as caught:
        storage.read_bytes("missing")
    assert "\n" not in str(caught.value)


def test_a_missing_bucket_is_one_line(
    s3_server: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    use_s3(s3_server, monkeypatch)
    with pytest.raises(UserError, match="cannot write s3://no-such-bucket") as caught:
        Storage("s3://no-such-bucket/x").check_writable()
    assert "\n" not in str(caught.value)
    assert "testsecret" not in str(caught.value)


def test_an_unreachable_store_is_one_line(
    s3_server: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    for name, value in {**s3_server, "AWS_ENDPOINT_URL": "http://127.0.0.1:9"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(PATIENCE_VARIABLE, "1")
    with pytest.raises(UserError, match="s3://bucket/x") as caught:
        Storage("s3://bucket/x").list()
    assert "\n" not in str(caught.value)


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    with (
        pytest.raises(UserError, match="the disk is full; free space"),
        storage.publish("x") as sink,
    ):

        class Full:
            def write(self, _: bytes) -> int:
                raise OSError(errno.ENOSPC, "No space left on device")

        sink._file = Full()  # type: ignore[assignment]
        sink.write(b"123")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [100, 20_000])  # of a write: within the file's buffer, beyond it
def test_what_the_system_refuses_is_refused_once(tmp_path: Path, size: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    storage = Storage(tmp_path)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with (
            pytest.raises(UserError, match="the disk is full; free space") as caught,
            storage.publish("x") as sink,
        ):
            for _ in range(60_000 // size):
                sink.write(bytes(size))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.type is UserError
    assert list(tmp_path.iterdir()) == []


def test_a_root_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        Storage(tmp_path / "file" / "root").check_writable()


def test_a_file_is_created_once(storage: Storage) -> None:
    assert storage.create("x", b"first")
    assert not storage.create("x", b"second")
    assert storage.read_bytes("x") == b"first"
    assert storage.list() == ["x"]


@pytest.mark.parametrize("root", ["", "s3://", "what://bucket", "/data/run[1]", "s3://b/x*"])
def test_bad_roots_are_refused(root: str) -> None:
    with pytest.raises(UserError):
        Storage(root).list()


def test_paths_stay_under_the_root(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="leaves"):
        Storage(tmp_path / "root").write_bytes("../x", b"")


def test_what_a_killed_writer_left_is_swept(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pipeline.storage import Storage\n"
        "with Storage(sys.argv[1]).publish('x') as sink:\n"
        "    sink.write(b'half'); sink.flush(); print('ready', flush=True)\n"
        "    import time; time.sleep(60)\n"
    )
    repository = Path(__file__).parents[2]
    with subprocess.Popen(
        [sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, cwd=repository
    ) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"ready\n"
        writer.send_signal(signal.SIGKILL)
    storage = Storage(tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    assert storage.list() == []
    storage.write_bytes("x", b"whole")
    assert [item.name for item in tmp_path.iterdir()] == ["x"]
