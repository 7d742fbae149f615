"""What schemathesis makes of OpenAPI, fitting and not: no fault of ours, no answer undescribed."""

from __future__ import annotations

import os
from typing import Any

import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis import checks

from tests.pipeline.serving.asking import app
from tests.pipeline.serving.painter import Painter, picture

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "25"))
"""For each route. The seed is fixed, but hypothesis also draws from the constants of the modules
that are loaded: a failure comes again where the same tests ran before it.
"""
HERE = {"Host": "127.0.0.1"}
CHECKS = [
    checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
]
APP = app(Painter(obeys=False), queue=64)
schema = schemathesis.openapi.from_asgi("/openapi.json", APP, headers=HERE)


OPTIONS = settings(
    max_examples=EXAMPLES,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@schema.parametrize()
@OPTIONS
def test_what_anybody_may_ask(case: schemathesis.Case) -> None:
    ask(case)


@schema.include(path="/v1/pictures").parametrize()
@OPTIONS
def test_recipes_that_have_their_pictures(case: schemathesis.Case) -> None:
    """Random bytes are no pictures, and few recipes count them rightly: these go further."""
    if isinstance(case.body, dict):
        case.body["files"] = [picture(), picture(30, 30, "red", "JPEG")]
        recipe = case.body.get("recipe")
        subjects = recipe.get("subjects") if isinstance(recipe, dict) else None
        for subject in subjects if isinstance(subjects, list) else []:
            if isinstance(subject, dict) and isinstance(subject.get("image"), int):
                subject["image"] %= 2
    ask(case)


def ask(case: schemathesis.Case) -> None:
    recipe: Any = case.body.get("recipe") if isinstance(case.body, dict) else None
    if isinstance(recipe, dict):
        recipe.pop("deadline_s", None)  # one that is too short is answered 504, as it should be
    case.call_and_validate(headers=HERE, checks=CHECKS)
