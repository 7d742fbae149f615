"""The report in a real browser: on a phone, on a desk and in print, with rows as an enemy writes
them. Skipped where no Chromium is installed (apt-get install chromium).
"""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from pipeline import report
from pipeline.storage import Storage
from tests.made import HOSTILE, write_rows, write_run, write_training

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next((found for name in NAMES if (found := shutil.which(name))), None)
pytestmark = [
    pytest.mark.system,
    pytest.mark.timeout(300),
    pytest.mark.skipif(BROWSER is None, reason="no Chromium here: apt-get install chromium"),
]
# What the browser made of the page, told to the frame around it.
PROBE = """<script>
addEventListener("load", () => parent.postMessage(JSON.stringify({
  title: document.title,
  wide: document.documentElement.scrollWidth - innerWidth,
  images: document.images.length,
  broken: [...document.images].filter(image => !image.naturalWidth).length,
  links: document.links.length,
  scripts: document.scripts.length - 1,
  handlers: document.querySelectorAll("[onerror], [onmouseover], [onload]").length,
  fetched: performance.getEntriesByType("resource").filter(e => !e.name.startsWith("data:")).length,
  charts: [...document.querySelectorAll("svg.chart")].filter(c => c.clientHeight > 50).length,
  captions: [...document.querySelectorAll("figcaption")].map(c => c.innerText),
}), "*"))
</script>"""
FRAME = """<!doctype html><title>frame</title><pre id="told"></pre>
<script>addEventListener("message", e => document.getElementById("told").textContent = e.data)
</script><iframe src="probed.html" width="{width}" height="900"></iframe>"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a run that goes on, hostile rows first, with a probe beside it."""
    root = tmp_path_factory.mktemp("run")
    names = write_run(root, 60, done=[50, 40, 30])
    rows = [{"url": f"http://a.example/{n}.jpg", "caption": f"a cup {n}"} for n in range(20)]
    write_rows(root, names[10], [*HOSTILE, *rows])
    write_training(root)
    report.build(Storage(root), live=True)
    text = (root / "report.html").read_text()
    # the page itself forbids every script: the probe's has to run, and an enemy's could
    text = text.replace("default-src 'none'", "default-src 'none'; script-src 'unsafe-inline'")
    (root / "probed.html").write_text(text.replace("</body>", PROBE + "</body>"))
    return root / "report.html"


def browse(page: Path, profile: Path, *options: str) -> str:
    assert BROWSER is not None
    done = subprocess.run(
        [
            BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu",
            "--virtual-time-budget=60000", f"--user-data-dir={profile}", *options, page.as_uri(),
        ],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def seen(page: Path, profile: Path, width: int) -> dict[str, Any]:
    frame = page.with_name(f"frame-{width}.html")
    frame.write_text(FRAME.format(width=width))
    found = re.search(r'<pre id="told">(.+?)</pre>', browse(frame, profile, "--dump-dom"), re.S)
    assert found, "the page told nothing"
    return json.loads(html.unescape(found[1]))


@pytest.mark.parametrize("width", [360, 1280])
def test_it_opens_whole_and_harmless(page: Path, tmp_path: Path, width: int) -> None:
    told = seen(page, tmp_path, width)
    assert told["title"].startswith("SSR on Ray: "), "a script of a caption ran"
    assert told["scripts"] == told["handlers"] == told["links"] == told["fetched"] == 0
    assert told["images"] == 24 + 8 and told["broken"] == 0
    assert told["charts"] == 6 + 9
    assert told["wide"] <= 0, "the page scrolls sideways"
    assert told["captions"][0].startswith("<script>document.title='owned'</script> a cup")
    assert "javascript:alert(1)//x" in told["captions"][0]


def test_it_prints(page: Path, tmp_path: Path) -> None:
    pdf = tmp_path / "report.pdf"
    browse(page, tmp_path / "profile", f"--print-to-pdf={pdf}", "--no-pdf-header-footer")
    data = pdf.read_bytes()
    pages = len(re.findall(rb"/Type\s*/Page[^s]", data))
    assert data.startswith(b"%PDF") and 1 <= pages <= 11
