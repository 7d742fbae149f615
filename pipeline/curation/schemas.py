"""The many schemas of LAION-like metadata -> one: aliases, casts, and a report of what was found.

Revisions differ in names, case, types and nulls, so no type is trusted: every column is cast.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import polars as pl

from pipeline.errors import UserError

# our name -> the names that revisions use for it, in lower case, the best first
ALIASES: dict[str, tuple[str, ...]] = {
    "url": ("url", "image_url"),
    "alt_text": ("caption", "text", "alt_text"),
    "width": ("width", "original_width"),
    "height": ("height", "original_height"),
    "similarity": ("similarity", "clip_similarity_vitl14", "clip_similarity_vitb32"),
    "hash": ("hash",),
    "punsafe": ("punsafe", "nsfw_score_opennsfw2"),
    "pwatermark": ("pwatermark", "watermark_score"),
}
# The predictors share nothing but the word: a score is only ever read under its own name.
SCORES: dict[str, tuple[str, ...]] = {
    "v1": ("aesthetic", "aesthetic_score_laion_v1"),
    "v2": ("aesthetic_score", "aesthetic_score_laion_v2"),
}
TYPES: dict[str, pl.DataType] = {
    "url": pl.String(),
    "alt_text": pl.String(),
    "width": pl.Int32(),
    "height": pl.Int32(),
    "similarity": pl.Float32(),
    "hash": pl.Int64(),
    "punsafe": pl.Float32(),
    "pwatermark": pl.Float32(),
    "aesthetic": pl.Float32(),
}
_FLOATS = (pl.Float32(), pl.Float64())


@dataclass(frozen=True)
class Mapped:
    """One file's columns under our names: name -> (the file's name, its type). Missing: absent."""

    columns: dict[str, tuple[str, pl.DataType]]
    unused: tuple[str, ...] = ()

    def select(self) -> list[pl.Expr]:
        """Expressions that give every column of TYPES, cast; a missing one is null."""
        return [
            _cast(name, *self.columns[name])
            if name in self.columns
            else pl.lit(None, kind).alias(name)
            for name, kind in TYPES.items()
        ]


def map_schema(schema: Mapping[str, pl.DataType], predictor: str, where: str) -> Mapped:
    """Find our columns in a file's schema, in any case of letters.

    Raises UserError where there is no url, no score, or only a score of the other predictor.
    """
    by_lower: dict[str, str] = {}
    for name in schema:
        by_lower.setdefault(name.lower(), name)
    columns: dict[str, tuple[str, pl.DataType]] = {}
    for ours, names in {**ALIASES, "aesthetic": SCORES[predictor]}.items():
        found = next((by_lower[name] for name in names if name in by_lower), None)
        if found is not None:
            columns[ours] = found, schema[found]
    if "url" not in columns:
        raise UserError(
            f"{where} has no url column (columns: {_listed(schema)}); give LAION-like metadata"
        )
    if "aesthetic" not in columns:
        raise UserError(_no_score(by_lower, predictor, where, schema))
    used = {name for name, _ in columns.values()}
    return Mapped(columns, tuple(name for name in schema if name not in used))


def _no_score(
    by_lower: Mapping[str, str], predictor: str, where: str, schema: Mapping[str, pl.DataType]
) -> str:
    for other, names in SCORES.items():
        for name in names:
            if other != predictor and name in by_lower:
                return (
                    f"{where}: column {by_lower[name]} holds scores of predictor {other}, but "
                    f"filter.min_aesthetic speaks of {predictor}, on another scale; give metadata "
                    f"with {SCORES[predictor][0]}, or set --filter.predictor {other} and its bound"
                )
    return (
        f"{where} has no aesthetic score (columns: {_listed(schema)}); give metadata with a column "
        f"named {' or '.join(SCORES[predictor])}"
    )


def _listed(schema: Mapping[str, pl.DataType]) -> str:
    names = list(schema)
    return ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")


def _cast(ours: str, name: str, found: pl.DataType) -> pl.Expr:
    column = pl.col(name)
    kind = TYPES[ours]
    if found == pl.UInt64() and ours == "hash":
        column = column.reinterpret(signed=True)  # the same 64 bits
    elif found in _FLOATS:
        column = column.fill_nan(None)
    return column.cast(kind, strict=False).alias(ours)


@dataclass
class SchemaReport:
    """Which schemas the input files have: lines for people, and the same as JSON."""

    groups: dict[tuple[tuple[str, str, str], ...], list[str]] = field(default_factory=dict)
    unused: dict[tuple[tuple[str, str, str], ...], tuple[str, ...]] = field(default_factory=dict)

    def add(self, file: str, mapped: Mapped) -> None:
        signature = tuple((ours, name, str(kind)) for ours, (name, kind) in mapped.columns.items())
        self.groups.setdefault(signature, []).append(file)
        self.unused[signature] = mapped.unused

    def to_json(self) -> list[dict[str, object]]:
        return [
            {
                "files": len(files),
                "example": files[0],
                "columns": {ours: f"{name} {kind}" for ours, name, kind in signature},
                "missing": [
                    ours for ours in TYPES if ours not in {entry[0] for entry in signature}
                ],
                "unused": list(self.unused[signature]),
            }
            for signature, files in self.groups.items()
        ]

    def lines(self) -> list[str]:
        out = []
        for signature, files in self.groups.items():
            columns = ", ".join(
                f"{ours} = {name} ({kind})" if ours != name else f"{ours} ({kind})"
                for ours, name, kind in signature
            )
            present = {entry[0] for entry in signature}
            missing = [ours for ours in TYPES if ours not in present]
            out.append(
                f"{len(files)} file(s) like {files[0]}: {columns}"
                + (f"; missing: {', '.join(missing)}" if missing else "")
            )
        return out
