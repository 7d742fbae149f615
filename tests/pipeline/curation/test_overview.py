"""Curation's part of the report: from markers at any size, from rows as an enemy writes them."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline import report
from pipeline.curation.overview import contact_sheet
from pipeline.curation.status import accounts_of, status
from pipeline.storage import Storage
from tests.made import HOSTILE, write_rows, write_run


def built(root: Path, **options: Any) -> str:
    report.build(Storage(root), **options)
    return (root / "report.html").read_text()


def test_a_run_that_goes_on_is_told_from_its_markers(tmp_path: Path) -> None:
    write_run(tmp_path, 40, done=[30, 20, 10])
    page = built(tmp_path, live=True)
    assert "Not sealed yet: 10 of 40 units are through every stage." in page
    assert "too_small 150, http_404 600, timeout 300" in page
    for title in (
        "Aesthetic score of the metadata", "Shorter side as it came", "Rows per second over time",
        "Length of the captions", "Most frequent subjects", "Failed in images",
    ):  # fmt: skip
        assert f'aria-label="{title}"' in page, title
    assert ">■ transient" in page and ">■ permanent" in page
    assert "Most rows lost" in page and "img19.example" in page
    assert "part-0.parquet" in page and "url = URL String" in page, "the schema report"
    assert "<td>model.sha256</td>" in page and "<td>min_aesthetic</td>" in page


def test_scores_are_drawn_where_they_were_computed(tmp_path: Path) -> None:
    """Of the metadata, of the images, or of both: never a chart without a row in it."""
    write_run(tmp_path, 10)
    done = tmp_path / "units/_done/_all.json"
    marker = json.loads(done.read_text())
    marker["tally"]["extra"]["scores"]["rows"] = [0, 0, 0]  # with filter.score table or computed
    done.write_text(json.dumps(marker))
    assert "Aesthetic score of" not in built(tmp_path, live=True)
    shutil.copytree(tmp_path / "images", tmp_path / "scores")
    for folder in ("scores", "captions"):
        for path in (tmp_path / folder / "_done").iterdir():
            marker = json.loads(path.read_text())
            if folder == "scores":
                marker["settings"]["min_aesthetic"] = 7.25
                marker["tally"]["extra"]["scores"] = {"edges": [0, 5, 10], "rows": [40, 25]}
            marker["settings"]["scores.enabled"] = True
            path.write_text(json.dumps(marker))
    for live in (True, False):
        if not live:  # as sealing sums it up
            accounts, _ = accounts_of(Storage(tmp_path))
            summary = {"stages": {name: found.to_json() for name, found in accounts.items()}}
            Storage(tmp_path).write_json("curation.json", summary)
        page = built(tmp_path, live=live)
        assert 'aria-label="Aesthetic score of the images"' in page and "7.25" in page
        assert "Aesthetic score of the metadata" not in page


def test_it_shows_the_markers_of_now_and_not_an_old_summary(tmp_path: Path) -> None:
    write_run(tmp_path, 10, done=[5, 5, 5])
    storage = Storage(tmp_path)
    storage.write_json("curation.json", {"stages": {"images": {"rows_in": 77, "kept": 77}}})
    assert "77" in re.sub(r"<style>.*</style>", "", built(tmp_path), flags=re.S)
    assert "<td>images</td><td>500</td>" in built(tmp_path, live=True)


def test_rows_that_were_tried_again_are_told(tmp_path: Path) -> None:
    names = write_run(tmp_path, 10)
    done = tmp_path / "images/_done"
    again = "train-r1-00000"
    (done / f"{again}.json").write_text(
        (done / f"{names[0]}.json").read_text().replace(names[0], again)
    )
    listed = tmp_path / "units/_done/_all.json"
    listed.write_text(listed.read_text().replace(f'"{names[0]}"', f'"{names[0]}", "{again}"', 1))
    assert "; 100 rows were tried again" in built(tmp_path, live=True)
    said = status(Storage(tmp_path))
    assert "images retried: 100 of the rows in came a second time" in said


def test_markers_without_the_new_counts_are_enough(tmp_path: Path) -> None:
    bare = {"hosts": None, "sizes": None, "words": None, "subjects": None, "transient": None}
    write_run(tmp_path, 10, extra=bare)
    page = built(tmp_path, live=True)
    assert "Failed in images" in page and "Most rows lost" not in page
    assert 'aria-label="Shorter side as it came"' not in page


def test_ten_thousand_units_are_a_small_page(tmp_path: Path) -> None:
    names = write_run(tmp_path, 10_000, done=[10_000, 2_000, 1_000])
    rows = [{"url": f"http://a.example/{n}", "caption": f"a cup {n}"} for n in range(200)]
    write_rows(tmp_path, names[-1], rows)
    page = built(tmp_path, live=True)
    assert "1,000,000" in page and page.count("<figcaption>") == 24
    assert len(page) < 2_000_000


def test_only_the_contact_sheet_opens_data_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = write_run(tmp_path, 50)
    for name in (names[0], names[10], names[11]):
        write_rows(tmp_path, name, [{"url": "http://a.example/x", "caption": "a cup"}])
    opened: list[str] = []
    real = Storage.open_input

    def spy(self: Storage, path: str) -> Any:
        opened.append(path)
        return real(self, path)

    monkeypatch.setattr(Storage, "open_input", spy)
    built(tmp_path, live=True)
    assert sorted(path.partition("/")[0] for path in opened) == 2 * ["captions"] + 2 * ["images"]


def test_rows_of_an_enemy_are_text(tmp_path: Path) -> None:
    write_rows(tmp_path, "train-00000", HOSTILE)
    page = built(tmp_path)
    body = page.partition("<body>")[2]
    assert "<script" not in body and "<a " not in body and "href" not in body
    assert "onerror=" not in body.replace("onerror=&#34;", "")
    assert "onmouseover=&#34;" in body and ' onmouseover="' not in body
    assert "javascript:alert(1)//x" in body, "shown, as text"
    assert "\u202e" not in body and "‹U+202E›" in body
    assert "hunter2" not in body and "deadbeef" not in body
    assert "{{ 7 * 7 }}" in body
    assert "(10,020 characters)" in body and len(page) < 1_000_000
    assert page.count("<figcaption>") == len(HOSTILE)


def test_old_files_without_url_and_subjects_are_shown_too(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from tests.made import jpeg

    for folder in ("images", "captions"):
        (tmp_path / folder).mkdir()
    images = pa.Table.from_pylist([{"key": "a", "image": jpeg(64)}, {"key": "b", "image": b"no"}])
    captions = [{"key": "a", "caption": "a cup"}, {"key": "b", "caption": "a fish"}]
    pq.write_table(images, tmp_path / "images/train-00000.parquet")
    pq.write_table(pa.Table.from_pylist(captions), tmp_path / "captions/train-00000.parquet")
    (sample,) = contact_sheet(Storage(tmp_path))
    assert sample["caption"] == "a cup" and sample["subjects"] == [] and sample["url"] == ""
