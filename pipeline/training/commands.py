"""What jobs/train.py does beside training: writes a model from any checkpoint, without Ray."""

from __future__ import annotations

from pipeline.command_line import Command
from pipeline.config import ExportConfig
from pipeline.errors import UserError
from pipeline.storage import Storage


def _export(cfg: ExportConfig) -> str:
    if cfg.out is None:
        raise UserError("--out is missing: name the folder (or URL) that the model goes to")
    from pipeline.training.export import export  # torch: seconds that a refusal does without

    made = export(Storage(cfg.root), cfg.stage, cfg.step, Storage(cfg.out))
    return (
        f"model:    {made.folder} ({made.said})\n"
        f"next:     python jobs/generate.py --root {cfg.root} --model {cfg.out}"
    )


COMMANDS = {
    "export": Command(
        "write a model from any checkpoint of either stage (--stage, --step, --out)",
        _export,
        ExportConfig,
    )
}
