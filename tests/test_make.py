"""The two commands of the README where something that they need is missing."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture
def bare(tmp_path: Path) -> dict[str, str]:
    """An environment whose PATH holds a shell, Python and next to nothing else."""
    for tool in ("bash", "sh", "dirname", "id", "python3", "mktemp", "rm"):
        found = shutil.which(tool)
        assert found is not None
        (tmp_path / tool).symlink_to(found)
    return {**os.environ, "PATH": str(tmp_path)}


def test_continuous_integration_without_make_is_one_line(bare: dict[str, str]) -> None:
    done = subprocess.run(
        ["bash", REPOSITORY / ".ci" / "run"], env=bare, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1 and "make" in done.stderr and "install" in done.stderr


@pytest.mark.parametrize("target", ["demo", "lavis-env"])
@pytest.mark.parametrize("python", ["python-that-is-not-there", "false"])
def test_make_without_a_fitting_python_is_one_line(
    tmp_path: Path, python: str, target: str
) -> None:
    make = shutil.which("make")
    if make is None:
        pytest.skip("make is not installed")
    done = subprocess.run(
        [
            make,
            target,
            f"PYTHON={python}",
            f"VENV={tmp_path / 'venv'}",
            f"LAVIS_VENV={tmp_path / 'lavis'}",
        ],
        cwd=REPOSITORY,
        env={k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    first, *rest = done.stderr.strip().splitlines()
    assert first.startswith(f"error: {python} is not Python 3.11 or 3.12")
    assert all(line.startswith("make: ***") for line in rest)
    assert not list(tmp_path.iterdir())


def test_no_process_of_ray_compiles_a_grammar_at_its_start() -> None:
    """cyclonedx-bom brings rfc3987-syntax, which takes seconds to import; jsonschema imports it
    where it is there, and Ray imports jsonschema in each of its dozen processes.
    """
    code = "import sys, ray; print('rfc3987_syntax.syntax_helpers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n", "python -m pip uninstall -y rfc3987-syntax, as make venv does"
