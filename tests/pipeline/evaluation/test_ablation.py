"""Arms and tables of ablations; a whole one, killed half-way, is in tests/system."""

from __future__ import annotations

import inspect
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.config import AblationConfig, EvaluateConfig
from pipeline.errors import UserError
from pipeline.evaluation import ablation_tables
from pipeline.evaluation.ablation import ablate, train_settings, trials
from pipeline.evaluation.arms import ARMS, CLAIMS, Trial
from pipeline.evaluation.exact import MEASURES
from pipeline.evaluation.publish import Published
from pipeline.evaluation.results import Measure, MethodInfo, Results
from pipeline.progress import Progress
from pipeline.storage import Storage
from ssr_model.config import VARIANTS
from ssr_model.metrics import METRICS

SELECTED = Measure("selected", "all three", "higher", 2)
CLIP_ES = Measure("clip_es", "CLIP-ES", "lower", 3)


def settings(**ablation: object) -> EvaluateConfig:
    given = {"arms": ["text-only", "full", "whole-image"], **ablation}
    return EvaluateConfig(resamples=500, ablation=AblationConfig(**given))  # type: ignore[arg-type]


def test_every_arm_differs_from_full_in_what_it_says_alone() -> None:
    cfg = settings(arms=list(ARMS), steps=80)
    full = asdict(train_settings(cfg, Trial("full", 0)))
    for name, arm in ARMS.items():
        if arm.train is None:
            continue
        other = asdict(train_settings(cfg, Trial(name, 0)))
        changed = {key for key in full if full[key] != other[key]} - {"root"}
        said = set(arm.train) - {"single_scale"}
        said |= {"data"} if arm.int8 else set()
        said |= {"semantic", "multi_scale"} if "single_scale" in arm.train else set()
        assert changed == said, name
        assert other["semantic"]["steps"] + other["multi_scale"]["steps"] == 80, "equal budgets"
    assert asdict(train_settings(cfg, Trial("full", 2)))["seed"] == 2


def test_trials_go_seed_by_seed() -> None:
    assert [trial.name for trial in trials(settings(seeds=2))] == [
        *("text-only-s0", "full-s0", "whole-image-s0"),
        *("text-only-s1", "full-s1", "whole-image-s1"),
    ]


def test_claims_are_of_arms_and_measures_that_exist() -> None:
    measures = {measure.name for measure in MEASURES} | set(METRICS)
    for claim in CLAIMS:
        assert {claim.better, claim.worse} <= set(ARMS) and set(claim.measures) <= measures


def test_what_is_seen_of_the_claims(tmp_path: Path) -> None:
    """A large difference is seen, in the right direction; none is undecided; one seed decides
    nothing."""
    storage = Storage(tmp_path)
    for seeds, verdicts in ((3, ("seen", "the opposite is seen")), (1, ("undecided",) * 2)):
        cfg = settings(seeds=seeds)
        made = Published("", "evaluation/mini", results(cfg))
        text = ablation_tables.write(cfg, trials(cfg), made, storage)
        told = storage.read_json("evaluation/mini/ablation.json")
        (claim,) = told["claims"]
        assert (claim["seen"]["selected"], claim["seen"]["clip_es"]) == verdicts
        assert told["full_minus"]["text-only"]["selected"]["full_is"] == "undecided"
        assert told["arms"]["full"]["means"]["selected"]["seeds"] == seeds
        assert f"| {verdicts[0]} |" in text and ("One seed decides nothing" in text) == (seeds == 1)
        assert "| Full | 0.9" in text and (" ± " in text) == (seeds > 1)


def results(cfg: EvaluateConfig) -> Results:
    """Full selects better than the whole image by 0.5, has a worse CLIP-ES, and text-only is like
    it."""
    rng = np.random.default_rng(0)
    rows = []
    for trial in trials(cfg):
        share = 0.4 if trial.arm == "whole-image" else 0.9
        for key in range(200):
            drawn = float(np.random.default_rng((trial.seed, key)).random() < share)
            es = (0.1 if trial.arm == "whole-image" else 0.2) + 0.01 * rng.standard_normal()
            rows.append(
                {
                    "method": trial.name, "key": f"{key}", "reference": f"{key // 2}",
                    "prompt": "a cup", "seed": key, "selected": drawn, "clip_es": es,
                }
            )  # fmt: skip
    methods = {trial.name: MethodInfo(trial.name, True, {}) for trial in trials(cfg)}
    return Results.of(rows, {"name": "mini"}, [SELECTED, CLIP_ES], methods)


def test_the_help_names_the_arms_that_there_are() -> None:
    told = inspect.getsource(AblationConfig)
    assert all(re.search(rf"\b{re.escape(arm)}\b", told) for arm in ARMS)


def test_variants_are_what_their_names_say() -> None:
    """But for the width, which is the mini world's."""
    cfg = settings(arms=["paper", "released"])
    for name in ("paper", "released"):
        made = train_settings(cfg, Trial(name, 0))
        shape = {**VARIANTS[made.variant], "heads": made.heads}
        for key in ("value_projection", "token_norm", "init_layers", "mask_cls"):
            asked = getattr(made, key)
            shape[key] = shape[key] if asked is None else asked
        assert {**VARIANTS[name], "head_dim": 0} == {**shape, "head_dim": 0}
        assert made.start_token or name == "paper"


@pytest.mark.parametrize(
    ("ablation", "others", "said"),
    [
        ({"arms": ["full", "full"]}, {}, "full is there twice"),
        ({"arms": ["fulll"]}, {}, "did you mean full"),
        ({}, {"bench": "/somewhere"}, "draws the mini bench"),
        ({}, {"seeds": 4}, "draws the mini bench"),
        ({}, {"images_from": ["a=b"]}, "draws its arms alone"),
        ({}, {"methods": ["ssr-text"]}, "draws its arms alone"),
        ({"arms": ["full"], "data": "/nowhere"}, {}, "python jobs/curate.py --root /nowhere"),
    ],
)
def test_impossible_ablations_are_refused(
    ablation: dict[str, Any], others: dict[str, Any], said: str, tmp_path: Path
) -> None:
    cfg = replace(settings(**ablation), root=str(tmp_path), **others)
    with pytest.raises(UserError, match=said) as caught:
        ablate(cfg, Storage(tmp_path), Progress(terminal=False))
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_settings_that_cannot_be() -> None:
    with pytest.raises(UserError, match=r"ablation.seeds is 0; it must be at least 1"):
        settings(seeds=0)
    with pytest.raises(UserError, match="cannot name a folder"):
        settings(name="../x")
