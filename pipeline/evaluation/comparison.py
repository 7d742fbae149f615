"""Is the new one better? Two methods, or two runs of one, picture by picture.

Both drew the same requests from the same noise, so each picture of B is compared with A's of the
same key: what makes a request hard is hard for both, and leaves the difference. Intervals are of
references drawn whole (bootstrap.py). A picture that only one of them drew, or was measured on only
one side, is left out: a measure that is not defined for failures (the palette of a subject that is
not there) compares those pictures on which both succeed.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
import pyarrow as pa

from pipeline.config import CompareConfig
from pipeline.errors import UserError
from pipeline.evaluation import bootstrap, markdown
from pipeline.evaluation.bootstrap import Floats, Spread
from pipeline.evaluation.results import Measure, Results, matrix, names
from pipeline.storage import Storage

Verdict = Literal["better", "worse", "undecided"]

_ROUNDING = 0.2
"""Of a measure's last digit shown: a pair that differs by less does not differ."""
_SAME = ("seed", "reference", "prompt", "asked")
"""What pictures of one key have in common; else they are not of one request."""


@dataclass(frozen=True)
class Difference:
    """B against A in one measure, over the pairs in which both have a value."""

    measure: str
    mean_a: float | None
    mean_b: float | None
    """Means over the pairs; None = there is no pair."""
    difference: float | None
    """mean_b - mean_a."""
    low: float | None
    high: float | None
    """95 % interval of the difference; None = the pairs are of fewer than two references."""
    better_share: float | None
    """Share of resamples in which B is better; ties count half."""
    pairs: int
    references: int
    verdict: Verdict
    """Of B: better or worse where the interval excludes 0, else undecided."""


@dataclass(frozen=True)
class Comparison:
    """A method of B against one of A."""

    method_a: str
    method_b: str
    pairs: int
    """Pictures of the same request, whether measured or not."""
    unpaired_a: int
    unpaired_b: int
    """Pictures that only one of them drew."""
    differences: tuple[Difference, ...]


def compare_methods(
    a: Results,
    b: Results,
    method_a: str,
    method_b: str,
    resamples: int = bootstrap.RESAMPLES,
    seed: int = 0,
) -> Comparison:
    """Paired differences in every measure that both have (`common_measures`).

    Raises UserError: other benches, no picture in common, or pictures of one key that are not of
    one request (another seed of noise, prompt, reference or subject).
    """
    _refuse_other_bench(a, b)
    measures, _ = common_measures(a, b)
    rows_a, rows_b = a.of_method(method_a), b.of_method(method_b)
    paired_a, paired_b = _paired(rows_a, rows_b, f"{method_a} and {method_b}")
    found = _differences(
        measures,
        matrix(paired_a, measures),
        matrix(paired_b, measures),
        names(paired_a["reference"]),
        resamples,
        seed,
    )
    pairs = len(paired_a)
    return Comparison(
        method_a, method_b, pairs, len(rows_a) - pairs, len(rows_b) - pairs, tuple(found)
    )


def compare_arms(
    results: Results,
    a: Sequence[str],
    b: Sequence[str],
    resamples: int = bootstrap.RESAMPLES,
    seed: int = 0,
) -> dict[str, tuple[Spread, Verdict]]:
    """Two arms of an ablation: by measure mean(B) - mean(A) over training seeds, and a verdict.

    a, b: each arm's methods, one for each training seed, in the same order of seeds. Better or
    worse takes both: the bootstrap interval of seeds and references excludes 0, and so does
    Student's over seeds, without which three seeds that agree by chance (one time in four) would
    decide. One seed decides nothing.
    """
    if len(a) != len(b) or not a:
        raise UserError(f"arms of {len(a)} and {len(b)} training seeds cannot be paired")
    measures, runs = results.measures, []
    for one, other in zip(a, b, strict=True):
        rows = _paired(results.of_method(one), results.of_method(other), f"{one} and {other}")
        scores = [matrix(side, measures) for side in rows]
        runs.append((_subtracted(measures, *scores), names(rows[0]["reference"])))
    found = bootstrap.over_seeds(runs, resamples, seed)
    return {m.name: (of, _of_arm(m, of)) for m, of in zip(measures, found, strict=True)}


def _of_arm(measure: Measure, found: Spread) -> Verdict:
    if found.mean is None or found.margin is None:
        return "undecided"
    over_seeds = verdict(measure, found.mean - found.margin, found.mean + found.margin)
    over_references = verdict(measure, found.low, found.high)
    return over_seeds if over_seeds == over_references else "undecided"


def common_measures(a: Results, b: Results) -> tuple[list[Measure], list[str]]:
    """Measures of both, as A tells of them, and a line for each that cannot be compared."""
    others = {measure.name: measure for measure in b.measures}
    common, left_out = [], []
    for measure in a.measures:
        other = others.pop(measure.name, None)
        if other is None:
            left_out.append(f"{measure.title} is in A alone")
        elif other.backbone != measure.backbone:
            left_out.append(
                f"{measure.title} looks with {measure.backbone} in A, with {other.backbone} in B"
            )
        elif other.better != measure.better:
            raise UserError(
                f"{measure.title} is better when {measure.better} in A, when {other.better} in B; "
                "evaluate both with the same version"
            )
        else:
            common.append(measure)
    left_out += [f"{measure.title} is in B alone" for measure in others.values()]
    if not common:
        why = "; ".join(left_out[:3]) or "there are none"
        raise UserError(f"no measure can be compared: {why}; evaluate both with the same backbones")
    return common, left_out


def _differences(
    measures: Sequence[Measure],
    a: Floats,
    b: Floats,
    references: np.ndarray,
    resamples: int,
    seed: int,
) -> list[Difference]:
    """a, b: (pairs, measures)."""
    differences = _subtracted(measures, a, b)
    drawn = bootstrap.resampled_means(differences, references, resamples, seed)
    found = bootstrap.summarise(differences, references, drawn)
    out = []
    for i, (measure, of) in enumerate(zip(measures, found, strict=True)):
        both = ~np.isnan(differences[:, i])
        out.append(
            Difference(
                measure=measure.name,
                mean_a=float(a[both, i].mean()) if both.any() else None,
                mean_b=float(b[both, i].mean()) if both.any() else None,
                difference=of.mean,
                low=of.low,
                high=of.high,
                better_share=_share_above_zero(measure.sign * drawn[:, i]),
                pairs=of.samples,
                references=of.clusters,
                verdict=verdict(measure, of.low, of.high),
            )
        )
    return out


def _subtracted(measures: Sequence[Measure], a: Floats, b: Floats) -> Floats:
    """b - a, (pairs, measures); NaN where either is."""
    differences = b - a
    # The same picture drawn in another batch, or on another number of threads, has other float32
    # sums and some pixels that differ by a level: cosines by 0.0001.
    rounding = np.array([_ROUNDING * 10.0**-measure.digits for measure in measures])
    differences[np.abs(differences) < rounding] = 0.0
    return differences


def verdict(measure: Measure, low: float | None, high: float | None) -> Verdict:
    """What an interval of a difference says of what comes second."""
    if low is None or high is None or low <= 0 <= high:
        return "undecided"
    return "better" if low * measure.sign > 0 else "worse"


def _share_above_zero(values: Floats) -> float | None:
    known = values[~np.isnan(values)]
    if not len(known):
        return None
    return float(np.mean(known > 0) + np.mean(known == 0) / 2)


# --- pairing ----------------------------------------------------------------------------


def _paired(a: pa.Table, b: pa.Table, who: str) -> tuple[pa.Table, pa.Table]:
    """Rows of the same key, in the keys' order: so nothing depends on how the files lie."""
    row_a = {key: row for row, key in enumerate(a["key"].to_pylist())}
    row_b = {key: row for row, key in enumerate(b["key"].to_pylist())}
    keys = sorted(row_a.keys() & row_b.keys())
    if not keys:
        raise UserError(f"{who} have no picture in common; evaluate both on the same bench")
    paired = a.take([row_a[key] for key in keys]), b.take([row_b[key] for key in keys])
    _refuse_other_requests(*paired)
    return paired


def _refuse_other_bench(a: Results, b: Results) -> None:
    for name in sorted({*a.bench, *b.bench}):
        one, other = a.bench.get(name), b.bench.get(name)
        if one != other:
            raise UserError(
                f"the benches differ: {name!r:.40} is {one!r:.60} in A, {other!r:.60} in B; "
                "evaluate both on one bench"
            )


def _refuse_other_requests(a: pa.Table, b: pa.Table) -> None:
    for column in _SAME:
        one, other = a[column].to_pylist(), b[column].to_pylist()
        for key, left, right in zip(a["key"].to_pylist(), one, other, strict=True):
            if left != right:
                raise UserError(
                    f"{key!r:.80} has {column} {left!r:.60} in A, {right!r:.60} in B: the pictures "
                    "are not of one request; evaluate both with the same settings"
                )


# --- the command ------------------------------------------------------------------------


def compare(cfg: CompareConfig) -> str:
    """Compare B (cfg.other) with A (cfg.root); returns Markdown, with where it lies.

    Writes comparison.json and comparison.md to cfg.out, or to evaluation/<bench>/comparisons/<name>
    of A, where the name is that of B's folder and a hash of what was compared.
    """
    storage, other = Storage(cfg.root), Storage(cfg.other or cfg.root)
    path = f"evaluation/{cfg.bench}/scores.parquet"
    a = Results.read(storage, path)
    b = a if other == storage else Results.read(other, path)
    pairs = _chosen(cfg, a, b, same=storage == other)
    found = [compare_methods(a, b, *pair, cfg.resamples, cfg.seed) for pair in pairs]
    measures, left_out = common_measures(a, b)
    sides = {"a": storage.url(path), "b": other.url(path)}
    told = {
        **sides,
        "bench": dict(a.bench),
        "resamples": cfg.resamples,
        "seed": cfg.seed,
        "measures": [asdict(measure) for measure in measures],
        "left_out": left_out,
        "comparisons": [asdict(comparison) for comparison in found],
    }
    text = render(found, measures, left_out, a, b, sides, cfg.resamples)
    name = _name(other, pairs)
    out = Storage(cfg.out) if cfg.out else storage.sub(f"evaluation/{cfg.bench}/comparisons/{name}")
    out.write_json("comparison.json", told)
    out.write_bytes("comparison.md", text.encode())
    return f"{text}\ncomparison: {out.url('comparison.md')}"


def _chosen(cfg: CompareConfig, a: Results, b: Results, same: bool) -> list[tuple[str, str]]:
    """Pairs of methods to compare: those that settings name, or all that both have."""
    pairs = [_pair(word) for word in cfg.methods]
    if same and (not pairs or any(one == other for one, other in pairs)):
        raise UserError(
            "A and B are one run; name another with --other, or two methods of this one with "
            "--methods ssr-text:ssr-mask"
        )
    if not pairs:
        pairs = [(method, method) for method in a.methods if method in b.methods]
    if not pairs:
        raise UserError(
            f"no method is in both: A has {', '.join(a.methods)}, B has {', '.join(b.methods)}; "
            "name which to compare: --methods OF_A:OF_B"
        )
    for pair in pairs:
        for side, results, method in zip("AB", (a, b), pair, strict=True):
            if method not in results.methods:
                there = ", ".join(results.methods)
                raise UserError(f"methods: {side} has no method {method!r}; it has: {there}")
    return pairs


def _pair(word: str) -> tuple[str, str]:
    one, colon, other = word.partition(":")
    if not one or (colon and not other):
        raise UserError(f"methods: {word!r} is no pair of methods; write ssr-text:ssr-mask")
    return one, other if colon else one


def _name(other: Storage, pairs: Sequence[tuple[str, str]]) -> str:
    folder = re.sub(r"[^A-Za-z0-9.-]+", "-", other.url().rpartition("/")[2])[:60].strip(".-")
    what = json.dumps([other.url(), sorted(pairs)]).encode()
    return f"{folder or 'run'}-{hashlib.sha256(what).hexdigest()[:8]}"


# --- Markdown ---------------------------------------------------------------------------

_HEADER = ["", "A", "B", "B − A", "B better in", "pairs", "references", "B is"]


def render(
    comparisons: Sequence[Comparison],
    measures: Sequence[Measure],
    left_out: Sequence[str],
    a: Results,
    b: Results,
    sides: Mapping[str, str],
    resamples: int,
) -> str:
    """A table for each pair of methods, without measures that no pair of pictures has, and what was
    left out. sides: where A and B lie.
    """
    parts = [f"A: {markdown.text(sides['a'])}\\\nB: {markdown.text(sides['b'])}\n"]
    for found in comparisons:
        titles = [of.methods[m].title for of, m in ((a, found.method_a), (b, found.method_b))]
        title = titles[0] if len(set(titles)) == 1 else f"A: {titles[0]}; B: {titles[1]}"
        both = zip(measures, found.differences, strict=True)
        lines = [_cells(m, d) for m, d in both if d.pairs]
        parts.append(f"### {markdown.text(title)}\n\n{markdown.table(_HEADER, lines)}")
        if found.unpaired_a or found.unpaired_b:
            parts.append(
                f"Left out, for the other did not draw them: {found.unpaired_a} pictures of A, "
                f"{found.unpaired_b} of B.\n"
            )
    parts += [f"Not compared: {markdown.text(line)}.\n" for line in left_out]
    return "\n".join([*parts, *_notes(comparisons, resamples)])


def _notes(comparisons: Sequence[Comparison], resamples: int) -> list[str]:
    """How far the verdicts can be trusted."""
    differences = [of for found in comparisons for of in found.differences if of.pairs]
    notes = [
        "Means are over the pairs in which both have a value; in brackets the 95 % interval of the "
        f"difference, from {resamples:,} resamples of references. Where it excludes 0, B is better "
        "or worse; *B better in* is the share of resamples. Of twenty such verdicts on equal "
        f"methods one is wrong by chance, and there are {len(differences)} here.\n"
    ]
    few = [of.references for of in differences if 0 < of.references < bootstrap.FEW_CLUSTERS]
    if few:
        notes.append(
            f"Of fewer than {bootstrap.FEW_CLUSTERS} references (here {min(few)}) intervals are "
            "too narrow: a verdict on them is a hint.\n"
        )
    return notes


def _cells(measure: Measure, of: Difference) -> list[str]:
    digits = measure.digits
    bounds = markdown.bounds(of.low, of.high, digits + 1, signed=True)
    share = markdown.NOTHING if of.better_share is None else f"{100 * of.better_share:.1f} %"
    return [
        markdown.heading(measure),
        markdown.number(of.mean_a, digits),
        markdown.number(of.mean_b, digits),
        markdown.number(of.difference, digits + 1, signed=True) + bounds,
        share,
        str(of.pairs),
        str(of.references),
        of.verdict,
    ]
