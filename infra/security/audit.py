"""Known vulnerabilities of what is installed, or of a lock file: pip-audit, where it can tell.

    python -m infra.security.audit                                    # this environment
    python -m infra.security.audit --no-deps --disable-pip -r LOCK    # a lock file

pip-audit says "no known vulnerabilities" too where its service knows none of the packages, as an
index's mirror does. So a release with a well-known hole is asked for beside the others: a service
that does not know of it knows nothing. Ends with 0: none found; 1: some found; 75: not run.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

NOT_RUN = 75
"""EX_TEMPFAIL: it may be well another time."""
CANARY = "jinja2==2.11.2"
"""CVE-2020-28493 and later ones."""
_SERVICE = ("-s", "--vulnerability-service", "--osv-url", "--timeout")


def main(words: Sequence[str]) -> int:
    with tempfile.TemporaryDirectory() as folder:
        canary = Path(folder, "canary.txt")
        canary.write_text(f"{CANARY}\n")
        found, fault = ask([*_of_service(words), "--no-deps", "--disable-pip", "-r", str(canary)])
    if not any(each.get("vulns") for each in found):
        print(f"audit: not run: {fault or f'the service does not know the holes of {CANARY}'}")
        return NOT_RUN
    found, fault = ask(words or ["--skip-editable"])
    if fault:
        print(f"audit: not run: {fault}")
        return NOT_RUN
    holes = [(each, hole) for each in found for hole in each.get("vulns", [])]
    for each, hole in holes:
        mended = ", ".join(hole["fix_versions"]) or "no version"
        print(f"audit: {each['name']} {each['version']}: {hole['id']}, mended in {mended}")
    for each in found:
        if "skip_reason" in each:
            print(f"audit: {each['name']} was not looked at: {each['skip_reason']}")
    looked = sum("vulns" in each for each in found)
    print(f"audit: {len(holes)} known vulnerabilities in {looked} of {len(found)} packages")
    return 1 if holes else 0


def ask(words: Sequence[str]) -> tuple[list[dict[str, Any]], str]:
    """pip-audit's dependencies, and in one line why there are none."""
    command = [sys.executable, "-m", "pip_audit", "--progress-spinner", "off", "--format", "json"]
    done = subprocess.run([*command, *words], capture_output=True, text=True)
    try:
        return json.loads(done.stdout)["dependencies"], ""
    except (ValueError, KeyError):
        lines = done.stderr.strip().splitlines() or [f"pip-audit ended with {done.returncode}"]
        return [], lines[-1][:300]


def _of_service(words: Sequence[str]) -> list[str]:
    """Of the options those that say who is asked."""
    pairs = itertools.pairwise(words)
    return [word for pair in pairs if pair[0] in _SERVICE for word in pair]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
