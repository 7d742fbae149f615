"""What differs, on the report: an ablation's arms, the paper's claims, and runs that were compared.

Made of ablation.json and comparison.json, which may be absent, broken or hostile.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline import page
from pipeline import report_figures as figures
from pipeline.evaluation.bootstrap import FEW_CLUSTERS
from pipeline.evaluation.results import Measure
from pipeline.report_figures import Figure, Table, figure, mapping, objects, words

_VERDICTS = ("better", "worse", "undecided")
_SEEN = {"seen": "better", "undecided": "undecided", "the opposite is seen": "worse"}
_FULL = "full"


def ablation(told: Mapping[str, Any]) -> dict[str, Any]:
    """What the template shows of an ablation.json; {} where nothing of it can be read."""
    measures, arms = figures.measures(told.get("measures")), _arms(told)
    means = {name: _figures(arm.get("means")) for name, arm in arms.items()}
    groups = figures.groups(measures, means.values())
    if not groups:
        return {}
    differences = {
        name: mapping(found)
        for name, found in mapping(told.get("full_minus")).items()
        if name in arms
    }
    seeds = figures.count(told.get("seeds"))
    return {
        "steps": f"{figures.count(told.get('steps')):,}",
        "seeds": seeds,
        "arms": [_arm_table(title, group, arms, means) for title, group in groups],
        "differences": [
            _difference_table(title, group, arms, differences)
            for title, group in groups
            if differences
        ],
        "claims": _claims(told, measures, differences),
        "looked": [line for _, group in groups for line in figures.looked(group)],
        "titles": {name: _title(name, arm) for name, arm in arms.items()},
        "means": means,
        "measures": measures,
    }


def _arms(told: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    arms = mapping(told.get("arms")).items()
    return {name: mapping(arm) for name, arm in list(arms)[: figures.MOST_LINES]}


def _figures(found: Any) -> dict[str, Figure]:
    return {name: figure(of) for name, of in mapping(found).items()}


def _title(name: str, arm: Mapping[str, Any]) -> str:
    return words(arm.get("title") or name)


def _arm_table(
    title: str,
    group: Sequence[Measure],
    arms: Mapping[str, Mapping[str, Any]],
    means: Mapping[str, Mapping[str, Figure]],
) -> Table:
    lines = []
    for name, arm in arms.items():
        cells = []
        for measure in group:
            found = means[name].get(measure.name, figures.NOTHING)
            deviation = figures.shown(found.deviation, measure.digits)
            small = "" if found.deviation is None else f"± {deviation}"
            cells.append({"mean": figures.shown(found.mean, measure.digits), "small": small})
        trained = mapping(arm.get("train")).items()
        note = words(", ".join(f"{key} {value}" for key, value in trained), 120)
        lines.append({"title": _title(name, arm), "note": note, "cells": cells})
    return {"title": title, "head": ["Arm", *map(figures.heading, group)], "lines": lines}


def _difference_table(
    title: str,
    group: Sequence[Measure],
    arms: Mapping[str, Mapping[str, Any]],
    differences: Mapping[str, Mapping[str, Any]],
) -> Table:
    lines = [
        {
            "title": _title(name, arms[name]),
            "cells": [_difference(measure, mapping(found.get(measure.name))) for measure in group],
        }
        for name, found in differences.items()
    ]
    return {"title": title, "head": ["Full minus …", *map(figures.heading, group)], "lines": lines}


def _difference(measure: Measure, told: Mapping[str, Any]) -> dict[str, str]:
    found, verdict = figure(told), told.get("full_is")
    if found.mean is None:
        return {"mean": figures.shown(None, 0)}
    decided = verdict in ("better", "worse")
    return {
        "mean": figures.shown(found.mean, measure.digits, signed=True),
        "word": f"full is {verdict}" if decided else "undecided",
        "kind": str(verdict) if decided else "undecided",
    }


def _claims(
    told: Mapping[str, Any],
    measures: Sequence[Measure],
    differences: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """The paper's claims by measure, and a sentence on each; {} where there are none."""
    known = {measure.name: measure for measure in measures}
    lines, sentences = [], []
    for claim in objects(told.get("claims")):
        with page.whatever_is_there():
            said, seen = words(claim["said"]), {}
            for name, word in claim["seen"].items():
                if name in known and word in _SEEN:
                    seen[name] = word
                    against = differences.get(claim["worse"], {}) if _of_full(claim) else {}
                    title = "" if len(seen) > 1 else said
                    lines.append(_claim_line(title, known[name], word, mapping(against.get(name))))
            if seen:
                sentences.append(f"{said}: {_counted(list(seen.values()))}")
    if not lines:
        return {}
    head = ["The paper’s claim", "by", "here", "full minus the other arm"]
    return {"table": {"title": "", "head": head, "lines": lines}, "sentences": sentences}


def _of_full(claim: Mapping[str, Any]) -> bool:
    return claim.get("better") == _FULL


def _claim_line(
    said: str, measure: Measure, word: str, difference: Mapping[str, Any]
) -> dict[str, Any]:
    found, digits = figure(difference), measure.digits + 1
    return {
        "title": said,
        "cells": [
            {"mean": figures.heading(measure), "kind": "words"},
            {"mean": word, "kind": _SEEN[word]},
            {
                "mean": figures.shown(found.mean, digits, signed=True),
                "small": figures.interval(found, digits, signed=True),
            },
        ],
    }


def _counted(found: Sequence[str]) -> str:
    """ "seen in 2 of 3 measures, undecided in 1"."""
    of = f" of {len(found)} measure{'s' if len(found) > 1 else ''}"
    parts: list[str] = []
    for word in _SEEN:
        if number := found.count(word):
            parts.append(f"{word} in {number}{'' if parts else of}")
    return ", ".join(parts)


# --- comparisons ------------------------------------------------------------------------


def comparison(told: Mapping[str, Any], titles: Mapping[str, str]) -> dict[str, Any]:
    """What the template shows of a comparison.json; {} where nothing of it can be read.

    titles: of the methods of A, by name.
    """
    known = {measure.name: measure for measure in figures.measures(told.get("measures"))}
    pairs, few = [], 0
    for each in objects(told.get("comparisons")):
        with page.whatever_is_there():
            told_of = (d for d in objects(each["differences"]) if d.get("measure") in known)
            of = [d for d in told_of if figures.count(d.get("pairs"))]
            if of:
                pairs.append(_pair(each, of, known, titles))
            counts = [figures.count(d.get("references")) for d in of]
            few = min([n for n in (few, *counts) if 0 < n < FEW_CLUSTERS], default=0)
    if not pairs:
        return {}
    left_out = told.get("left_out")
    return {
        "a": words(told.get("a"), 200),
        "b": words(told.get("b"), 200),
        "pairs": pairs,
        "verdicts": sum(len(pair["table"]["lines"]) for pair in pairs),
        "few": few,
        "most_few": FEW_CLUSTERS,
        "resamples": f"{figures.count(told.get('resamples')):,}",
        "left_out": [words(line, 200) for line in left_out[: figures.MOST_MEASURES]]
        if isinstance(left_out, list)
        else [],
    }


def _pair(
    told: Mapping[str, Any],
    differences: Sequence[Mapping[str, Any]],
    known: Mapping[str, Measure],
    titles: Mapping[str, str],
) -> dict[str, Any]:
    a, b = str(told["method_a"]), str(told["method_b"])
    lines = [_compared(known[of["measure"]], of) for of in differences]
    verdicts = [line["cells"][0]["kind"] for line in lines]
    better, worse, undecided = (verdicts.count(verdict) for verdict in _VERDICTS)
    head = ["", "B is", "A", "B", "B − A", "B better in", "pairs", "references"]
    return {
        "title": titles.get(a, words(a)) if a == b else f"A: {words(a)}, B: {words(b)}",
        "summary": f"B is better in {better} of {len(lines)} measures, worse in {worse}, "
        f"undecided in {undecided}.",
        "unpaired": [figures.count(told.get("unpaired_a")), figures.count(told.get("unpaired_b"))],
        "table": {"title": "", "head": head, "lines": lines},
    }


def _compared(measure: Measure, told: Mapping[str, Any]) -> dict[str, Any]:
    found, digits = figure(told, "difference"), measure.digits
    share = figures.number(told.get("better_share"))
    verdict = told.get("verdict") if told.get("verdict") in _VERDICTS else "undecided"
    mean_a, mean_b = (figures.number(told.get(key)) for key in ("mean_a", "mean_b"))
    return {
        "title": figures.heading(measure),
        "cells": [
            {"mean": verdict, "kind": verdict},
            {"mean": figures.shown(mean_a, digits)},
            {"mean": figures.shown(mean_b, digits)},
            {
                "mean": figures.shown(found.mean, digits + 1, signed=True),
                "small": figures.interval(found, digits + 1, signed=True),
            },
            {"mean": figures.shown(None, 0) if share is None else f"{100 * share:.1f} %"},
            {"mean": f"{figures.count(told.get('pairs')):,}"},
            {"mean": f"{figures.count(told.get('references')):,}"},
        ],
    }
