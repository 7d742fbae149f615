"""What jobs/evaluate.py does beside evaluating, without Ray or models."""

from __future__ import annotations

from dataclasses import fields

from pipeline.command_line import Command
from pipeline.config import CompareConfig, EvaluateConfig, RequestsConfig
from pipeline.errors import UserError
from pipeline.storage import Storage


def _compare(cfg: CompareConfig) -> str:
    from pipeline.evaluation.comparison import compare  # nothing of it is needed to evaluate

    return compare(cfg)


def _requests(cfg: RequestsConfig) -> str:
    from pipeline.evaluation.benches import export_requests, open_bench
    from pipeline.evaluation.judging import SIDE

    if cfg.out is None:
        raise UserError("out: missing; say where to, for example --out runs/requests")
    names = [field.name for field in fields(cfg) if field.name != "out"]
    settings = EvaluateConfig(**{name: getattr(cfg, name) for name in names})
    out = Storage(cfg.out)
    out.check_writable()
    count = export_requests(open_bench(settings, SIDE), out)
    asked = " ".join(f"--{n} {getattr(cfg, n)}" for n in names if getattr(cfg, n) is not None)
    return (
        f"{count} requests: {out.url('requests.jsonl')}\n"
        f"next: draw a <key>.png for each, then python jobs/evaluate.py {asked} "
        "--images_from NAME=FOLDER"
    )


COMMANDS = {
    "requests": Command(
        "what a bench asks, as files for tools that draw elsewhere (--bench FOLDER --out FOLDER)",
        _requests,
        RequestsConfig,
    ),
    "compare": Command(
        "whether another run, or another method, is better (--root A --other B)",
        _compare,
        CompareConfig,
    ),
}
