"""The commands of the documentation: where they stand, what cannot be run here and why, and what
can be said of a command without running it.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pipeline import command_line

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md")),
    *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "infra").rglob("README.md")),
]
_FENCE = re.compile(r"^( *)```(?:bash|sh|console)\n(.*?)^ *```", re.M | re.S)
_INLINE = re.compile(r"`((?:python|make|ray job submit) [^`]+)`")

NOT_RUN = {
    r"^make demo\b": "the demo; tests/system/test_demo.py::test_submitted_jobs_curate_and_train and"
    " tests/system/test_demo.py::test_pictures_after_a_kill run its commands",
    r"^make (test|quick|chaos)\b": "this suite itself",
    r"^make (venv|lavis-env)\b": "installs for minutes; tests/test_make.py::"
    "test_make_without_a_fitting_python_is_one_line runs what comes before",
    r"^make (docs|serve|lint|format|infra|audit|sbom|secrets|lock|clean)\b": "a target of make",
    r"^(make image|docker)\b": "builds for minutes, pushes to a registry; tests/infra/"
    "test_docker.py::test_the_whole_image_works runs what is built",
    r"^source |^export |^openssl ": "sets the reader's own shell, or token",
    r"^ray job submit\b": "needs a cluster; tests/system/test_demo.py::"
    "test_submitted_jobs_curate_and_train submits the same jobs to one",
    r"^python jobs/(plan\.py|curate\.py (status|report)\b)": "",
    r"--preset laion-sd15\b": "LAION, and GPUs",
    r"--preset (sd15-h800|sd15-bench)\b": "Stable Diffusion 1.5, and GPUs",
    r"--preset finetune-sd15 .*--webdataset\.": "Stable Diffusion 1.5; tests/system/"
    "test_webdataset.py::test_tars_become_shards_and_tars",
    r"--preset finetune-sd15\b|--root runs/dogs\b": "Stable Diffusion 1.5; tests/system/"
    "test_finetune.py::test_a_folder_of_ones_own",
    r"--preset mini-(ablation|choices)\b": "trains for half an hour; tests/system/"
    "test_evaluate.py::test_an_ablation_is_killed_and_goes_on",
    r"--methods .*dreambooth-lora": "learns for many minutes; tests/pipeline/evaluation/"
    "test_tuned_methods.py::test_a_lora_is_learned and tests/pipeline/evaluation/"
    "test_tuned_methods.py::test_a_word_is_learned",
    r"--bench dreambooth\b": "a bench from GitHub; tests/pipeline/evaluation/"
    "test_folder_benches.py::test_dreambench_as_published",
    r"^(git clone|pip install) ": "the network",
    r"--caption\.captions_per_image|--features\.codec int8": "curates once more; tests/system/"
    "test_curate_codecs.py and tests/pipeline/curation/captioning/test_caption.py run the settings",
    r"--retry_failed true": "of a run on the web; tests/system/test_curate.py runs the setting",
    r"s3://|gs://": "a bucket; tests/system/test_curate.py::"
    "test_an_s3_root_holds_the_same_shards_and_nobody_tells_the_credentials",
    r"^(kubectl|helm)\b": "a Kubernetes cluster; tests/infra/test_manifests.py::"
    "test_jobs_start_by_label_and_nothing_else_does",
    r"^python -m infra\.checks\b": "kustomize; tests/infra/test_lints.py::"
    "test_a_site_of_its_own_has_no_placeholders",
    r"^(aws|mc|envsubst)\b": "an account; tests/system/test_policies.py enforces the policies",
    r"^python jobs/serve\.py|^curl\b": "a server; tests/system/test_serve.py::"
    "test_the_documentations_requests_are_answered asks one in the words of docs/serving.md",
    r"^python -m pipeline\.training\.all_reduce\b": "tests/pipeline/training/"
    "test_all_reduce.py::test_workers_add_up_and_a_floor_is_told runs it",
    r"^python benchmarks/": "measures for minutes; tests/test_benchmarks.py runs it small",
}
"""Why a command is not run, the first that fits. What it names as tests has to be there. An empty
reason: it is run.
"""
PROGRAMS = {"cp", "grep", "head", "export", "source", "docker", "kubectl", "helm", "git", "aws"}
PROGRAMS |= {"mc", "envsubst", "curl", "pip", "openssl"}
"""Other programs that the pages call; of their words, paths of the repository are checked."""


@dataclass(frozen=True)
class Command:
    page: str
    """From the repository's root."""
    line: int
    text: str
    """One line, without its comment."""

    @property
    def words(self) -> list[str]:
        """Without assignments before it and redirections behind it."""
        words = shlex.split(self.text, comments=True)
        while words and re.match(r"[A-Z_]+=", words[0]):
            words.pop(0)
        ends = [i for i, word in enumerate(words) if word in ("<", ">", "&", "|", "&&")]
        return words[: ends[0]] if ends else words

    @property
    def why_not(self) -> str:
        """Why it is not run; empty = it is."""
        plain = shlex.join(self.words)
        return next((why for form, why in NOT_RUN.items() if re.search(form, plain)), "")

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {self.text}"


def fenced(page: str) -> list[Command]:
    """The commands of a page's shell blocks, in order."""
    text = (ROOT / page).read_text()
    return [
        Command(page, number, command)
        for block in _FENCE.finditer(text)
        for number, command in _lines(block[2], text.count("\n", 0, block.start(2)) + 1)
    ]


def inline(page: str) -> list[Command]:
    """Commands of ours that a page's sentences and tables name."""
    blocks = re.compile(r"^ *```.*?^ *```", re.M | re.S)
    text = blocks.sub(lambda m: "\n" * m[0].count("\n"), (ROOT / page).read_text())
    return [
        Command(page, text.count("\n", 0, found.start()) + 1, " ".join(found[1].split()))
        for found in _INLINE.finditer(text)
    ]


def check(words: Sequence[str]) -> None:
    """All that can be said of a command without running it; AssertionError where it is wrong."""
    program, *rest = words
    if program == "ray":
        assert rest[:2] == ["job", "submit"] and "--" in rest, "not `ray job submit ... -- ...`"
        return check(rest[rest.index("--") + 1 :])
    if program == "make":
        return _check_make(rest)
    if program == "python" and rest[0] == "-m":
        found = importlib.util.find_spec(rest[1])
        assert found is not None and found.origin, f"no module {rest[1]}"
        if "parse(" in Path(found.origin).read_text():
            _parse(importlib.import_module(rest[1]), rest[1], rest[2:])
        return None
    if program == "python":
        path = ROOT / rest[0]
        assert path.is_file(), f"no file {rest[0]}"
        if rest[0].startswith("jobs/"):
            return _parse(_job(path), rest[0], rest[1:])
        options = {word for word in rest[1:] if word.startswith("--")}
        known = set(re.findall(r'"(--[\w-]+)"', path.read_text()))
        assert options <= known, f"{rest[0]} has no {options - known}"
        return None
    assert program in PROGRAMS, f"nobody knows {program}; name it in PROGRAMS"
    for word in rest:
        if re.match(r"infra/|docs/|pipeline/|jobs/", word):
            path = ROOT / word.replace("overlays/mine", "overlays/prod")
            assert path.exists(), f"no {word}"
        if label := re.fullmatch(r"ssr/job=(\S+)", word):
            manifests = (ROOT / "infra").rglob("*.yaml")
            assert any(f"ssr/job: {label[1]}" in path.read_text() for path in manifests), word


def named_tests(reason: str) -> Iterator[tuple[str, str]]:
    """(file, function or "") of each test that a reason names."""
    yield from re.findall(r"(tests/[\w/]+\.py)(?:::(\w+))?", reason)


def exists(path: str, function: str) -> bool:
    file = ROOT / path
    if not file.is_file():
        return False
    tree = ast.parse(file.read_text())
    return not function or function in {
        node.name for node in tree.body if isinstance(node, ast.FunctionDef)
    }


def _lines(block: str, first: int) -> Iterator[tuple[int, str]]:
    """Each command with its line; a quote or a backslash takes it on over further lines."""
    began, text = first, ""
    for number, line in enumerate(block.splitlines(), first):
        began, text = (began, f"{text}\n{line}") if text else (number, line)
        if text.endswith("\\"):
            text = text[:-1]
            continue
        try:
            words = shlex.split(text, comments=True)
        except ValueError:  # a quote is open
            continue
        if words:
            yield began, " ".join(_without_comment(text).split()).removeprefix("$ ")
        text = ""


def _without_comment(text: str) -> str:
    """What comes before a # that stands outside quotes, behind a blank."""
    quote = ""
    for index, sign in enumerate(text):
        if quote:
            quote = "" if sign == quote else quote
        elif sign in "\"'":
            quote = sign
        elif sign == "#" and (index == 0 or text[index - 1].isspace()):
            return text[:index]
    return text


class _Parsed(BaseException):
    """The settings were read, which is enough. No Exception: no job shall take it for a fault."""


def _job(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"documented_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _parse(module: Any, name: str, words: Sequence[str]) -> None:
    """The words, read by the program's own parser, with its presets; nothing is begun."""
    load = command_line.load

    def read(*given: Any, **named: Any) -> Any:
        load(*given, **named)
        raise _Parsed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command_line, "load", read)
        patch.setattr(sys, "argv", [name, *_without_dots(words)])
        try:
            module.main()
        except _Parsed:
            return
        except SystemExit as end:
            assert not end.code, f"{name} refuses {shlex.join(words)}"


def _without_dots(words: Sequence[str]) -> list[str]:
    """`...` stands for settings of the reader's, or for one's value: that stays."""
    return [
        word for before, word in zip(["", *words], words, strict=False)
        if word != "..." or before.startswith("--")
    ]  # fmt: skip


def _check_make(words: Sequence[str]) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for word in words:
        name, equals, _ = word.partition("=")
        if equals:
            assert re.search(
                rf"\$\({name}\)|\$\((or|if) \$\({name}\)|^{name} \?=", makefile, re.M
            ), f"the Makefile knows no {name}"
        else:
            assert re.search(rf"^{re.escape(name)}:", makefile, re.M), f"no target {name}"
