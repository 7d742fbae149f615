"""A WebDataset through the whole job: curated, looked at, run again, and exported."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.shards import Manifest
from pipeline.storage import Storage
from tests.pipeline.curation.webdataset.test_tar_units import GIVEN, put
from tests.system.jobs import run_job

pytestmark = [pytest.mark.system, pytest.mark.timeout(600)]


def test_tars_become_shards_and_tars(tmp_path: Path, tiny_models: Path) -> None:
    tars, root, out = put(tmp_path / "tars"), tmp_path / "run", tmp_path / "out"
    settings = {
        "preset": "finetune-sd15", "root": root, "webdataset.inputs": tars, "filter.unit_rows": 6,
        "filter.test_rows": 3, "download.image_size": 32, "download.min_image_size": 16,
        "features.row_group_mib": 0.1, "models.base": tiny_models / "sd",
        "models.vision": tiny_models / "clip",
    }  # fmt: skip
    said = run_job("curate", **settings)
    assert "filter:   kept 15 of 15 rows (dropped: none)" in said
    manifest = Manifest.load(Storage(root))
    assert (manifest.rows("train"), manifest.rows("test")) == (12, 3)
    assert not (root / "scan").exists()
    stamps = {path: path.stat().st_mtime_ns for path in root.rglob("*.parquet")}
    run_job("curate", **settings)
    assert stamps == {path: path.stat().st_mtime_ns for path in root.rglob("*.parquet")}
    assert "sealed, 3 units" in run_job("curate", "status", root=root)

    said = run_job("curate", "export", root=root, out=out, rows=100)
    assert f"exported: {out} (12 samples in 1 tars" in said
    texts = (out / "train-00000.tar").read_bytes()
    assert sum(GIVEN.format(n).encode() in texts for n in range(15)) >= 12
