"""docs/notebook.ipynb runs from its first cell to its last, in a kernel of its own.

On the shipped mini models and encoder, with two denoising steps: how the pictures come out is not
asked.
"""

from __future__ import annotations

import base64
import io
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpecManager
from nbclient import NotebookClient
from PIL import Image

pytestmark = [pytest.mark.system, pytest.mark.timeout(900)]
ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "docs" / "notebook.ipynb"


@pytest.fixture(scope="module")
def ran() -> Any:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    # the interpreter of this test's own environment, whatever kernels the machine has
    kernels = KernelSpecManager(kernel_dirs=[], ensure_native_kernel=True)
    client = NotebookClient(
        notebook, timeout=600, startup_timeout=300, kernel_name="python3",
        resources={"metadata": {"path": str(ROOT)}},
    )  # fmt: skip
    client.create_kernel_manager()
    client.km.kernel_spec_manager = kernels
    given = {"SSR_NOTEBOOK_STEPS": "2", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    # sockets in a folder (of a short path): a port may be another's by the time the kernel binds it
    with tempfile.TemporaryDirectory(
        prefix="kernel-", dir="/tmp", ignore_cleanup_errors=True
    ) as sockets:
        client.km.transport, client.km.ip = "ipc", f"{sockets}/k"
        client.execute(env={**os.environ, **given})
    return notebook


def outputs(notebook: Any) -> list[tuple[str, Any]]:
    return [(cell.source, out) for cell in notebook.cells if cell.cell_type == "code"
            for out in cell.outputs]  # fmt: skip


def test_every_cell_runs(ran: Any) -> None:
    codes = [cell for cell in ran.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in codes] == list(range(1, len(codes) + 1))
    kinds = {out.output_type for _, out in outputs(ran)}
    assert kinds <= {"execute_result", "stream"}, kinds
    errors = [out.text for _, out in outputs(ran) if out.get("name") == "stderr"]
    assert not [text for text in errors if "Error" in text or "Traceback" in text], errors


def test_it_shows_what_it_says(ran: Any) -> None:
    """Two subjects, where the encoder looks, and rows of pictures that differ by the query."""
    said = "".join(out.text for _, out in outputs(ran) if out.get("name") == "stdout")
    assert re.search(r"^\w+ and \w+$", said, re.M)
    assert len(re.findall(r"^\w+ \(.*\) peak 0\.\d+$", said, re.M)) == 2
    shown = [out.data["image/png"] for _, out in outputs(ran) if "image/png" in out.get("data", {})]
    rows = [Image.open(io.BytesIO(base64.b64decode(data))) for data in shown]
    assert [(row.width + 8) // 168 for row in rows] == [1, 3, 3, 3, 4, 3]
    a, b = rows[2].crop((168, 0, 328, 160)), rows[2].crop((336, 0, 496, 160))
    assert a.tobytes() != b.tobytes()


def test_what_is_stored_is_small() -> None:
    assert NOTEBOOK.stat().st_size < 1_000_000
    stored = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(stored)
    assert "error" not in {out.output_type for _, out in outputs(stored)}
    assert not re.search(r"/(home|tmp|root|Users)/", NOTEBOOK.read_text())
