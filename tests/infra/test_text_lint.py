"""What is not rendered: every YAML file and every script of infra/, by yamllint and shellcheck."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from infra.checks.render import INFRA, sources

REPOSITORY = INFRA.parent
SCRIPTS = sorted(INFRA.rglob("*.sh"))


def _tool(name: str) -> str:
    """The environment's own tool, else the machine's."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed (pip install -e '.[infra]')")
    return found


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)


def test_yamllint() -> None:
    files = [str(path) for path in sources()]
    done = _run(_tool("yamllint"), "--strict", "-c", ".yamllint", *files)
    assert done.returncode == 0, done.stdout


def test_yamllint_has_teeth(tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text("a: yes\na: 1\n")
    done = _run(_tool("yamllint"), "--strict", "-c", ".yamllint", str(bad))
    assert "truthy" in done.stdout and "key-duplicates" in done.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck(script: Path) -> None:
    done = _run(_tool("shellcheck"), str(script))
    assert done.returncode == 0, done.stdout


def test_kustomize_script_says_what_it_needs(tmp_path: Path) -> None:
    script = str(INFRA / "checks/kustomize.sh")
    bash = shutil.which("bash")
    assert bash is not None
    nothing = subprocess.run([bash, script], capture_output=True, text=True)
    assert nothing.returncode != 0
    assert "name the folder" in nothing.stderr
    bare = subprocess.run(
        [bash, script, str(tmp_path)], env={"PATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert bare.returncode == 2
    assert bare.stderr.startswith("error: apt-get is missing;")
