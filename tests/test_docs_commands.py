"""Every command that the documentation shows exists as it is shown: its settings, its files.

Those that a machine alone can run are run by tests/system/test_docs_commands.py. Of the others the
programs' own parsers read the words, with the preset that is named.
"""

from __future__ import annotations

import re
import textwrap

import pytest

from tests import documented
from tests.documented import PAGES, Command, check, exists, fenced, inline, named_tests

FENCED = [command for page in PAGES for command in fenced(page)]
INLINE = [command for page in PAGES for command in inline(page)]


def test_pages_have_commands() -> None:
    assert len(FENCED) > 60 and len(INLINE) > 20
    assert {"README.md", "docs/curation.md", "infra/README.md"} <= {each.page for each in FENCED}


@pytest.mark.parametrize("page", [page for page in PAGES if fenced(page) or inline(page)])
def test_commands_are_understood(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = []
    for command in [*fenced(page), *inline(page)]:
        try:
            check(command.words)
        except AssertionError as error:
            said = capsys.readouterr().err.strip().splitlines()
            wrong.append(f"{command}\n    {error}; {said[-1] if said else ''}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("page", PAGES)
def test_python_is_python(page: str) -> None:
    """Of every page; tests/test_docs.py and the system tests run what can be run."""
    text = (documented.ROOT / page).read_text()
    for block in re.finditer(r"^( *)```py(?:thon)?\n(.*?)^ *```$", text, re.M | re.S):
        compile(
            textwrap.dedent(block[2]), f"{page}:{text.count(chr(10), 0, block.start())}", "exec"
        )


def test_what_is_not_run_says_what_runs_instead() -> None:
    """Reasons are of commands that there are, and name tests that there are."""
    why = {command.why_not for command in FENCED} - {""}
    for reason in why:
        for path, function in named_tests(reason):
            assert exists(path, function), f"{path}::{function} is not there"
    told = [f"{command}  [{command.why_not}]" for command in FENCED if command.why_not]
    print(f"{len(FENCED)} commands, {len(FENCED) - len(told)} run as they stand or small;",
          "not run:", *told, sep="\n")  # fmt: skip
    assert len(told) < len(FENCED)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("python jobs/train.py --semantik.steps 5", "jobs/train.py refuses"),
        ("python jobs/train.py --preset laion-sd15 --root x", "jobs/train.py refuses"),
        ("python jobs/curate.py stats --root x", "jobs/curate.py refuses"),
        ("ray job submit --working-dir . -- python jobs/plan.py --gpu x1", "jobs/plan.py refuses"),
        ("python jobs/draw.py", "no file jobs/draw.py"),
        ("python -m pipeline.nothing", "no module pipeline.nothing"),
        ("python benchmarks/filter.py --row 5", "benchmarks/filter.py has no"),
        ("make everything", "no target everything"),
        ("make demo ROUTE=x", "the Makefile knows no ROUTE"),
        ("kubectl apply -k infra/overlays/none", "no infra/overlays/none"),
        ("kubectl apply -k infra/overlays/mine -l ssr/job=dance", "ssr/job=dance"),
        ("rm -rf runs", "nobody knows rm"),
    ],
)
def test_what_is_wrong_is_found(text: str, said: str) -> None:
    with pytest.raises(AssertionError) as found:
        check(Command("a page", 1, text).words)
    assert said in str(found.value)


def test_commands_are_taken_from_their_blocks(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    (tmp_path / "page.md").write_text(
        "x\n\n```bash\n# why\nA=1 python jobs/x.py \\\n    --key 'a # b' # comment\n"
        "head -1 f > g\ncurl -F 'a={\n  1}'  # long\n```\n"
        "\n```python\nprint()\n```\nand `python jobs/y.py\n--z 1`.\n"
    )
    monkeypatch.setattr(documented, "ROOT", tmp_path)
    first, second, third = fenced("page.md")
    assert (first.line, first.words) == (5, ["python", "jobs/x.py", "--key", "a # b"])
    assert (second.line, second.words) == (7, ["head", "-1", "f"])
    assert (third.line, third.words) == (8, ["curl", "-F", "a={ 1}"])
    assert [(each.line, each.text) for each in inline("page.md")] == [
        (15, "python jobs/y.py --z 1")
    ]
