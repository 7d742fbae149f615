"""Keys and passwords in tracked files: detect-secrets, less what `.secrets.baseline` accepts.

    python -m infra.security.secrets             # ends with 1 where there is one, and says where
    python -m infra.security.secrets --accept    # writes the baseline anew; read its difference

What is accepted is a value, by its hash and kind, in one file: lines may move. The baseline is in
detect-secrets' own form (`detect-secrets audit .secrets.baseline` shows each).
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from detect_secrets import SecretsCollection
from detect_secrets.core import baseline
from detect_secrets.settings import default_settings

BASELINE = Path(".secrets.baseline")


def main(words: Sequence[str]) -> int:
    listed = subprocess.run(["git", "ls-files", "-z"], capture_output=True, text=True, check=True)
    names = [name for name in listed.stdout.split("\0") if name and name != str(BASELINE)]
    files = [name for name in names if _is_text(Path(name))]
    found = SecretsCollection()
    with default_settings():
        found.scan_files(*files, num_processors=2)
        if list(words) == ["--accept"]:
            text = json.dumps(baseline.format_for_output(found), indent=1, sort_keys=True)
            BASELINE.write_text(f"{text}\n")
            return 0
    known = json.loads(BASELINE.read_text())["results"] if BASELINE.is_file() else {}
    accepted = {
        (name, each["type"], each["hashed_secret"]) for name, some in known.items() for each in some
    }
    new = [
        (name, secret)
        for name, secret in found
        if (name, secret.type, secret.secret_hash) not in accepted
    ]
    for name, secret in new:
        print(f"secrets: {name}:{secret.line_number}: {secret.type}; take it out, and revoke it")
    print(f"secrets: {len(new)} new in {len(files)} tracked texts, {len(accepted)} accepted")
    return 1 if new else 0


def _is_text(path: Path) -> bool:
    """As git tells them apart; what was deleted and not yet committed is none."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return b"\0" not in file.read(8000)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
