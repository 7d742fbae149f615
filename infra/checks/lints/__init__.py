"""Every lint, by name. A lint is added by writing it in one of these modules."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

from infra.checks import render
from infra.checks.findings import Lint
from infra.checks.lints import (
    cluster,
    drain,
    fit,
    identity,
    jobs,
    network,
    placeholders,
    pods,
    references,
    serving,
    training,
    versions,
)


def _named(*modules: ModuleType) -> dict[str, Lint]:
    found = (value for module in modules for value in vars(module).values())
    return {value.name: value for value in found if isinstance(value, Lint)}


RULES = _named(
    versions, cluster, training, jobs, drain, references, network, identity, pods, serving
)
"""What holds for any job."""
FIT = _named(fit)
"""Whether the jobs of this project fit the clusters that they bring."""
LINTS = RULES | FIT
"""What holds for every overlay."""
SITE = _named(placeholders)
"""What holds for a site's own, and not for those that are shipped as examples."""
SHIPPED = frozenset(render.OVERLAYS / name for name in ("ci", "dev", "prod"))


def of(overlay: Path) -> list[Lint]:
    """The lints that the overlay in this folder has to pass."""
    shipped = overlay.resolve() in {folder.resolve() for folder in SHIPPED}
    return list((LINTS if shipped else LINTS | SITE).values())
