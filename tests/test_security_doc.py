"""SECURITY.md promises nothing that is not there: every file and test that it names exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from pipeline.command_line import load
from pipeline.config import CurateConfig
from pipeline.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[1]
TEXT = (REPOSITORY / "SECURITY.md").read_text()
NAMED = re.findall(r"`([^`\s]+)`", TEXT)
TESTS = [name for name in NAMED if "::" in name]
MADE = {"build/sbom.json"}
FILE = re.compile(r"\w/.*\.(py|md|j2|txt|json|yaml)$|/Dockerfile$|^pyproject\.toml$")
FILES = [name for name in NAMED if "::" not in name and FILE.search(name)]


def test_it_names_enough() -> None:
    sections = re.split(r"^## ", TEXT, flags=re.M)[3:-1]
    assert len(sections) == 12 and len(FILES) > 30
    for section in sections:
        for part in ("*Could happen*", "*Stops it*", "*Shown by*", "*Remains*"):
            assert section.count(part) == 1, section.splitlines()[0]
        assert "::test_" in section.split("*Shown by*")[1].split("*Remains*")[0]


@pytest.mark.parametrize("name", sorted(set(FILES)))
def test_every_file_exists(name: str) -> None:
    assert name in MADE or (REPOSITORY / name).is_file()


@pytest.mark.parametrize("name", sorted(set(TESTS)))
def test_every_test_exists(name: str) -> None:
    path, _, function = name.partition("::")
    tree = ast.parse((REPOSITORY / path).read_text())
    assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_a_tag_in_a_configuration_builds_nothing(tmp_path: Path) -> None:
    bait = tmp_path / "executed"
    for tag in ("python/object/apply:os.mkdir", "python/object/new:os.mkdir", "python/name:os"):
        file = tmp_path / "hostile.yaml"
        file.write_text(f"root: !!{tag} [{bait}]\n")
        with pytest.raises(UserError, match="is not YAML: could not determine a constructor"):
            load(CurateConfig, ["--config", str(file)])
        with pytest.raises((UserError, SystemExit)):
            load(CurateConfig, [f"--filter.inputs=[!!{tag} [{bait}]]", "--no-such-key", "1"])
    assert not bait.exists()


def test_no_command_goes_through_a_shell() -> None:
    """And nothing reads a pickle or builds objects of YAML, in what is shipped."""
    listed = ["pipeline", "ssr_model", "jobs", "infra"]
    files = [path for folder in listed for path in (REPOSITORY / folder).rglob("*.py")]
    assert len(files) > 200
    banned = re.compile(
        r"shell=True|os\.system\(|os\.popen\(|\bpickle\.loads?\(|yaml\.(unsafe_)?load\("
        r"|weights_only=False|trust_remote_code=True|allow_pickle=True|\.mktemp\("
        r"|(?<!safetensors\.)torch\.load\((?!.*weights_only=True)"
    )
    for path in files:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            assert not banned.search(line), f"{path}:{number}: {line.strip()}"
