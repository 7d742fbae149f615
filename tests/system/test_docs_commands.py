"""The commands of the documentation, run in the order of their page, in one folder.

As a reader runs them, on the mini world in its shortest form: a command that names no preset gets
`--preset mini-short` and the root that the pages speak of. tests/documented.py says which are not
run and why; it is printed by tests/test_docs_commands.py.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from pipeline.evaluation.benches import mini_bench
from tests.documented import PAGES, ROOT, Command, fenced
from tests.ports import free_port

pytestmark = [pytest.mark.system, pytest.mark.timeout(1800)]
SHORT = "mini-short"
ROOTED = ("curate", "train", "generate", "evaluate")
INSTEAD = {
    r"export --root ROOT --stage 1 --step 50000": "export --root runs/mini --stage 1 --step 12",
    r"(--calibrate|(?:status|report) --root) s3://\S+": r"\1 runs/mini",
}
"""Words of the pages that stand for the reader's own, and what they are here."""
RUN = {page: [each for each in fenced(page) if not each.why_not] for page in PAGES}
HERE = ("generate.py", "plan.py")
"""Jobs that start no other process, and are shown again and again."""
WITH_PYTHON = ["docs/generate.md"]
"""Pages whose Python makes what their commands take; tests/test_docs.py runs that of others."""
OTHERS = [page for page in PAGES if RUN[page] and page != "README.md"]


@functools.cache
def site_port() -> int:
    """One for all: the run at a root goes on with its site."""
    return free_port()


def small(command: Command) -> list[str]:
    """The command's words as they are run here."""
    text = shlex.join(command.words)
    for words, ours in INSTEAD.items():
        text = re.sub(words, ours, text)
    words = shlex.split(text)
    job = re.fullmatch(r"jobs/(\w+)\.py", words[1]) if words[0] == "python" else None
    if job:
        begins = len(words) == 2 or words[2].startswith("--")
        words[1] = str(ROOT / words[1])
        if job[1] in ROOTED and begins:
            words += ["--preset", SHORT] if "--preset" not in words else []
            words += ["--root", "runs/mini"] if "--root" not in words else []
        if job[1] == "curate" and begins:
            words += ["--website.port", str(site_port())]
            # the preset's 2 s are short on a busy machine: three late images are a dead site
            words += ["--download.timeout_s", "10"]
    return [sys.executable, *words[1:]] if words[0] == "python" else words


def spread(words: list[str], folder: Path) -> list[str]:
    """As a shell does it: a word that names files by a pattern becomes those files."""
    found = [sorted(folder.glob(word)) if "??" in word else [] for word in words]
    return [
        str(each)
        for word, files in zip(words, found, strict=True)
        for each in ([path.relative_to(folder) for path in files] or [word])
    ]


def run_here(words: list[str], command: Command, folder: Path) -> str:
    """A job in this process: what it imports, which is most of its time, stays for the next."""
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.chdir(folder)
        patch.setattr(sys, "argv", words)
        try:
            runpy.run_path(words[0], run_name="__main__")
        except SystemExit as end:
            assert not end.code, f"{command}\n{said.getvalue()}"
    return said.getvalue()


def run(command: Command, folder: Path) -> str:
    """What it printed; it fails where the command does, with all that it said."""
    words = spread(small(command), folder)
    if Path(words[1]).name in HERE:
        return run_here(words[1:], command, folder)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        words,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    assert "Traceback" not in done.stderr, f"{command}\n{done.stderr[-3000:]}"
    return done.stdout


def python(page: str) -> list[tuple[int, str]]:
    """(line, code) of the page's blocks of Python."""
    text = (ROOT / page).read_text()
    blocks = re.finditer(r"^```python\n(.*?)^```$", text, re.M | re.S)
    return [(text.count("\n", 0, block.start()) + 1, block[1]) for block in blocks]


def lay_out(folder: Path) -> None:
    """What the pages assume: pictures with captions, a mask, a bench, models, manifests."""
    (folder / "photos").mkdir()
    for index, scene in enumerate(mini_bench(12, side=64)):
        names = " and ".join(f"a {subject.name}" for subject in scene.subjects)
        scene.image.save(folder / f"photos/{index:02}.jpg")
        (folder / f"photos/{index:02}.txt").write_text(f"{names} on grass\n")
    first, second = mini_bench(2, side=64)
    for name in ("cup.png", "a.png", "rex.jpg"):
        first.image.save(folder / name)
    second.image.save(folder / "b.png")
    Image.fromarray(second.subjects[0].masks[0]).save(folder / "b-mask.png")
    bench = folder / "FOLDER"
    (bench / "my_cup").mkdir(parents=True)
    first.image.save(bench / "my_cup/00.jpg")
    page = (ROOT / "docs/benches.md").read_text()
    (classes,) = re.findall(r"^```text\n(.*?)^```$", page, re.M | re.S)
    classes = classes.replace("my_dog,dog\n", "")
    (bench / "prompts_and_classes.txt").write_text(classes)
    shutil.copytree(bench, folder / "dreambooth")
    weights = folder / "pipeline/miniworld/weights"
    weights.parent.mkdir(parents=True)
    weights.symlink_to(ROOT / "pipeline/miniworld/weights")
    shutil.copytree(ROOT / "infra", folder / "infra", ignore=shutil.ignore_patterns("__pycache__"))


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, str]]]:
    """The folder in which README's commands were run, and what each of them said."""
    folder = tmp_path_factory.mktemp("reader")
    lay_out(folder)
    said = {str(command): run(command, folder) for command in RUN["README.md"]}
    shutil.copytree(folder / "runs/mini/evaluation", folder / "runs/another/evaluation")
    yield folder, said


def test_readme(said: tuple[Path, dict[str, str]]) -> None:
    folder, texts = said
    jobs = {command.words[1] for command in RUN["README.md"]}
    assert {f"jobs/{job}.py" for job in ROOTED} <= jobs
    for made in ("features/manifest.json", "model/model.safetensors", "grid.png", "report.html"):
        assert (folder / "runs/mini" / made).is_file(), made
    assert (folder / "runs/mini/evaluation/mini/scores.json").is_file()
    own = [text for command, text in texts.items() if "--image" in command]
    assert len(own) == 2 and all("pictures: " in text for text in own)


@pytest.mark.parametrize("page", OTHERS)
def test_page(
    page: str, said: tuple[Path, dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = said
    before = set(folder.rglob("*"))
    monkeypatch.chdir(folder)
    steps: list[tuple[int, Command | str]] = [(each.line, each) for each in RUN[page]]
    steps += python(page) if page in WITH_PYTHON else []
    for _, command in sorted(steps, key=lambda step: step[0]):
        if isinstance(command, str):
            exec(compile(command, page, "exec"), {})
            continue
        text = run(command, folder)
        assert text.strip() or set(folder.rglob("*")) != before, f"{command} did nothing"
