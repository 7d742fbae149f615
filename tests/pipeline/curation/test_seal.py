import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.accounts import Account
from pipeline.curation.fidelity import Fidelity
from pipeline.curation.seal import SUMMARY, seal, write_summary
from pipeline.errors import UserError
from pipeline.shards import MANIFEST, Manifest, ShardWriter, Tensor
from pipeline.storage import Storage
from pipeline.units import Ledger, Tally, chain, run_unit

UNITS = {"train-00000": 5, "train-00001": 0, "test-00000": 2}
ENCODERS = {role: {"name": role, "sha256": role * 3} for role in ("vision", "vae", "text")}
TENSORS = [Tensor("latent_mean", (2, 3), "float16"), Tensor("clip_4", (3, 4), "float16")]


class Filter:
    """Makes the units' files itself; its own sink stays empty."""

    name, source = "units", None
    settings: dict[str, Any] = {"min_aesthetic": 6.0}  # noqa: RUF012

    def __call__(self, unit: str, storage: Storage, sink: BinaryIO) -> Tally:
        for name, rows in UNITS.items():
            write_keys(storage, f"units/{name}.parquet", rows + 1)
        kept = sum(UNITS.values()) + len(UNITS)
        return Tally(kept + 4, kept, dropped={"aesthetic": 4}, extra={"units": list(UNITS)})


class Keys:
    """A stage that loses one row a unit, in the first of its kind."""

    settings: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, name: str, source: str, failed: dict[str, int]) -> None:
        self.name, self.source, self.failed = name, source, failed

    def __call__(self, unit: str, storage: Storage, sink: BinaryIO) -> Tally:
        rows_in = UNITS[unit] + (self.source == "units")
        kept = rows_in - sum(self.failed.values())
        pq.write_table(pa.table({"key": [str(i) for i in range(kept)]}), sink)
        return Tally(rows_in, kept, failed=self.failed)


class Shards:
    name, source = "features", "captions"
    settings: dict[str, Any] = {"codec": "float16", **ENCODERS}  # noqa: RUF012

    def __call__(self, unit: str, storage: Storage, sink: BinaryIO) -> Tally:
        rows = UNITS[unit]
        writer = ShardWriter(sink, TENSORS, row_group_bytes=2 * sum(t.nbytes for t in TENSORS))
        columns: dict[str, Any] = {
            tensor.name: np.ones((rows, *tensor.shape), tensor.dtype) for tensor in TENSORS
        }
        text = ["x"] * rows
        text_columns = dict.fromkeys(("key", "url", "caption", "predictor"), text)
        scalars = {**text_columns, "aesthetic": [6.5] * rows, "subjects": [text] * rows}
        writer.write({**columns, **scalars})
        writer.close()
        return Tally(rows, rows, extra={"row_groups": writer.row_groups, "depths": [4]})


class LossyShards(Shards):
    """Shards of int8, whose units tell their error."""

    settings: dict[str, Any] = {"codec": "int8", **ENCODERS}  # noqa: RUF012

    def __call__(self, unit: str, storage: Storage, sink: BinaryIO) -> Tally:
        tally = super().__call__(unit, storage, sink)
        fidelity = Fidelity()
        for row in range(tally.kept):  # squares of errors and of states, worst cosine
            fidelity.add({4: np.array([[row * 1e-4, 1.0 + row, 1 - row * 1e-3]], np.float32)})
        return replace(tally, extra=tally.extra | {"codec_error": fidelity.figures()})


def write_keys(storage: Storage, path: str, rows: int) -> None:
    with storage.publish(path) as sink:
        pq.write_table(pa.table({"key": [str(i) for i in range(rows)]}), sink)


def curate(root: Path, units: list[str] | None = None, shards: type[Shards] = Shards) -> Storage:
    storage = Storage(str(root))
    stages = [
        Filter(),
        Keys("images", "units", {"http_404": 1}),
        Keys("captions", "images", {}),
        shards(),
    ]
    prints = chain(stages)
    run_unit(stages[0], "_all", storage, prints["units"])
    for stage in stages[1:]:
        for unit in UNITS if units is None else units:
            run_unit(stage, unit, storage, prints[stage.name])
    return storage


def test_the_manifest_lists_every_shard_that_holds_rows(tmp_path: Path) -> None:
    storage = curate(tmp_path)
    manifest = seal(storage)
    assert manifest == Manifest.load(storage)
    assert [(shard["path"], shard["split"]) for shard in manifest.shards] == [
        ("features/train-00000.parquet", "train"),
        ("features/test-00000.parquet", "test"),
    ]
    train = manifest.shards[0]
    data = (tmp_path / train["path"]).read_bytes()
    assert train["sha256"] == hashlib.sha256(data).hexdigest() and train["bytes"] == len(data)
    assert train["rows"] == 5 and train["row_groups"] == [2, 2, 1]
    assert manifest.depths == [4] and manifest.encoders == ENCODERS and manifest.codec == "float16"
    assert manifest.tensors == {
        "latent_mean": {"shape": [2, 3], "dtype": "float16"},
        "clip_4": {"shape": [3, 4], "dtype": "float16"},
    }


def test_the_manifest_has_the_error_of_all_units_together(tmp_path: Path) -> None:
    manifest = seal(curate(tmp_path, shards=LossyShards))
    assert manifest.codec == "int8"
    rows = [*range(5), *range(2)]  # of the two units that hold any
    relative = (sum(row * 1e-4 for row in rows) / sum(1 + row for row in rows)) ** 0.5
    assert manifest.codec_error["4"] == {
        "relative_rms": pytest.approx(relative, rel=1e-3),
        "worst_cosine": pytest.approx(0.996),
    }
    assert seal(curate(tmp_path / "plain")).codec_error == {}


class Captions(Keys):
    """Made from the images that the stage of scores kept."""

    settings: dict[str, Any] = {"scores.enabled": True}  # noqa: RUF012


def test_scores_are_in_the_summary_of_a_run_that_has_them(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    stages = [
        Filter(),
        Keys("images", "units", {"http_404": 1}),
        Keys("scores", "images", {}),
        Captions("captions", "scores", {}),
        Shards(),
    ]
    prints = chain(stages)
    run_unit(stages[0], "_all", storage, prints["units"])
    for stage in stages[1:]:
        for unit in UNITS:
            run_unit(stage, unit, storage, prints[stage.name])
    seal(storage)
    summary = storage.read_json(SUMMARY)["stages"]
    assert list(summary) == ["units", "images", "scores", "captions", "features"]
    assert summary["scores"]["kept"] == summary["captions"]["rows_in"] == 7


def test_the_summary_accounts_for_every_row(tmp_path: Path) -> None:
    storage = curate(tmp_path)
    seal(storage)
    summary = storage.read_json(SUMMARY)
    stages = summary["stages"]
    assert list(stages) == ["units", "images", "captions", "features"]
    counts = {"units": 1, "rows_in": 14, "kept": 10, "dropped": {"aesthetic": 4}, "failed": {}}
    assert stages["units"].items() >= {**counts, "bytes": 0}.items()
    assert stages["images"]["failed"] == {"http_404": 3}
    for before, after in zip(list(stages.values()), list(stages.values())[1:], strict=False):
        assert before["kept"] == after["rows_in"]
    assert summary["splits"] == {"train": 5, "test": 2}


def test_sealing_again_gives_the_same_manifest(tmp_path: Path) -> None:
    storage = curate(tmp_path)
    seal(storage)
    first = (tmp_path / MANIFEST).read_bytes()
    assert sum(b".parquet" in line for line in first.splitlines()) == 2  # a line each
    seal(storage)
    assert (tmp_path / MANIFEST).read_bytes() == first


def test_unfinished_units_are_named_and_nothing_is_sealed(tmp_path: Path) -> None:
    storage = curate(tmp_path, ["train-00000"])
    with pytest.raises(UserError, match="2 of 3 units are unfinished"):
        seal(storage)
    assert not storage.exists(MANIFEST)


def test_a_unit_of_an_earlier_filter_is_not_sealed(tmp_path: Path) -> None:
    storage = curate(tmp_path)
    ledger = Ledger(storage, "features")
    marker = ledger.done()["test-00000"]
    marker.unit = "test-00009"
    ledger.commit("test-00009", marker)
    assert len(seal(storage).shards) == 2


def test_units_of_two_settings_are_not_sealed(tmp_path: Path) -> None:
    storage = curate(tmp_path)
    ledger = Ledger(storage, "images")
    marker = ledger.done()["test-00000"]
    marker.fingerprint = "0" * 16
    ledger.commit("test-00000", marker)
    with pytest.raises(UserError, match="other settings"):
        seal(storage)
    assert not storage.exists(MANIFEST)


def test_nothing_left_says_where_the_reasons_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for unit in UNITS:
        monkeypatch.setitem(UNITS, unit, 0)
    storage = curate(tmp_path)
    with pytest.raises(UserError, match="no row is left"):
        seal(storage)
    assert json.loads((tmp_path / SUMMARY).read_text())["stages"]["features"]["kept"] == 0


def test_no_units_at_all(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no units yet"):
        seal(Storage(str(tmp_path)))


def test_a_summary_of_nothing_is_still_a_summary(tmp_path: Path) -> None:
    empty = {stage: Account() for stage in ("units", "images", "captions", "features")}
    assert write_summary(Storage(str(tmp_path)), empty)["stages"]["images"]["rows_in"] == 0
