"""The site builds without a warning, needs nothing from elsewhere, and its links lead somewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import defaultdict
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

import pytest

pytestmark = pytest.mark.timeout(900)
ROOT = Path(__file__).resolve().parents[1]
FETCHED = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src"}
FETCHED |= {"video": "src", "audio": "src", "embed": "src", "object": "data"}
BLOCKS = re.compile(r"^\s*([-*] |\d+\. |\||```)", re.M)
"""How a list, a table or a fence begins, where Markdown has not taken it for one."""


class Seen(HTMLParser):
    """A page's anchors, links, what a browser fetches for it, and the texts of its paragraphs."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.paragraphs: list[str] = []
        self.styles: list[str] = []
        self.scripts: list[str] = []
        self._inside: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if tag in FETCHED and FETCHED[tag] in given:
            self.fetched.append(given[FETCHED[tag]])
        if tag == "p":
            self.paragraphs.append("")
        if tag in ("p", "code", "style", "script"):
            self._inside.append(tag)
        self.styles.append(given.get("style", ""))

    def handle_endtag(self, tag: str) -> None:
        if tag in self._inside:
            self._inside.remove(tag)

    def handle_data(self, data: str) -> None:
        if "style" in self._inside:
            self.styles.append(data)
        elif "script" in self._inside:
            self.scripts.append(data)
        elif "p" in self._inside and "code" not in self._inside:
            self.paragraphs[-1] += data


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=800
    )
    assert built.returncode == 0, built.stderr
    assert "WARNING" not in built.stderr, built.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[str, Seen]:
    return {
        path.relative_to(site).as_posix(): Seen(path.read_text()) for path in site.rglob("*.html")
    }


def test_every_page_is_there(site: Path, pages: dict[str, Seen]) -> None:
    named = re.findall(r":\s*([\w/]+)\.(?:md|ipynb)$", (ROOT / "mkdocs.yml").read_text(), re.M)
    assert len(named) > 35
    assert not [name for name in named if f"{name}.html" not in pages]
    written = [path.relative_to(ROOT / "docs").with_suffix(".html").as_posix()
               for path in (ROOT / "docs").rglob("*.md")]  # fmt: skip
    assert not [name for name in written if name not in pages]
    assert (site / "search" / "search_index.json").stat().st_size > 100_000


def test_nothing_comes_from_elsewhere(site: Path, pages: dict[str, Seen]) -> None:
    for name, page in pages.items():
        strange = [url for url in page.fetched if urlsplit(url).scheme not in ("", "data")]
        strange += [url for url in page.fetched if url.startswith("//")]
        assert not strange, f"{name} fetches {strange}"
        loaded = [style for style in page.styles if re.search(r"url\(['\"]?(https?:)?//", style)]
        loaded += [style for style in page.styles if re.search(r"@import\s", style)]
        assert not loaded, f"{name}: {loaded[0][:200]}"
        for script in page.scripts:
            assert not re.search(r"(import|src|fetch)\W{1,4}https?://", script), name
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(url\(['\"]?(https?:)?//|@import)", sheet.read_text()), sheet


def test_links_and_anchors_resolve(site: Path, pages: dict[str, Seen]) -> None:
    wrong = defaultdict(list)
    followed = 0
    for name, page in pages.items():
        if name == "404.html":  # its links are from the root of a server
            continue
        for link in page.links + page.fetched:
            path, anchor = urldefrag(unquote(link))
            if urlsplit(link).scheme or link.startswith("//"):
                continue
            target = (site / name).parent / path if path else site / name
            target = target.resolve()
            inside = target.relative_to(site.resolve()).as_posix()
            if target.is_dir():
                inside = (target / "index.html").relative_to(site.resolve()).as_posix()
            there = (site / inside).is_file()
            if not there or (anchor and anchor not in pages[inside].anchors):
                wrong[name].append(link)
            followed += 1
    assert not wrong and followed > 2000


def test_lists_and_tables_are_what_they_look_like(pages: dict[str, Seen]) -> None:
    """What the hub shows as a list or a table, the site does too."""
    for name, page in pages.items():
        if not name.startswith(("api/", "source/")):
            flat = [text for text in page.paragraphs if BLOCKS.search(text)]
            assert not flat, f"{name}: {flat[0][:300]}"


def test_the_reference_shows_what_is_public(site: Path) -> None:
    """Objects of the code, and a setting with its default and what it is."""
    shown = {
        "api/model.html": ["SSREncoder.from_pretrained", "Subject.region", "losses.reg_loss"],
        "api/storage.html": ["storage.Storage", "units.Ledger.commit", "units.Tally.check"],
        "api/shards.html": ["shards.ShardWriter.write", "shards_tables.FeatureShards.arrays"],
        "api/drawing.html": ["recipe.Recipe", "sampler.Sampler.make", "artist.Artist.draw"],
        "api/settings.html": ["TrainConfig.micro_batch", "ServeConfig.queue", "PlanConfig.gpus"],
    }
    for name, objects in shown.items():
        text = (site / name).read_text()
        for each in objects:
            assert re.search(rf'id="[\w.]*{re.escape(each)}"', text), f"{name} lacks {each}"
    settings = (site / "api/settings.html").read_text()
    assert "Requests that may wait at a replica" in settings
