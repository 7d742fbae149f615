"""Every overlay is without findings, and every lint finds what it is for in a broken copy."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from infra.checks import lints
from infra.checks.lints import RULES, SITE, versions
from infra.checks.render import OVERLAYS, Document
from tests.infra.broken import ALLOWED, BREAKAGES, Breakage

Rendered = Callable[[str], list[Document]]


def fired(documents: list[Document]) -> set[str]:
    return {name for name, lint in RULES.items() if lint(documents)}


@pytest.mark.parametrize("overlay", sorted(path.name for path in OVERLAYS.iterdir()))
def test_an_intact_overlay_has_no_findings(overlay: str, rendered: Rendered) -> None:
    documents = rendered(overlay)
    assert [str(finding) for lint in RULES.values() for finding in lint(documents)] == []


@pytest.mark.parametrize("breakage", BREAKAGES, ids=lambda breakage: breakage.name)
def test_a_broken_copy_is_found(breakage: Breakage, rendered: Rendered) -> None:
    documents = rendered("prod")
    breakage.apply(documents)
    assert fired(documents) == set(breakage.lints)
    for finding in RULES[breakage.lints[0]](documents):
        assert re.fullmatch(r"\w+/[\w.-]+: \S.*: .+; .+ \[[a-z0-9-]+\]", str(finding))


@pytest.mark.parametrize("change", ALLOWED, ids=lambda change: change.name)
def test_what_is_right_is_let_pass(change: Breakage, rendered: Rendered) -> None:
    documents = rendered("prod")
    change.apply(documents)
    assert fired(documents) == set()


def test_every_lint_is_proven_to_find_something() -> None:
    assert {breakage.lints[0] for breakage in BREAKAGES} == set(RULES)


def test_a_site_of_its_own_has_no_placeholders(rendered: Rendered) -> None:
    (lint,) = SITE.values()
    assert lint not in lints.of(OVERLAYS / "prod") and lint in lints.of(OVERLAYS / "mine")
    told = "\n".join(map(str, lint(rendered("prod"))))
    for wrong in ("sha256:000", "123456789012", "registry.example.com", "s3://example"):
        assert wrong in told
    plain = {"kind": "Thing", "metadata": {"name": "it"}, "at": "s3://ours/laion, 192.0.3.1"}
    assert lint([plain]) == []


def test_the_pinned_ray_is_the_installed_one() -> None:
    import ray

    assert versions.pinned_ray() == ray.__version__
