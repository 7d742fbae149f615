"""What `make audit`, `make sbom` and `make secrets` run, each on a case that it must not pass."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from infra.security import audit

REPOSITORY = Path(__file__).resolve().parents[1]
# put together here, so that the scan of this file finds no key
AWS_KEY = "AKIA" + "IOSFODNN7EXAMPL2"


def run(module: str, *words: str, cwd: Path = REPOSITORY) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", f"infra.security.{module}", *words],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    return done.returncode, done.stdout + done.stderr


# --- secrets ----------------------------------------------------------------------------


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    pytest.importorskip("detect_secrets", reason="detect-secrets is not installed")
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    return tmp_path


@pytest.mark.parametrize(
    "planted",
    [
        f'aws_access_key_id = "{AWS_KEY}"',
        "-----BEGIN " + "RSA PRIVATE KEY-----",
        'root: "s3://me:' + 'hunter2hunter2@bucket/run"',
        'HF_TOKEN = "hf_' + 'aZbY1xWvU2tSrQ3pOnM4lKjI5hGfE6dCbA"',
    ],
)
def test_a_planted_key_is_found(repository: Path, planted: str) -> None:
    (repository / "sound.py").write_text("answer = 42\n")
    (repository / "weights.bin").write_bytes(b"\0" + AWS_KEY.encode())
    subprocess.run(["git", "add", "."], cwd=repository, check=True)
    assert run("secrets", cwd=repository)[0] == 0
    (repository / "settings.py").write_text(f"# settings\n{planted}\n")
    assert run("secrets", cwd=repository)[0] == 0, "what is not tracked is nobody's business"
    subprocess.run(["git", "add", "."], cwd=repository, check=True)
    status, said = run("secrets", cwd=repository)
    assert status == 1 and "secrets: settings.py:2: " in said
    assert planted not in said, "a log is no place for a key"


def test_what_is_accepted_may_move_and_nothing_else(repository: Path) -> None:
    file = repository / "settings.py"
    file.write_text(f'key = "{AWS_KEY}"\n')
    subprocess.run(["git", "add", "."], cwd=repository, check=True)
    assert run("secrets", "--accept", cwd=repository)[0] == 0
    file.write_text(f'\n\nkey = "{AWS_KEY}"\n')
    assert run("secrets", cwd=repository)[0] == 0
    file.write_text(f'key = "{AWS_KEY[:-1]}3"\n')
    assert run("secrets", cwd=repository)[0] == 1


# --- audit ------------------------------------------------------------------------------


@contextlib.contextmanager
def advisories(known: dict[str, str]) -> Iterator[str]:
    """A service as api.osv.dev is, which knows of a hole in each of these releases."""

    class Service(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            name, version = asked["package"]["name"], asked["version"]
            events = [{"introduced": "0"}, {"fixed": "99.0"}]
            hole: dict[str, Any] = {
                "id": f"HOLE-{name}",
                "affected": [
                    {
                        "package": {"name": name, "ecosystem": "PyPI"},
                        "ranges": [{"type": "ECOSYSTEM", "events": events}],
                    }
                ],
            }
            body = json.dumps({"vulns": [hole]} if known.get(name) == version else {}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Service)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1/query"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def lock(tmp_path: Path) -> list[str]:
    pytest.importorskip("pip_audit", reason="pip-audit is not installed")
    file = tmp_path / "lock.txt"
    file.write_text("numpy==2.1.0\npillow==11.3.0\n")
    return ["--no-deps", "--disable-pip", "-r", str(file), "-s", "osv", "--osv-url"]


WELL_KNOWN = dict([audit.CANARY.split("==")])


def test_a_hole_is_named_and_fails(lock: list[str]) -> None:
    with advisories({**WELL_KNOWN, "pillow": "11.3.0"}) as url:
        status, said = run("audit", *lock, url)
    assert status == 1, said
    assert "audit: pillow 11.3.0: HOLE-pillow, mended in 99.0" in said
    assert "audit: 1 known vulnerabilities in 2 of 2 packages" in said


def test_no_hole_is_a_pass(lock: list[str]) -> None:
    with advisories(WELL_KNOWN) as url:
        status, said = run("audit", *lock, url)
    assert status == 0 and "audit: 0 known vulnerabilities in 2 of 2 packages" in said, said


def test_a_service_that_knows_nothing_is_no_pass(lock: list[str]) -> None:
    """As a mirror of an index: pip-audit itself would say that nothing is known."""
    with advisories({}) as url:
        status, said = run("audit", *lock, url)
    assert status == audit.NOT_RUN and said.startswith("audit: not run: the service does not know")


def test_a_service_out_of_reach_is_no_pass(lock: list[str]) -> None:
    status, said = run("audit", *lock, "http://127.0.0.1:9/v1/query")
    assert status == audit.NOT_RUN and said.startswith("audit: not run: "), said
    assert len(said.splitlines()) == 1


# --- the bill of materials --------------------------------------------------------------


def test_the_bill_names_what_is_installed(tmp_path: Path) -> None:
    pytest.importorskip("cyclonedx_py", reason="cyclonedx-bom is not installed")
    (tmp_path / "lock.txt").write_text("torch==2.13.0\nray==2.60.0\n")
    words = ["requirements", "lock.txt", "--output-reproducible", "--of", "JSON", "-o", "bill.json"]
    subprocess.run(
        [sys.executable, "-m", "cyclonedx_py", *words], cwd=tmp_path, check=True, timeout=120
    )
    bill = json.loads((tmp_path / "bill.json").read_text())
    named = {(each["name"], each["version"]) for each in bill["components"]}
    assert bill["bomFormat"] == "CycloneDX" and named == {("torch", "2.13.0"), ("ray", "2.60.0")}
