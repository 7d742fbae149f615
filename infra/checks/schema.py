"""Objects against their schemas, more strictly than an API server: it drops what it does not know.

Custom resources against the vendored schemas (schemas/README.md) and their CEL rules, core objects
against those of the oldest and the newest Kubernetes, which kubernetes-validate brings.
"""

from __future__ import annotations

import copy
import gzip
import json
import logging
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import celpy
import kubernetes_validate
from jsonschema import Draft202012Validator
from jsonschema.exceptions import relevance

from infra.checks.findings import Finding, subject
from infra.checks.render import Document

OLDEST = "1.33"
"""The oldest Kubernetes that the manifests are for: there native sidecars are stable, and
ValidatingAdmissionPolicy is v1 (since 1.30). What is newer than it is found by its schemas.
"""
NEWEST = kubernetes_validate.latest_version()
"""The newest whose schemas kubernetes-validate brings; what is gone by then is found by them."""

FOLDER = Path(__file__).parent / "schemas"

_STRINGS = {"type": "object", "additionalProperties": {"type": "string"}}
# A CRD says only that metadata is an object; the API server knows what it holds.
_METADATA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "generateName": {"type": "string"},
        "namespace": {"type": "string"},
        "labels": _STRINGS,
        "annotations": _STRINGS,
        "finalizers": {"type": "array", "items": {"type": "string"}},
        "ownerReferences": {"type": "array", "items": {"type": "object"}},
    },
}


def check(documents: list[Document]) -> Iterator[Finding]:
    """What the schemas and CEL rules refuse in `documents`."""
    for document in documents:
        version, kind = document.get("apiVersion"), document.get("kind")
        if not isinstance(version, str) or not isinstance(kind, str):
            yield Finding(
                subject(document), "apiVersion, kind", "not given", "say what it is", "schema"
            )
        elif _file(version, kind).is_file():
            yield from _custom(document, _load(_file(version, kind)))
        else:
            # the same in both, mostly: said once
            yield from dict.fromkeys(
                found for version in (OLDEST, NEWEST) for found in _core(document, version)
            )


def close(schema: dict[str, Any]) -> dict[str, Any]:
    """`schema` as strict JSON schema: objects with `properties` take no others, what has a default
    is not required, and Kubernetes' own words are put into JSON schema's.

    `x-kubernetes-preserve-unknown-fields` leaves an object open, `x-kubernetes-int-or-string` and
    `nullable` become types. What allOf and its kin hold are conditions on values, not structure.
    """
    closed = {key: value for key, value in schema.items() if key not in ("default", "nullable")}
    properties = schema.get("properties")
    if properties is not None:
        closed["properties"] = {name: close(value) for name, value in properties.items()}
        open_ended = schema.get("x-kubernetes-preserve-unknown-fields")
        if "additionalProperties" not in schema and not open_ended:
            closed["additionalProperties"] = False
        closed["required"] = [
            name for name in schema.get("required", ()) if "default" not in properties.get(name, {})
        ]
    for inside in ("items", "additionalProperties"):
        if isinstance(schema.get(inside), dict):
            closed[inside] = close(schema[inside])
    if schema.get("x-kubernetes-int-or-string"):
        closed["type"] = ["integer", "string"]
        closed.pop("anyOf", None)  # says the same, twice in a refusal
    if schema.get("nullable") and isinstance(closed.get("type"), str):
        closed["type"] = [closed["type"], "null"]
    return closed


def with_defaults(value: Any, schema: dict[str, Any]) -> Any:
    """A copy of `value` as the API server stores it, with the schema's defaults: CEL sees these."""
    if isinstance(value, dict):
        properties, rest = schema.get("properties", {}), schema.get("additionalProperties")
        value = dict(value)
        for name, part in properties.items():
            if "default" in part and value.get(name) is None:
                value[name] = copy.deepcopy(part["default"])
        for name, part in value.items():
            inside = properties.get(name, rest)
            value[name] = with_defaults(part, inside) if isinstance(inside, dict) else part
        return value
    if isinstance(value, list) and isinstance(schema.get("items"), dict):
        return [with_defaults(part, schema["items"]) for part in value]
    return value


def dotted(path: Iterator[str | int] | list[str | int]) -> str:
    """spec.groups[0].name for ["spec", "groups", 0, "name"]."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}"
    return text.removeprefix(".") or "."


def _custom(document: Document, schema: dict[str, Any]) -> Iterator[Finding]:
    validator = Draft202012Validator(close(schema))
    problems = sorted(validator.iter_errors(document), key=lambda error: list(map(str, error.path)))
    for problem in problems:
        yield Finding(
            subject(document),
            dotted(list(problem.absolute_path)),
            _short(problem.message),
            "the API server would refuse or drop it",
            "schema",
        )
    if not problems:  # CEL is compiled for the schema's types
        yield from _cel(document, with_defaults(document, schema), schema, [])


def _cel(
    document: Document, value: Any, schema: dict[str, Any], path: list[str | int]
) -> Iterator[Finding]:
    for validation in schema.get("x-kubernetes-validations", ()):
        rule = validation["rule"]
        if "oldSelf" in rule:  # holds between two versions of an object; a file is one
            continue
        try:
            kept = bool(_program(rule).evaluate({"self": celpy.json_to_cel(value)}))
            message = validation.get("message", rule)
        except celpy.CELEvalError as error:
            kept, message = False, f"{rule} cannot be evaluated ({error.args[0]})"
        if not kept:
            do = "the API server would refuse it"
            yield Finding(subject(document), dotted(path), _short(message), do, "cel")
    if isinstance(value, dict):
        rest = schema.get("additionalProperties")
        for name, part in value.items():
            inside = schema.get("properties", {}).get(name, rest)
            if isinstance(inside, dict):
                yield from _cel(document, part, inside, [*path, name])
    elif isinstance(value, list) and isinstance(schema.get("items"), dict):
        for index, part in enumerate(value):
            yield from _cel(document, part, schema["items"], [*path, index])


def _core(document: Document, kubernetes: str) -> Iterator[Finding]:
    try:
        kubernetes_validate.validate(document, kubernetes, strict=True)
    except kubernetes_validate.ValidationError as error:
        # of the branches of a oneOf, the one that was meant
        cause = max([error, *(error.context or ())], key=relevance)
        where = [*error.absolute_path, *(cause.path if cause is not error else ())]
        do = "the API server would refuse or drop it"
        yield Finding(subject(document), dotted(where), _short(cause.message), do, "schema")
    except kubernetes_validate.SchemaNotFoundError:
        kind = f"{document['apiVersion']} {document['kind']}"
        wrong = f"no schema of {kind} (Kubernetes {OLDEST} to {NEWEST})"
        do = "mend a typo, or vendor the custom resource's schema"
        yield Finding(subject(document), "kind", wrong, do, "schema")


def _file(version: str, kind: str) -> Path:
    return FOLDER / f"{version.replace('/', '_')}_{kind}.json.gz"


@cache
def _load(path: Path) -> dict[str, Any]:
    """The CRD's schema, with what each object has besides."""
    schema: dict[str, Any] = json.loads(gzip.decompress(path.read_bytes()))["openAPIV3Schema"]
    text = {"type": "string"}
    own = {"apiVersion": text, "kind": text, "metadata": _METADATA}
    return {**schema, "properties": {**schema["properties"], **own}}


@cache
def _program(rule: str) -> celpy.Runner:
    logging.getLogger("celpy").setLevel(logging.WARNING)
    environment = celpy.Environment()
    return environment.program(environment.compile(rule))


def _short(message: str) -> str:
    return message if len(message) <= 200 else f"{message[:120]} ... {message[-70:]}"
