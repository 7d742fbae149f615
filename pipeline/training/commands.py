"""What jobs/train.py does beside training: writes a model from any checkpoint, and puts it on the
hub; without Ray.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from pipeline.command_line import Command
from pipeline.config import ExportConfig, PushConfig
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


def _push(cfg: PushConfig) -> str:
    if cfg.repo is None:
        raise UserError("--repo is missing: name the model on the hub, owner/name")
    model = Storage(cfg.model) if cfg.model is not None else Storage(cfg.root).sub("model")
    if not model.exists("config.json"):
        raise UserError(
            f"no model in {model.url()}; train one with jobs/train.py, or name its folder with "
            "--model"
        )
    from ssr_model import hub, weights  # torch: seconds that a refusal does without

    with tempfile.TemporaryDirectory(prefix="ssr-model-") as folder:
        for name in (weights.CONFIG, weights.WEIGHTS):
            Path(folder, name).write_bytes(model.read_bytes(name))
        try:
            adapter, said = weights.load_adapter(folder)
            where = hub.push(
                adapter,
                said,
                cfg.repo,
                private=cfg.private or None,
                revision=cfg.revision,
                commit_message=cfg.message or hub.MESSAGE,
                create_pr=cfg.pull_request,
                license=cfg.license,
                dtype=weights.stored_dtype(folder),
            )
        except ValueError as error:
            raise UserError(str(error).replace(folder, model.url()).removesuffix(".")) from None
    return f"pushed:   {model.url()} as {cfg.repo}: {where}"


COMMANDS = {
    "export": Command(
        "write a model from any checkpoint of either stage (--stage, --step, --out)",
        _export,
        ExportConfig,
    ),
    "push": Command(
        "put a model on the Hugging Face hub (--repo, --model; its token from HF_TOKEN or "
        "`hf auth login`)",
        _push,
        PushConfig,
    ),
}
