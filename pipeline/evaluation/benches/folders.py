"""Which bench a user means, and how its folder is laid out."""

from __future__ import annotations

from pathlib import Path

from pipeline.config import EvaluateConfig
from pipeline.errors import UserError
from pipeline.evaluation.benches.bench import Bench
from pipeline.evaluation.benches.break_a_scene import BreakASceneBench
from pipeline.evaluation.benches.dreambench import DreamBench
from pipeline.evaluation.benches.folder import Folder
from pipeline.evaluation.benches.folder_bench import FolderBench
from pipeline.evaluation.benches.mini import MiniBench
from pipeline.evaluation.benches.multi_subject import MultiSubjectBench
from pipeline.storage import Storage

LAYOUTS: dict[str, type[FolderBench]] = {
    bench.layout: bench for bench in (MultiSubjectBench, DreamBench, BreakASceneBench)
}
MINI_REFERENCES = 100
"""Of the mini bench where none are asked for."""


def open_bench(cfg: EvaluateConfig, side: int) -> Bench:
    """The bench of cfg.bench, with cfg.references, cfg.seeds and cfg.seed.

    Args:
        cfg: bench, layout, references, seeds, seed.
        side: of the mini bench's pictures, pixels; folders have theirs.

    Raises:
        UserError: no such folder, or it is empty, of no known layout, or anything in it is missing
            or wrong; counts that the bench does not have.
    """
    if cfg.bench == "mini":
        if cfg.seeds != 1:
            raise UserError(
                f"seeds is {cfg.seeds}; the mini bench draws one picture per prompt: leave seeds "
                "at 1 and ask for more references"
            )
        references = MINI_REFERENCES if cfg.references is None else cfg.references
        return MiniBench(references, side, cfg.seed)
    layout, folder = find_layout(cfg.bench, cfg.layout)
    return layout(folder, cfg.references, cfg.seeds, cfg.seed)


def find_layout(bench: str, layout: str = "auto") -> tuple[type[FolderBench], Folder]:
    """The layout of a bench's folder, and the folder in which its description lies.

    Raises UserError where there is no such folder, or it has none of the descriptions, or several.
    """
    storage = Storage(bench)
    tried = LAYOUTS.values() if layout == "auto" else [LAYOUTS[layout]]
    homes = {kind: home for kind in tried if (home := kind.home(storage)) is not None}
    if len(homes) == 1:
        ((kind, home),) = homes.items()
        return kind, Folder(home)
    where = storage.url()
    if homes:
        there = " and ".join(kind.description for kind in homes)
        raise UserError(f"bench {where} holds {there}; say which is meant: --layout LAYOUT")
    if not storage.exists():
        raise UserError(f"bench {bench}: no such folder; name a bench's folder, or mini")
    if storage.is_file():
        raise UserError(f"bench {where} is a file; name the folder that it lies in")
    # an object store has no empty folders
    if storage.local and not any(Path(where).iterdir()):
        raise UserError(f"bench {where} is empty; fill it as docs/benches.md says")
    missing = " or ".join(f"{kind.description} ({kind.layout})" for kind in tried)
    raise UserError(f"bench {where} holds no {missing}; docs/benches.md has the layouts")
