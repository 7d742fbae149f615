"""Check a bench's folder.

python -m pipeline.evaluation.benches FOLDER [--layout LAYOUT]

Prints everything that is missing or wrong and ends with 1 if anything is.
"""

from __future__ import annotations

import argparse
import sys

from pipeline.errors import UserError, run
from pipeline.evaluation.benches.checking import check
from pipeline.evaluation.benches.folders import LAYOUTS


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.evaluation.benches",
        description="Check a bench's folder (docs/benches.md).",
    )
    parser.add_argument("folder", help="a path or s3://")
    parser.add_argument("--layout", choices=("auto", *LAYOUTS), default="auto")
    if not check_folder(parser.parse_args()):
        sys.exit(1)


def check_folder(args: argparse.Namespace) -> bool:
    """Whether the bench is sound; prints what was found."""
    try:
        found = check(args.folder, args.layout)
    except UserError as error:
        print(f"wrong: {error}")
        return False
    print(found.summary)
    for line in found.notes:
        print(f"note: {line}")
    for line in found.problems:
        print(f"wrong: {line}")
    if found.problems:
        print(f"{len(found.problems)} wrong; docs/benches.md has the layout")
    else:
        seeds = f" --seeds {found.seeds}" if found.seeds > 1 else ""
        print(f"nothing is wrong; next: python jobs/evaluate.py --bench {args.folder}{seeds}")
    return not found.problems


if __name__ == "__main__":
    run(main)
