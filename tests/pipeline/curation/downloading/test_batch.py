"""A unit's rows until they end: the deadline, threads that hang, lists and hashes that decide."""

from __future__ import annotations

import hashlib
import io
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.config import DownloadConfig
from pipeline.curation.downloading import batch, driven, outcomes
from pipeline.curation.downloading.batch import Batch, Row
from pipeline.curation.downloading.blocklists import BlockLists
from pipeline.curation.downloading.download import Download
from pipeline.curation.fetching.addresses import Resolver
from pipeline.curation.fetching.fetch import Fetched, Fetcher
from pipeline.errors import UserError
from pipeline.storage import Storage
from pipeline.units import fingerprint, run_unit


def image(number: int) -> bytes:
    out = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 255, (40, 40, 3))
    Image.fromarray(pixels.astype(np.uint8)).save(out, "PNG")
    return out.getvalue()


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256  # threads that connect at once, none of them a second later


class Site:
    """/<number> is an image; /moved/<number> leads to it, /moved/moved/... to that;
    /stalled/<number> never answers.
    """

    def __init__(self) -> None:
        site = self
        self.asked: list[str] = []
        self.go_on = threading.Event()

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                site.asked.append(self.path)
                kind, _, number = self.path.rpartition("/")
                if kind == "/stalled":
                    site.go_on.wait(60)
                    return
                moved = kind.endswith("/moved")
                self.send_response(302 if moved else 200)
                body = b"" if moved else image(int(number))
                self.send_header("Location", f"{kind.removesuffix('/moved')}/{number}")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = Server(("127.0.0.1", 0), Handler)
        self.host = f"127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def rows(self, *paths: Any) -> list[Row]:
        return [Row(f"http://{self.host}/{path}") for path in paths]

    def config(self, **settings: Any) -> DownloadConfig:
        given = {"timeout_s": 30.0, "retries": 0, "allow_private_hosts": [self.host], **settings}
        return DownloadConfig(**given)

    def batch(
        self, rows: list[Row], blocked: BlockLists | None = None, fetcher: Any = None, **cfg: Any
    ) -> Batch:
        settings = self.config(**cfg)
        return Batch(rows, fetcher or Fetcher(settings), blocked or BlockLists(), settings)


@pytest.fixture
def site() -> Iterator[Site]:
    site = Site()
    # the first of a process imports for seconds, which no deadline here has
    site.batch(site.rows(1)).run()
    site.asked.clear()
    yield site
    site.go_on.set()
    site.server.shutdown()
    site.server.server_close()


def causes(ended: list[outcomes.Outcome]) -> list[str]:
    return [outcome.cause for outcome in ended]


def test_at_the_deadline_what_has_not_ended_is_for_another_time(site: Site) -> None:
    rows = site.rows(1, "stalled/1", 2, "stalled/2", *(f"stalled/{n}" for n in range(3, 30)))
    started = time.monotonic()
    work = site.batch(rows, threads=8, unit_deadline_s=4.0, per_host=8)
    ended = work.run()
    assert time.monotonic() - started < 4.0 + batch.GRACE_S + 20
    assert causes(ended) == ["ok", "deadline", "ok", *["deadline"] * 28]
    assert all(row.transient and not row.rule for row in ended if row.cause == "deadline")
    assert ended[1].tries == 1 and ended[-1].tries == 0  # the last was never asked for
    assert sorted(work.images) == [0, 2]


def test_without_a_deadline_a_unit_takes_the_time_it_takes(site: Site) -> None:
    threading.Timer(1.0, site.go_on.set).start()
    ended = site.batch(site.rows("stalled/1", 1)).run()
    assert causes(ended)[1] == "ok" and causes(ended)[0] != "deadline"


class Stuck:
    """Fetches that hang in C, where no deadline reaches them, until they are let go."""

    def __init__(self, fetcher: Fetcher) -> None:
        self.fetcher, self.let_go, self.left = fetcher, threading.Event(), threading.Event()

    def __call__(self, url: str, until: float | None = None, **rest: Any) -> Fetched:
        if "stalled" not in url:
            return self.fetcher(url, until, **rest)
        self.let_go.wait(60)
        self.left.set()
        return Fetched(image(7), url)


def test_threads_that_hang_are_left_and_reach_nobody(site: Site) -> None:
    cfg = site.config(unit_deadline_s=4.0, threads=4)
    fetcher = Stuck(Fetcher(cfg))
    first = Batch(site.rows(1, "stalled/1", "stalled/2"), fetcher, BlockLists(), cfg)
    started = time.monotonic()
    ended = first.run()
    assert time.monotonic() - started < 4.0 + batch.GRACE_S + 20
    assert causes(ended) == ["ok", "deadline", "deadline"]
    # the next one runs while the first still hangs, with the same row numbers
    second = Batch(site.rows(2, 3, 4), fetcher, BlockLists(), replace(cfg, unit_deadline_s=30))
    assert causes(second.run()) == ["ok"] * 3
    before = {index: found.sha256 for index, found in second.images.items()}
    third = Batch(site.rows(5, 6, 8), fetcher, BlockLists(), replace(cfg, unit_deadline_s=30))
    fetcher.let_go.set()  # what hung comes back while the third runs
    assert causes(third.run()) == ["ok"] * 3
    assert fetcher.left.wait(60)
    _wait_for_threads("unit")
    assert {index: found.sha256 for index, found in second.images.items()} == before
    for work, numbers in ((first, [1]), (second, [2, 3, 4]), (third, [5, 6, 8])):
        stored = {index: found.sha256 for index, found in work.images.items()}
        assert stored == {
            index: hashlib.sha256(image(number)).hexdigest() for index, number in enumerate(numbers)
        }


def test_a_decoder_that_hangs_takes_neither_the_unit_nor_the_output(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_go = threading.Event()
    decode = batch.raster.decode

    def hang(body: bytes, header: Any) -> Any:
        if hashlib.sha256(body).digest() == hashlib.sha256(image(2)).digest():
            let_go.wait(60)
        return decode(body, header)

    monkeypatch.setattr(batch.raster, "decode", hang)
    output = streams()
    ended = site.batch(site.rows(2, 1), unit_deadline_s=1.0, threads=1).run()
    assert causes(ended) == ["deadline", "deadline"]  # the second waits behind the first
    assert streams() == output
    work = site.batch(site.rows(3, 4), unit_deadline_s=30.0)
    assert causes(work.run()) == ["ok", "ok"]
    let_go.set()
    _wait_for_threads("unit")
    assert streams() == output
    assert sorted(work.images) == [0, 1]


def streams() -> list[int]:
    """What this process's stdout and stderr are."""
    return [os.fstat(stream).st_ino for stream in (1, 2)]


def _wait_for_threads(name: str) -> None:
    until = time.monotonic() + 60
    while any(thread.name == name for thread in threading.enumerate()):
        assert time.monotonic() < until, "a batch that was left behind never ends"
        time.sleep(0.05)


def test_what_the_resizer_cannot_do_gives_its_body_back(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(body: bytes, header: Any) -> Any:
        if hashlib.sha256(body).digest() == hashlib.sha256(image(2)).digest():
            raise ArithmeticError("a fault of a library")
        return decode(body, header)

    decode = batch.raster.decode
    monkeypatch.setattr(batch.raster, "decode", fail)
    work = site.batch(site.rows(1, 2, 3))
    assert causes(work.run()) == ["ok", "internal_ArithmeticError", "ok"]
    assert not work._came


def test_work_that_ends_just_after_the_deadline_was_late(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What has not ended is for another time, also if its thread ends while the unit closes."""
    over = threading.Event()
    monkeypatch.setattr(batch, "GRACE_S", 0.1)
    monkeypatch.setattr(driven, "download", lambda *_: over.wait(30))

    def release(holder: object) -> None:
        over.set()
        _wait_for_threads("unit")

    monkeypatch.setattr(driven.silence, "release", release)
    ended = site.batch(site.rows(1), unit_deadline_s=0.1).run()
    assert causes(ended) == ["deadline"] and ended[0].transient


def test_nothing_of_img2dataset_is_changed(site: Site) -> None:
    downloader, resizer = driven.modules()
    before = downloader.download_image_with_retry, resizer.SuppressStdoutStderr, resizer.cv2
    assert causes(site.batch(site.rows(1)).run()) == ["ok"]
    now = downloader.download_image_with_retry, resizer.SuppressStdoutStderr, resizer.cv2
    assert now == before


def test_blocked_urls_are_never_asked_for(site: Site, tmp_path: Path) -> None:
    (tmp_path / "blocked.txt").write_text(f"HTTP://{site.host}/1#x\nhttp://{site.host}/3\n")
    blocked = BlockLists.load([str(tmp_path / "blocked.txt")])
    work = site.batch(site.rows(1, 2, "moved/3", "moved/moved/3"), blocked)
    ended = work.run()
    assert causes(ended) == ["blocked", "ok", "blocked", "blocked"]
    assert ended[0].rule and ended[2].rule and not ended[0].transient
    assert "/1" not in site.asked and ended[0].tries == 0
    assert "/3" not in site.asked and ended[2].tries == 1
    assert list(work.images) == [1]


def test_a_blocked_url_is_no_way_to_another(site: Site, tmp_path: Path) -> None:
    (tmp_path / "blocked.txt").write_text(f"http://{site.host}/moved/1\nhttp://{site.host}/a b")
    blocked = BlockLists.load([str(tmp_path / "blocked.txt")])
    ended = site.batch(site.rows("moved/moved/1", "a b"), blocked).run()
    assert causes(ended) == ["blocked"] * 2
    assert site.asked == ["/moved/moved/1"]


def test_what_was_never_asked_for_has_no_tries(site: Site) -> None:
    rows = [Row(url) for url in ("ftp://a/b", "http://a:b/", "http://10.0.0.1/")]
    ended = site.batch([*rows, *site.rows(1, "moved/2")]).run()
    causes_of = ["forbidden_scheme", "bad_url", "forbidden_address", "ok", "ok"]
    assert causes(ended) == causes_of
    assert [row.tries for row in ended] == [0, 0, 0, 1, 1]
    histogram = outcomes.tally(ended, [None] * 5).extra["seconds"]
    assert sum(histogram["rows"]) == 2


def test_rows_that_wait_for_a_slow_host_leave_threads_for_the_others(site: Site) -> None:
    """A hundred rows of a host that never answers come first; each other host is served."""
    other = Site()
    exempt = [f"slow.example:{site.server.server_port}", f"well.example:{other.server.server_port}"]
    cfg = site.config(threads=8, per_host=2, unit_deadline_s=8.0)
    fetcher = Fetcher(cfg, Resolver(exempt, lookup=lambda host, port: ["127.0.0.1"]))
    slow = [Row(f"http://{exempt[0]}/stalled/{number}") for number in range(100)]
    well = [Row(f"http://{exempt[1]}/{number}") for number in range(10)]
    ended = Batch([*slow, *well], fetcher, BlockLists(), cfg).run()
    assert causes(ended) == ["deadline"] * 100 + ["ok"] * 10
    other.server.shutdown()
    other.server.server_close()


@pytest.mark.parametrize("kind", ["md5", "sha256"])
def test_blocked_content_is_not_stored(site: Site, tmp_path: Path, kind: str) -> None:
    (tmp_path / "blocked.txt").write_text(hashlib.new(kind, image(1)).hexdigest())
    work = site.batch(site.rows(1, 2, "moved/1"), BlockLists.load([str(tmp_path / "blocked.txt")]))
    ended = work.run()
    assert causes(ended) == ["blocked", "ok", "blocked"] and ended[0].rule
    assert list(work.images) == [1]


@pytest.mark.parametrize("kind", ["md5", "sha256"])
def test_other_content_than_was_promised_is_refused(site: Site, kind: str) -> None:
    digest = hashlib.new(kind, image(1)).hexdigest()
    urls = [row.url for row in site.rows(1, 2, 3)]
    rows = [Row(urls[0], digest.upper()), Row(urls[1], digest), Row(urls[2])]
    ended = site.batch(rows, verify_hash=kind).run()
    assert causes(ended) == ["ok", "hash_mismatch", "ok"]
    assert not ended[1].rule and not ended[1].transient


def write_unit(root: Path, site: Site, paths: list[Any], **columns: Any) -> None:
    rows = {
        "key": [str(index) for index in range(len(paths))],
        "url": [row.url for row in site.rows(*paths)],
        "alt_text": ["x"] * len(paths),
        "aesthetic": pa.array([6.5] * len(paths), pa.float32()),
        "predictor": pa.array(["v2"] * len(paths)),
        **columns,
    }
    (root / "units").mkdir(exist_ok=True)
    pq.write_table(pa.table(rows), root / "units/train-00000.parquet")


def test_a_unit_commits_at_its_deadline_with_every_outcome_beside_it(
    site: Site, tmp_path: Path
) -> None:
    write_unit(tmp_path, site, [1, "stalled/1", "nothing", 2])
    storage, stage = Storage(tmp_path), Download(site.config(unit_deadline_s=5.0))
    stage.open()
    marker = run_unit(stage, "train-00000", storage, fingerprint(stage, None))
    assert marker.tally.kept == 2 and marker.tally.failed["deadline"] == 1
    assert marker.tally.extra["transient"]["deadline"] == 1
    assert marker.tally.extra["bytes"] == len(image(1)) + len(image(2))
    found = outcomes.load(storage, marker)
    assert found["key"].to_pylist() == ["0", "1", "2", "3"]
    assert found["host"].to_pylist() == [site.host] * 4
    assert found["cause"].to_pylist()[1] == "deadline" and found["tries"].to_pylist()[0] == 1
    assert found["bytes"].to_pylist()[0] == len(image(1))
    assert storage.list("images") == [
        "images/_done/train-00000.json",
        "images/_outcomes/train-00000.parquet",
        "images/train-00000.parquet",
    ]


def test_hashes_come_from_the_unit(site: Site, tmp_path: Path) -> None:
    storage, stage = Storage(tmp_path), Download(site.config(verify_hash="md5"))
    write_unit(tmp_path, site, [1, 2])
    with pytest.raises(UserError, match=r"train-00000\.parquet has no column md5"):
        run_unit(stage, "train-00000", storage, "x")
    digest = hashlib.md5(image(1), usedforsecurity=False)
    for shown in (digest.hexdigest(), digest.digest()):
        write_unit(tmp_path, site, [1, 2, 3], md5=[shown, shown, None])
        storage.delete("images")
        tally = run_unit(stage, "train-00000", storage, "x").tally
        assert (tally.kept, tally.failed) == (2, {"hash_mismatch": 1})


def test_what_is_blocked_is_a_setting_by_content_not_by_name(site: Site, tmp_path: Path) -> None:
    plain = fingerprint(Download(site.config()), None)
    prints = []
    for name, text in (("a", "http://x/\n"), ("b", "http://x/\n"), ("c", "http://y/\n")):
        (tmp_path / name).write_text(text)
        prints.append(fingerprint(Download(site.config(block_lists=[str(tmp_path / name)])), None))
    assert prints[0] == prints[1] != prints[2] and plain not in prints


def test_block_lists_work_in_the_stage(site: Site, tmp_path: Path) -> None:
    (tmp_path / "blocked").write_text(hashlib.sha256(image(1)).hexdigest())
    write_unit(tmp_path, site, [1, 2])
    stage = Download(site.config(block_lists=[str(tmp_path / "blocked")]))
    tally = run_unit(stage, "train-00000", Storage(tmp_path), "x").tally
    assert (tally.kept, tally.dropped) == (1, {"blocked": 1})


def test_reduced_decoding_is_another_setting_and_keeps_the_original_size(
    site: Site, tmp_path: Path
) -> None:
    write_unit(tmp_path, site, [1])
    prints = {fingerprint(Download(site.config(decode=d)), None) for d in ("full", "reduced")}
    assert len(prints) == 2
    stage = Download(site.config(decode="reduced", image_size=16, encode_format="png"))
    run_unit(stage, "train-00000", Storage(tmp_path), "x")
    row = pq.read_table(tmp_path / "images/train-00000.parquet").to_pylist()[0]
    assert [row[name] for name in ("width", "height", "original_width", "original_height")] == [
        *(16, 16),
        *(40, 40),
    ]
