"""An ablation's tables: each arm over its seeds, and what is seen of the paper's claims."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict

from pipeline.config import EvaluateConfig
from pipeline.evaluation import markdown
from pipeline.evaluation.arms import ARMS, CLAIMS, Claim, Trial
from pipeline.evaluation.bootstrap import Spread
from pipeline.evaluation.comparison import Verdict, compare_arms
from pipeline.evaluation.publish import Published, groups
from pipeline.evaluation.results import Measure, Results
from pipeline.storage import Storage

_SEEN: dict[Verdict, str] = {
    "better": "seen",
    "worse": "the opposite is seen",
    "undecided": "undecided",
}


def write(cfg: EvaluateConfig, trials: Sequence[Trial], made: Published, storage: Storage) -> str:
    """Write ablation.json and ablation.md beside the scores; returns the Markdown."""
    results, arms = made.results, _by_arm(trials)
    spreads = {arm: results.means_over_seeds(names, cfg.resamples) for arm, names in arms.items()}
    differences = {
        arm: compare_arms(results, arms[arm], arms["full"], cfg.resamples)
        for arm in arms
        if "full" in arms and arm != "full"
    }
    claims = [c for c in CLAIMS if c.better in arms and c.worse in arms]
    text = "\n".join(
        [
            *_arm_tables(cfg, results, spreads),
            *_difference_tables(results, differences),
            *([_claims_table(results, claims, differences)] if claims else []),
            *(sentence(claim, results, differences) for claim in claims),
            _notes(cfg, arms, len(differences) * len(results.measures)),
        ]
    )
    told = {
        "steps": cfg.ablation.steps,
        "seeds": cfg.ablation.seeds,
        "measures": [asdict(measure) for measure in results.measures],
        "arms": {
            arm: {
                "title": ARMS[arm].title,
                "train": dict(ARMS[arm].train or {}),
                "means": {name: asdict(spread) for name, spread in found.items()},
            }
            for arm, found in spreads.items()
        },
        "full_minus": {
            arm: {
                name: {**asdict(s), "margin": s.margin, "full_is": v} for name, (s, v) in d.items()
            }
            for arm, d in differences.items()
        },
        "claims": [
            {
                **asdict(claim),
                "seen": {m: _SEEN[differences[claim.worse][m][1]] for m in _known(claim, results)},
            }
            for claim in claims
        ],
    }
    storage.write_json(f"{made.folder}/ablation.json", told)
    storage.write_bytes(f"{made.folder}/ablation.md", text.encode())
    return text


def _by_arm(trials: Sequence[Trial]) -> dict[str, list[str]]:
    """The methods of each arm, one for each seed, in the seeds' order."""
    arms: dict[str, list[str]] = {}
    for trial in sorted(trials, key=lambda t: t.seed):
        arms.setdefault(trial.arm, []).append(trial.name)
    return {arm: arms[arm] for arm in dict.fromkeys(t.arm for t in trials)}


def _arm_tables(
    cfg: EvaluateConfig, results: Results, spreads: Mapping[str, Mapping[str, Spread]]
) -> list[str]:
    title = f"{cfg.ablation.steps} steps, {cfg.ablation.seeds} seed(s)"
    return [
        markdown.table(
            [title, *map(markdown.heading, group)],
            [
                [ARMS[arm].title, *(markdown.spread_cell(m, found[m.name]) for m in group)]
                for arm, found in spreads.items()
            ],
        )
        for group in groups(results.measures)
    ]


def _difference_tables(
    results: Results, differences: Mapping[str, Mapping[str, tuple[Spread, Verdict]]]
) -> list[str]:
    if not differences:
        return []
    return [
        markdown.table(
            ["Full minus ...", *map(markdown.heading, group)],
            [
                [ARMS[arm].title, *(_difference(m, *found[m.name]) for m in group)]
                for arm, found in differences.items()
            ],
        )
        for group in groups(results.measures)
    ]


def _difference(measure: Measure, spread: Spread, verdict: Verdict) -> str:
    shown = markdown.number(spread.mean, measure.digits, signed=True)
    return f"**{shown}**" if verdict == "better" else f"({shown})" if verdict == "worse" else shown


def _claims_table(
    results: Results,
    claims: Sequence[Claim],
    differences: Mapping[str, Mapping[str, tuple[Spread, Verdict]]],
) -> str:
    known = {measure.name: measure for measure in results.measures}
    lines = []
    for claim in claims:
        for name in _known(claim, results):
            spread, verdict = differences[claim.worse][name]
            measure = known[name]
            lines.append(
                [
                    claim.said,
                    markdown.heading(measure),
                    markdown.number(spread.mean, measure.digits + 1, signed=True)
                    + markdown.bounds(spread.low, spread.high, measure.digits + 1, signed=True),
                    _SEEN[verdict],
                ]
            )
    return markdown.table(["The paper's claim", "by", "difference", "here"], lines)


def _known(claim: Claim, results: Results) -> list[str]:
    return [name for name in claim.measures if name in {m.name for m in results.measures}]


def sentence(
    claim: Claim,
    results: Results,
    differences: Mapping[str, Mapping[str, tuple[Spread, Verdict]]],
) -> str:
    """What is seen of a claim, in words: "L_reg raises exclusivity: seen by CLIP-ES; ..."."""
    by: dict[str, list[str]] = {}
    titles = {measure.name: measure.title for measure in results.measures}
    for name in _known(claim, results):
        by.setdefault(_SEEN[differences[claim.worse][name][1]], []).append(titles[name])
    said = "; ".join(f"{what} by {', '.join(measures)}" for what, measures in by.items())
    return f"- {markdown.text(claim.said)}: {said or 'not measured'}."


def _notes(cfg: EvaluateConfig, arms: Mapping[str, Sequence[str]], verdicts: int) -> str:
    lines = [
        "\n±: standard deviation over training seeds, each with noise of its own; of text only it "
        "is the noise's alone. Of differences, **bold** = full is better, (in brackets) = full is "
        "worse, by both intervals: the bootstrap over seeds and references, and Student's over "
        f"seeds; the others are undecided. Of {verdicts} verdicts on equal arms a few would be "
        "wrong by chance.",
        "These are figures of the mini world, not the paper's: only what is better compares.",
    ]
    if cfg.ablation.seeds < 2:
        lines.append("One seed decides nothing: give --ablation.seeds 3.")
    if "whole-image" in arms:
        lines.append(
            "Whole image: trained with the null text as every query, so without L_reg, and with "
            "one condition for an image."
        )
    return "\n".join(lines) + "\n"
