"""The benchmarks run; what they measure is not judged here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_attention() -> None:
    command = [sys.executable, "benchmarks/attention.py", "--size", "small", "--rounds", "1"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=250)
    assert ran.returncode == 0, ran.stderr
    rows = [line.split("|")[1:-1] for line in ran.stdout.splitlines() if line.startswith("| ")]
    assert [row[0].strip() for row in rows[2:]] == [
        "plain",
        "SSR, 1 subject",
        "SSR, 3 subjects",
        "SSR, 1 subject in a region",
        "IP-Adapter, 462 tokens",
        "IP-Adapter, 1,386 tokens",
    ]
    assert all(float(row[1]) > 0 and float(row[2]) > 0 for row in rows[2:])
