"""Rounds of retries: each row once, whatever breaks off; and the counts stay true."""

from __future__ import annotations

import io
import json
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.accounts import Account, is_retry, split_of
from pipeline.config import DownloadConfig
from pipeline.curation.downloading import retry
from pipeline.curation.downloading.download import Download
from pipeline.curation.fetching.addresses import Resolver
from pipeline.curation.fetching.fetch import Fetcher
from pipeline.curation.seal import unit_ids, write_summary
from pipeline.curation.status import accounts_of
from pipeline.errors import UserError
from pipeline.storage import Storage
from pipeline.units import Ledger, Tally, fingerprint, run_unit

TRAIN, TEST, UNIT_ROWS = 20, 4, 6


def image() -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (40, 40), (200, 30, 30)).save(out, "PNG")
    return out.getvalue()


class Web:
    """/<n> is an image; a number divisible by 3 is busy (503) until `awake`; by 5, it is gone."""

    def __init__(self) -> None:
        web, body = self, image()
        self.awake: set[int] = set()
        self.asked: Counter[int] = Counter()

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                number = int(self.path[1:])
                web.asked[number] += 1
                busy = number % 3 == 0 and number not in web.awake
                self.send_response(503 if busy else 404 if number % 5 == 0 else 200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.host = f"127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def download(self, **settings: Any) -> Download:
        cfg = DownloadConfig(
            retries=0, timeout_s=20.0, allow_private_hosts=[self.host], threads=4, **settings
        )
        return Download(cfg)


class Filter:
    """Rows 0 to 19 as train, 20 to 23 as test, in units of six."""

    name, source = "units", None
    settings: dict[str, Any] = {"seed": 0}  # noqa: RUF012

    def __init__(self, host: str) -> None:
        self.host = host

    def __call__(self, unit: str, storage: Storage, sink: BinaryIO) -> Tally:
        made = []
        for split, numbers in (("test", range(TRAIN, TRAIN + TEST)), ("train", range(TRAIN))):
            for index, start in enumerate(range(0, len(numbers), UNIT_ROWS)):
                rows = numbers[start : start + UNIT_ROWS]
                table = pa.table(
                    {
                        "key": [f"{number:016x}" for number in rows],
                        "url": [f"http://{self.host}/{number}" for number in rows],
                        "alt_text": [None if number % 2 else "text" for number in rows],
                        "aesthetic": pa.array([6.5] * len(rows), pa.float32()),
                        "predictor": pa.array(["v2"] * len(rows)),
                        "passed_on": list(rows),
                    }
                )
                made.append(f"{split}-{index:05d}")
                with storage.publish(f"units/{made[-1]}.parquet") as file:
                    pq.write_table(table, file)
        return Tally(TRAIN + TEST + 5, TRAIN + TEST, {"small": 5}, extra={"units": made})


@pytest.fixture
def web() -> Iterator[Web]:
    web = Web()
    yield web
    web.server.shutdown()
    web.server.server_close()


class Run:
    """A root, and what the job does with it."""

    def __init__(self, root: Path, web: Web) -> None:
        self.storage, self.web, self.stage = Storage(root), web, web.download()
        first = Filter(web.host)
        self.filtered = run_unit(first, "_all", self.storage, fingerprint(first, None))

    @property
    def mark(self) -> str:
        return fingerprint(self.stage, self.filtered.fingerprint)

    def units(self, again: bool) -> list[str]:
        return retry.units(self.storage, self.filtered, self.stage, again)

    def images(self, units: list[str]) -> None:
        for unit in units:
            run_unit(self.stage, unit, self.storage, self.mark)

    def rows(self, unit: str) -> list[int]:
        path = Path(self.storage.url(f"units/{unit}.parquet"))
        return pq.read_table(path)["passed_on"].to_pylist()

    def kept(self) -> list[int]:
        """Numbers of the images of all units that would be sealed, in order."""
        units = unit_ids(self.storage, Ledger(self.storage, "units").done())
        paths = [Path(self.storage.url(f"images/{unit}.parquet")) for unit in units]
        return sorted(int(key, 16) for p in paths for key in pq.read_table(p)["key"].to_pylist())

    def summary(self) -> dict[str, Any]:
        accounts = {stage: Account.read(self.storage, stage) for stage in ("units", "images")}
        accounts["images"].less_retried(Ledger(self.storage, "units").each())
        nothing = {"captions": Account(), "features": Account()}
        summary = write_summary(self.storage, accounts | nothing)
        return summary["stages"]


@pytest.fixture
def run(tmp_path: Path, web: Web) -> Run:
    """Its first pass is over."""
    run = Run(tmp_path, web)
    run.images(run.units(again=False))
    return run


BUSY = [n for n in range(TRAIN + TEST) if n % 3 == 0]
ALIVE = [n for n in range(TRAIN + TEST) if n % 5 and n % 3]


def test_only_what_failed_in_passing_is_taken(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    first = run.units(again=False)
    units = run.units(again=True)
    said = capsys.readouterr().out
    assert "round 1 takes 8 rows" in said and "the same command goes on" in said
    assert units[: len(first)] == first
    new = units[len(first) :]
    assert new == ["test-r1-00000", "train-r1-00000", "train-r1-00001"]
    assert [split_of(unit) for unit in new] == ["test", "train", "train"]
    assert all(map(is_retry, new)) and not any(map(is_retry, first))
    assert [n for unit in new for n in run.rows(unit)] == [21, *range(0, 20, 3)]
    whole = pq.read_table(Path(run.storage.url("units/train-00000.parquet")))
    again = pq.read_table(Path(run.storage.url("units/train-r1-00000.parquet")))
    assert again.schema == whole.schema and again["alt_text"][1].as_py() is None
    marker = json.loads(run.storage.read_bytes("units/_done/retry-1.json"))
    assert marker["fingerprint"] == run.filtered.fingerprint
    assert marker["settings"] == run.filtered.settings


def test_rows_come_that_answer_now_and_the_others_wait_for_the_next_round(
    run: Run, web: Web, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.kept() == ALIVE
    web.awake |= {3, 6, 21}
    run.images(run.units(again=True))
    assert run.kept() == sorted([*ALIVE, 3, 6, 21])
    asked = web.asked.copy()
    web.awake |= {0, 9}
    run.images(run.units(again=True))
    rows = [n for unit in ("train-r2-00000",) for n in run.rows(unit)]
    assert rows == [0, 9, 12, 15, 18]  # neither 3 and 6, nor those that are gone
    assert run.kept() == sorted([*ALIVE, 3, 6, 21, 9])  # 0 is gone for good
    assert all(web.asked[n] == asked[n] for n in (1, 3, 5, 6, 21))
    web.awake |= set(BUSY)
    run.images(run.units(again=True))
    assert run.kept() == sorted([*ALIVE, 3, 6, 21, 9, 12, 18])  # 15 is gone
    capsys.readouterr()
    before = run.units(again=False)
    assert run.units(again=True) == before
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1 and "nothing to retry" in said[0]


def test_a_round_that_was_broken_off_goes_on_with_or_without_asking(
    run: Run, web: Web, capsys: pytest.CaptureFixture[str]
) -> None:
    units = run.units(again=True)
    web.awake |= set(BUSY)
    run.images(units[:-1])
    capsys.readouterr()
    assert run.units(again=False) == units
    assert run.units(again=True) == units
    assert "goes on with round 1, 1 of its units" in capsys.readouterr().out
    run.images(run.units(again=True))
    assert run.kept() == sorted({*ALIVE, *BUSY} - {0, 15})


def test_units_of_a_round_that_was_not_committed_are_dealt_again(run: Run) -> None:
    units = run.units(again=True)
    data = run.storage.read_bytes("units/train-r1-00000.parquet")
    run.storage.delete("units/_done/retry-1.json")
    assert run.units(again=False) == [unit for unit in units if not is_retry(unit)]
    assert run.units(again=True) == units
    assert run.storage.read_bytes("units/train-r1-00000.parquet") == data  # the same bytes


def test_units_that_were_not_ready_are_left_for_the_next_round(tmp_path: Path, web: Web) -> None:
    run = Run(tmp_path, web)
    first = run.units(again=False)
    run.images(["train-00001"])
    units = run.units(again=True)
    assert units == [*first, "train-r1-00000"] and run.rows("train-r1-00000") == [6, 9]
    run.images(units)
    second = run.units(again=True)
    taken = [n for unit in second[len(units) :] for n in run.rows(unit)]
    assert sorted(taken) == BUSY  # 6 and 9 from the first round, the others from the first pass
    assert len(set(taken)) == len(taken)


def test_images_made_anew_take_their_rounds_with_them(
    run: Run, web: Web, capsys: pytest.CaptureFixture[str]
) -> None:
    run.images(run.units(again=True))
    web.awake |= set(BUSY)
    run.stage = web.download(image_size=16)  # --redo images
    first = [unit for unit in run.units(again=False) if not is_retry(unit)]
    assert "retry-1 is dropped" in capsys.readouterr().out
    assert run.units(again=False) == first
    assert not run.storage.exists("units/_done/retry-1.json")
    assert not [path for path in run.storage.list("images/_done") if "-r1-" in path]
    Ledger(run.storage, "images").forget_others(run.mark)
    run.images(run.units(again=True))
    assert run.kept() == sorted({*ALIVE, *BUSY} - {0, 15})  # each once


def test_a_source_that_was_made_anew_by_hand_drops_the_round(run: Run, web: Web) -> None:
    run.images(run.units(again=True))
    web.awake |= set(BUSY)
    run.storage.delete("images/_done/train-00000.json")
    run.images(run.units(again=False))
    run.images(run.units(again=True))
    assert run.kept() == sorted({*ALIVE, *BUSY} - {0, 15})


def test_what_another_try_may_bring_is_counted_once(run: Run, web: Web) -> None:
    def shown() -> list[dict[str, int] | None]:
        account = accounts_of(run.storage)[0]["images"]
        return [dict(account.transient), run.summary()["images"]["transient"]]

    busy = len([n for n in BUSY if n % 15])  # the others are gone, once they are awake
    assert shown() == [{"http_503": len(BUSY)}] * 2
    units = run.units(again=True)
    assert shown() == [{}, {}]  # all of them are on their way
    web.awake |= {3, 21}
    run.images(units)
    assert shown() == [{"http_503": len(BUSY) - 2}] * 2
    web.awake |= set(BUSY)
    run.images(run.units(again=True))
    assert shown() == [{}, {}] and len(run.kept()) == len(ALIVE) + busy


def test_metadata_is_counted_once_and_retries_are_shown(run: Run, web: Web) -> None:
    before = run.summary()
    assert "retried" not in before["units"] and "retried" not in before["images"]
    web.awake |= {3, 21}
    run.images(run.units(again=True))
    stages = run.summary()
    assert stages["units"]["rows_in"] == TRAIN + TEST + 5
    assert stages["units"]["kept"] == TRAIN + TEST
    assert stages["units"]["retried"] == stages["images"]["retried"] == 8
    images = stages["images"]
    assert images["rows_in"] == TRAIN + TEST + 8
    assert images["kept"] == len(ALIVE) + 2
    assert images["rows_in"] == images["kept"] + sum(images["failed"].values())
    # every row of the filter has ended once
    assert images["kept"] + sum(images["failed"].values()) - images["retried"] == TRAIN + TEST


def test_a_round_whose_names_are_all_gone_is_an_outage(tmp_path: Path, web: Web) -> None:
    """`dns` is for good, so that nothing would ever try these rows again."""
    run = Run(tmp_path, web)
    run.images(run.units(again=False))

    def lookup(host: str, port: int) -> list[str]:
        raise socket.gaierror(said, "no name server")

    cfg = run.stage.cfg
    run.stage._fetcher = Fetcher(cfg, Resolver([], lookup=lookup))
    rows = pa.table({name: ["x"] * 8 for name in ("key", "alt_text", "predictor")})
    rows = rows.append_column("url", pa.array([f"http://gone{n}.example/" for n in range(8)]))
    rows = rows.append_column("aesthetic", pa.array([6.5] * 8, pa.float32()))
    with run.storage.publish("units/train-r1-00000.parquet") as file:
        pq.write_table(rows, file)
    said = socket.EAI_NONAME
    with pytest.raises(UserError, match="as if the network were down"):
        run_unit(run.stage, "train-r1-00000", run.storage, "x")
    assert not run.storage.exists("images/_done/train-r1-00000.json")
    said = socket.EAI_AGAIN  # those, the next round may take
    run.stage._fetcher = Fetcher(replace(cfg, retries=0), Resolver([], lookup=lookup))
    assert run_unit(run.stage, "train-r1-00000", run.storage, "x").tally.failed == {"dns": 8}


def test_a_round_of_dead_hosts_is_no_outage(tmp_path: Path, web: Web) -> None:
    web.server.shutdown()
    web.server.server_close()  # refused from here on
    run = Run(tmp_path, web)
    run.stage = web.download(outage_share=2.0)
    run.images(run.units(again=False))
    run.stage = web.download(outage_share=0.1)
    run.images(run.units(again=True))
    assert run.kept() == []
