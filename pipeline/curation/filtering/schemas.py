"""The many schemas of LAION-like metadata -> one: aliases, casts, and a report of what was found.

Revisions differ in names, case, types and nulls, so no type is trusted: every column is cast.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import polars as pl

from pipeline.config import FilterConfig
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
    "language": ("language", "lang"),
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
    "language": pl.String(),
    "aesthetic": pl.Float32(),
}
SOURCE_KEY = "source_key"
"""The metadata's own key of a row (ours is a hash of the url), for joining scores by it."""
_SOURCE_KEYS = ("key", "id", "sample_id")
# What the filter adds to a row: no column of the metadata may pass through under these names.
_ADDED = ("key", "predictor", "split", "order", "rank", "mix", "reason", "passes", SOURCE_KEY)
_FLOATS = (pl.Float32(), pl.Float64())


@dataclass(frozen=True)
class Mapped:
    """One file's columns under our names: name -> (the file's name, its type). Missing: absent."""

    columns: dict[str, tuple[str, pl.DataType]]
    unused: tuple[str, ...] = ()
    passed: dict[str, pl.DataType] = field(default_factory=dict)
    """Columns that pass through as they are, and the type that all files give them."""

    def column(self, name: str) -> pl.Expr:
        """The column `name`, cast to its type; null where the file has none."""
        if name in self.columns:
            return _cast(name, *self.columns[name])
        return pl.lit(None, TYPES.get(name, pl.String())).alias(name)

    def number(self, name: str) -> pl.Expr:
        """The column `name` for a look at its value: as it is where it is a number, else cast."""
        found, kind = self.columns[name]
        return pl.col(found) if kind.is_numeric() else self.column(name)

    def select(self) -> list[pl.Expr]:
        """Expressions that give every column of TYPES, then those that pass through."""
        return [
            *(self.column(name) for name in TYPES),
            *(
                pl.col(self.columns[name][0]).cast(kind, strict=False).alias(name)
                if name in self.columns
                else pl.lit(None, kind).alias(name)
                for name, kind in self.passed.items()
            ),
        ]


def map_schema(schema: Mapping[str, pl.DataType], cfg: FilterConfig, where: str) -> Mapped:
    """Find our columns in a file's schema, in any case of letters.

    Raises UserError where there is no url, no score in the column asked for, only a score of the
    other predictor, or nothing to join scores by.
    """
    by_lower = _by_lower(schema)
    columns: dict[str, tuple[str, pl.DataType]] = {}
    wanted = dict(ALIASES)
    if cfg.score == "column":
        wanted["aesthetic"] = SCORES[cfg.predictor]
    if cfg.score == "table" and cfg.score_by == "key":
        wanted[SOURCE_KEY] = _SOURCE_KEYS
    for ours, names in wanted.items():
        found = _first(names, by_lower)
        if found is not None:
            columns[ours] = found, schema[found]
    if "url" not in columns:
        raise UserError(
            f"{where} has no url column (columns: {_listed(schema)}); give LAION-like metadata"
        )
    if cfg.score == "column" and "aesthetic" not in columns:
        raise UserError(_no_score(by_lower, cfg.predictor, where, schema))
    if cfg.score == "table":
        check_joined_by(columns, cfg.score_by, where, schema)
    used = {name for name, _ in columns.values()}
    for name in cfg.keep_columns:
        there = by_lower.get(name.lower())
        if there is not None:
            columns[name] = there, schema[there]
            used.add(there)
    return Mapped(columns, tuple(name for name in schema if name not in used))


def passed_through(cfg: FilterConfig, schemas: Sequence[Mapped]) -> dict[str, pl.DataType]:
    """filter.keep_columns, each with a type that holds what all files have under its name.

    Raises UserError for a column that no file has, whose types have none in common, or whose name
    the units use themselves.
    """
    passed: dict[str, pl.DataType] = {}
    for name in cfg.keep_columns:
        if name.lower() in (*TYPES, *_ADDED):
            raise UserError(
                f"filter.keep_columns names {name!r}, which units hold under that name in any case;"
                " leave it out"
            )
        kinds = [m.columns[name][1] for m in schemas if name in m.columns]
        if not kinds:
            unused = sorted({other for mapped in schemas for other in mapped.unused})
            raise UserError(
                f"filter.keep_columns names {name!r}, which no metadata file has; unused columns "
                f"are: {', '.join(unused[:12]) or 'none'}"
            )
        passed[name] = _common(name, kinds)
    return passed


def _common(name: str, kinds: Sequence[pl.DataType]) -> pl.DataType:
    """The narrowest type that every one of `kinds` fits into; a column of nulls has none to say."""
    plain = [pl.String() if isinstance(k, pl.Categorical | pl.Enum) else k for k in kinds]
    told = list(dict.fromkeys(kind for kind in plain if kind != pl.Null()))
    try:
        frames = [pl.DataFrame(schema={name: kind}) for kind in told or [pl.String()]]
        return pl.concat(frames, how="vertical_relaxed").schema[name]
    except pl.exceptions.PolarsError:
        types = " and ".join(map(str, told))
        raise UserError(
            f"filter.keep_columns: the files hold {name} as {types}, which do not go together; "
            "leave it out, or filter them one by one"
        ) from None


def map_scores(schema: Mapping[str, pl.DataType], cfg: FilterConfig, where: str) -> Mapped:
    """Find the score and what it is joined by in a file of a score table; as `map_schema`."""
    by_lower = _by_lower(schema)
    score = _first(SCORES[cfg.predictor], by_lower)
    if score is None:
        raise UserError(_no_score(by_lower, cfg.predictor, where, schema))
    columns = {"aesthetic": (score, schema[score])}
    ours, names = {
        "hash": ("hash", ALIASES["hash"]),
        "url": ("url", ALIASES["url"]),
        "key": (SOURCE_KEY, _SOURCE_KEYS),
    }[cfg.score_by]
    found = _first(names, by_lower)
    if found is not None:
        columns[ours] = found, schema[found]
    check_joined_by(columns, cfg.score_by, where, schema)
    return Mapped(columns)


def check_joined_by(
    columns: Mapping[str, object], by: str, where: str, schema: Mapping[str, pl.DataType]
) -> None:
    """Raise UserError where the column that scores are joined by is missing."""
    ours = SOURCE_KEY if by == "key" else by
    if ours not in columns:
        names = _SOURCE_KEYS if by == "key" else ALIASES[by]
        raise UserError(
            f"{where} has no column {' or '.join(names)} to join scores by (columns: "
            f"{_listed(schema)}); choose another --filter.score_by"
        )


def _by_lower(schema: Mapping[str, pl.DataType]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in schema:
        found.setdefault(name.lower(), name)
    return found


def _first(names: Sequence[str], by_lower: Mapping[str, str]) -> str | None:
    return next((by_lower[name] for name in names if name in by_lower), None)


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
        f"named {' or '.join(SCORES[predictor])}, a table of scores (--filter.score table), or "
        "score the images themselves (--filter.score computed)"
    )


def _listed(schema: Mapping[str, pl.DataType]) -> str:
    names = list(schema)
    return ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")


def _cast(ours: str, name: str, found: pl.DataType) -> pl.Expr:
    column = pl.col(name)
    kind = TYPES.get(ours, pl.String())
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
                "missing": _missing(signature),
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
            missing, unused = _missing(signature), self.unused[signature]
            out.append(
                f"{len(files)} file(s) like {files[0]}: {columns}"
                + (f"; missing: {', '.join(missing)}" if missing else "")
                + (f"; not used: {', '.join(unused)}" if unused else "")
            )
        return out


def _missing(signature: tuple[tuple[str, str, str], ...]) -> list[str]:
    present = {entry[0] for entry in signature}
    return [ours for ours in TYPES if ours not in present]
