"""`python -m infra.checks [OVERLAY ...]`: a line per finding; exit 0 without any, else 1.

Exit 2 where an overlay cannot be rendered, or what it needs is not installed.
"""

from __future__ import annotations

import argparse
import sys

from infra.checks import render
from pipeline import errors


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m infra.checks", description="Check rendered overlays without a cluster."
    )
    parser.add_argument(
        "overlays", metavar="OVERLAY", nargs="*", help="folder of infra/overlays, or a path; all"
    )
    parser.add_argument("--list", action="store_true", help="print every lint and its rule")
    options = parser.parse_args()
    folders = [] if options.list else render.overlays(options.overlays)
    try:
        from infra.checks import lints, schema
    except ModuleNotFoundError as error:
        raise errors.UserError(
            f"{error.name} is not installed; pip install -e '.[infra]'"
        ) from error
    if options.list:
        for lint in (lints.LINTS | lints.SITE).values():
            print(f"{lint.name}: {lint.text} ({lint.theme})")
        return
    for source in render.sources():
        render.parse(source.read_text(), str(source))
    found = 0
    for folder in folders:
        documents = render.render(folder)
        findings = list(schema.check(documents))
        if not findings:  # lints read fields by the types that the schemas promise
            findings = [found for lint in lints.of(folder) for found in lint(documents)]
        for finding in findings:
            print(f"{folder.name}: {finding}")
        print(f"{folder.name}: {len(documents)} objects, {len(findings)} findings", file=sys.stderr)
        found += len(findings)
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    errors.run(main)
