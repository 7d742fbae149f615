"""What jobs/curate.py does beside curating: looks at a run, or exports it, from storage alone."""

from __future__ import annotations

from pipeline import report
from pipeline.command_line import Command
from pipeline.config import CurateConfig, ImagesExportConfig
from pipeline.curation.status import status
from pipeline.errors import UserError
from pipeline.progress import Progress
from pipeline.storage import Storage


def _status(cfg: CurateConfig) -> str:
    return status(Storage(cfg.root))


def _report(cfg: CurateConfig) -> str:
    return f"report: {report.build(Storage(cfg.root), live=True)}"


def _export(cfg: ImagesExportConfig) -> str:
    if cfg.out is None:
        raise UserError("--out is missing: name the folder (or URL) that the tars go to")
    from pipeline.curation.webdataset.export import export

    out = Storage(cfg.out)
    out.check_writable()
    with Progress() as progress:
        made = export(Storage(cfg.root), out, cfg, progress)
    there = f"{made.samples:,} samples in {made.tars:,} tars, {made.bytes / 2**20:,.1f} MiB"
    return f"exported: {out.url()} ({there}; {made.made:,} of the tars now)"


COMMANDS = {
    "status": Command("how far the run under --root is, from its commit markers alone", _status),
    "report": Command("write the run's report.html now, while it goes on or after", _report),
    "export": Command(
        "write images and captions as a WebDataset (--out, --split, --rows)",
        _export,
        ImagesExportConfig,
    ),
}
