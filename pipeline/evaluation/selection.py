"""The selection bench of the mini world, whole: conditions, samples, table, JSON, grid."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from pipeline import models
from pipeline.config import EvaluateConfig
from pipeline.errors import UserError
from pipeline.evaluation import benches, runner, table
from pipeline.evaluation.methods import SelectBy, TextOnly
from pipeline.evaluation.runner import Condition, SelectionStage
from pipeline.generation import png
from pipeline.generation.sampler import Sampler, model_folder, model_identity
from pipeline.miniworld.judge import Judge
from pipeline.progress import Progress
from pipeline.storage import Storage

FOLDER = "evaluation"
JUDGE = "miniworld:judge"
JUDGED_SIDE = 32
"""Side of the pictures that the judge was trained on, pixels."""
_SHAPES_NO_SAMPLE = ("root", "model", "models", "device", "references")


def conditions(sampler: Sampler, scale: float) -> list[Condition]:
    """Text and mask query for either subject, and the floor: the prompt alone."""
    by_text, by_mask = SelectBy(sampler, "text", scale), SelectBy(sampler, "mask", scale)
    return [
        Condition("text-only", "Text only (floor)", TextOnly(sampler), 0),
        Condition("text-query-a", "SSR, text query A", by_text, 0, points=True),
        Condition("text-query-b", "SSR, text query B (roles swapped)", by_text, 1, points=True),
        Condition("mask-query-a", "SSR, mask query A", by_mask, 0),
        Condition("mask-query-b", "SSR, mask query B (roles swapped)", by_mask, 1),
    ]


def evaluate(cfg: EvaluateConfig, storage: Storage, progress: Progress) -> str:
    """Score the trained model on cfg.references held-out references; return the Markdown table.

    Writes evaluation/samples/ (resumable), scores.json, scores.md and grid.png. In every row, A is
    the subject that was asked for and B the other one.
    """
    with model_folder(storage, cfg.model) as folder:
        sampler = Sampler.load(folder, cfg)
        asked = {k: v for k, v in asdict(cfg).items() if k not in _SHAPES_NO_SAMPLE}
        settings: dict[str, Any] = {
            **asked,
            "model": model_identity(folder),
            "base": models.identity(cfg.models.base, "unet", cfg.models.revision),
            "vision": models.identity(cfg.models.vision, "", cfg.models.revision),
            "judge": models.identity(JUDGE),
        }
    if sampler.side != JUDGED_SIDE:
        raise UserError(
            f"models.base: {cfg.models.base} draws {sampler.side} pixels, the judge knows pictures "
            f"of {JUDGED_SIDE}; evaluate a model trained on miniworld:sd"
        )
    bench = benches.mini_bench(cfg.references, sampler.side, cfg.seed)
    rows_of_table = conditions(sampler, cfg.scale)
    judge = Judge.load(models.resolve(JUDGE))
    stage = SelectionStage(
        bench, rows_of_table, judge, sampler.attention, cfg.batch_size, cfg.seed, settings
    )
    rows = runner.run(stage, storage, progress)
    summaries = runner.tabulate(rows, rows_of_table)
    markdown = table.markdown(f"{cfg.references} held-out references", summaries)
    result = {
        "references": cfg.references,
        "settings": settings,
        "conditions": summaries,
        "measures": table.MEASURES,
    }
    storage.write_json(f"{FOLDER}/scores.json", result)
    storage.write_bytes(f"{FOLDER}/scores.md", markdown.encode())
    picture = runner.picture(bench, rows, rows_of_table)
    storage.write_bytes(f"{FOLDER}/grid.png", png.encode(picture, settings))
    return markdown
