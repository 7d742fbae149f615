import base64
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline import charts, report
from pipeline.storage import Storage


def png(colour: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(buffer, format="PNG")
    return buffer.getvalue()


def parquet(rows: list[dict]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


class Balance(HTMLParser):
    """Fails on tags that do not close."""

    VOID = ("meta", "img", "path", "rect", "circle", "br")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def built(storage: Storage) -> str:
    assert report.build(storage) == storage.url("report.html")
    page = storage.read_bytes("report.html").decode()
    parser = Balance()
    parser.feed(page)
    assert parser.open == []
    assert not re.search(r'(src|href)="(?!data:)', page), "the page needs nothing but itself"
    return page


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(tmp_path / "run")


def fill(storage: Storage) -> None:
    stage = {
        "rows_in": 100,
        "kept": 60,
        "dropped": {"aesthetic": 30},
        "failed": {"dead <link>": 10},
        "rows_per_second": 50.0,
    }
    storage.write_json("curation.json", {"root": "x", "stages": {"units": stage, "images": stage}})
    rows = [{"key": f"{i:016x}", "image": png(), "caption": f"a <cup> {i}"} for i in range(40)]
    images = [{"key": row["key"], "image": row["image"]} for row in rows]
    storage.write_bytes("images/train-00000.parquet", parquet(images))
    captions = [{"key": row["key"], "caption": row["caption"]} for row in rows[10:]]
    storage.write_bytes("captions/train-00000.parquet", parquet(captions))
    for name in ("multi_scale", "semantic"):
        records = [{"step": s, "ldm": 1 / s, "reg": 0.1, "samples_per_s": 9.0} for s in (1, 2, 3)]
        lines = "\n".join([*map(json.dumps, records), '{"step": 4, "lo'])
        storage.write_bytes(f"train/{name}/metrics.jsonl", lines.encode())
    storage.write_bytes("grid.png", png("blue"))
    mean = {"mean": 0.9, "low": 0.8, "high": 0.95, "samples": 8, "clusters": 4}
    scores = {
        "bench": {"title": "mini scenes"},
        "measures": [{"name": "clip_t", "title": "CLIP-T", "better": "higher", "digits": 3}],
        "methods": {"ssr-text": {"title": "SSR", "native": True, "means": {"clip_t": mean}}},
    }
    storage.write_json("evaluation/mini/scores.json", scores)


def test_an_empty_root_names_the_jobs(storage: Storage) -> None:
    page = built(storage)
    for job in ("curate", "train", "generate", "evaluate"):
        assert f"python jobs/{job}.py" in page


# part of a run -> what only that part puts on the page
MARKS = {
    "curation.json": "dead &lt;link&gt; 10",
    "grid.png": base64.b64encode(png("blue")).decode(),
    "train": "Stage semantic",
    "evaluation": "<td>0.900<small>[0.800, 0.950]</small></td>",
}


def test_a_whole_run_is_on_the_page(storage: Storage) -> None:
    fill(storage)
    page = built(storage)
    assert "python jobs/" not in page
    assert "dead &lt;link&gt; 10" in page and "aesthetic 30" in page
    assert page.index("Stage semantic") < page.index("Stage multi_scale")
    assert "6</b><span>training steps" in page
    assert page.count('<svg class="chart"') == 9  # six of training, two of what failed, one measure
    assert page.count("<figcaption>") == 24 and "a &lt;cup&gt; 10" in page
    assert "a &lt;cup&gt; 9<" not in page, "only images that have a caption"
    assert base64.b64encode(png("blue")).decode() in page
    assert MARKS["evaluation"] in page and "mini scenes" in page
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in page


@pytest.mark.parametrize(
    "missing", ["curation.json", "grid.png", "images", "captions", "train", "evaluation"]
)
def test_any_part_may_be_missing(storage: Storage, missing: str) -> None:
    fill(storage)
    assert all(mark in built(storage) for mark in MARKS.values())
    storage.delete(missing)
    page = built(storage)
    for part, mark in MARKS.items():
        assert (mark in page) == (part != missing), part


@pytest.mark.parametrize("path", [
    "curation.json", "grid.png", "images/train-00000.parquet", "captions/train-00000.parquet",
    "train/semantic/metrics.jsonl", "evaluation/mini/scores.json",
])  # fmt: skip
@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\x00 broken",
        b"[1, 2]",
        b'{"stages": 3, "methods": []}',
        b"[" * 100_000,
        b'{"step": 1%s, "rows_in": 1%s}' % (b"0" * 400, b"0" * 400),
    ],
)
def test_any_part_may_be_broken(storage: Storage, path: str, data: bytes) -> None:
    fill(storage)
    storage.write_bytes(path, data)
    page = built(storage)
    for part, mark in MARKS.items():
        assert mark in page or path.startswith(part), part


def test_chart_leaves_out_what_is_not_finite() -> None:
    chart = charts.line_chart("loss", {"loss": [(1, 1.0), (2, math.nan), (3, math.inf), (4, 0.5)]})
    assert "nan" not in chart and "inf" not in chart and chart.count("<svg") == 1
    assert charts.line_chart("loss", {"loss": [(1, math.nan)], "other": []}) == ""


def test_a_logarithmic_chart_leaves_out_what_is_not_above_zero() -> None:
    points = [(1, 100.0), (2, 0.0), (3, -1.0), (4, 1.0), (5, 0.01)]
    chart = charts.line_chart("loss", {"loss": points}, log=True)
    drawn = re.findall(r'd="M([^"]+)" stroke', chart)[0].split("L")
    heights = [float(point.split()[1]) for point in drawn]
    assert len(drawn) == 3 and heights[1] == pytest.approx((heights[0] + heights[2]) / 2, abs=0.1)
    for tick in (">100<", ">1<", ">0.01<"):
        assert tick in chart
    assert charts.line_chart("loss", {"loss": [(1, 0.0)]}, log=True) == ""
    for low, high in ((0.37, 0.52), (0.2, 1.5), (1e-9, 1e9), (3.0, 3.0)):
        chart = charts.line_chart("loss", {"loss": [(1, low), (2, high)]}, log=True)
        assert 1 <= chart.count('class="g"') <= 6


def test_a_smoothed_line_stands_before_the_raw_one() -> None:
    noisy = [(float(n), 1.0 + n % 2) for n in range(200)]
    chart = charts.line_chart("loss", {"loss": noisy}, smooth=True)
    assert chart.count("stroke=") == 2 and chart.count('class="l pale"') == 1
    assert chart.index("pale") < chart.index('class="l"')
    smooth = [y for _, y in charts.smoothly(noisy)]
    assert smooth[0] == 1.0 and all(1.3 < y < 1.7 for y in smooth[20:])
    few = [(1.0, 1.0), (2.0, 5.0)]
    assert charts.smoothly(few) == few


def test_chart_of_one_point_and_of_a_flat_line() -> None:
    assert "<circle" in charts.line_chart("x", {"x": [(5, 2.0)]})
    assert "<path" in charts.line_chart("x", {"x": [(1, 0.0), (2, 0.0)]})


def test_intervals_stand_on_one_scale() -> None:
    rows = [("a <b>", 0.5, 0.4, 0.6), ("nan", math.nan, 0.0, 1.0), ("alone", 0.8, None, None)]
    chart = charts.intervals("x", [*rows, ("astray", 0.6, math.inf, 0.1)])
    dots = [float(x) for x in re.findall(r'<circle cx="([^"]+)"', chart)]
    (whisker,) = re.findall(r'd="M([0-9.]+) [0-9.]+H([0-9.]+)M', chart)
    assert len(dots) == 3 and "a &lt;b&gt;" in chart and "nan" not in chart and "inf" not in chart
    assert float(whisker[0]) < dots[0] < float(whisker[1]) == dots[2] < dots[1]
    assert dots[0] == pytest.approx((float(whisker[0]) + float(whisker[1])) / 2, abs=0.2)
    assert charts.intervals("x", [rows[1]]) == charts.intervals("x", []) == ""
    assert "<circle" in charts.intervals("x", [("one", 1.0, 1.0, 1.0)])


def test_long_lines_are_thinned_and_keep_their_end() -> None:
    chart = charts.line_chart("x", {"x": [(i, float(i)) for i in range(100_000)]})
    assert len(chart) < 20_000 and "100k" not in chart.split("<path")[0]
