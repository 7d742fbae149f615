"""What jobs/curate.py does beside curating: looks at a run, from storage alone."""

from __future__ import annotations

from pipeline import report
from pipeline.command_line import Command
from pipeline.config import CurateConfig
from pipeline.curation.status import status
from pipeline.storage import Storage


def _status(cfg: CurateConfig) -> str:
    return status(Storage(cfg.root))


def _report(cfg: CurateConfig) -> str:
    return f"report: {report.build(Storage(cfg.root), live=True)}"


COMMANDS = {
    "status": Command("how far the run under --root is, from its commit markers alone", _status),
    "report": Command("write the run's report.html now, while it goes on or after", _report),
}
