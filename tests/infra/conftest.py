"""The overlays as kustomize renders them, once."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache

import pytest

from infra.checks import render


@cache
def _rendered(name: str) -> list[render.Document]:
    return render.render(render.OVERLAYS / name)


@pytest.fixture
def rendered() -> Callable[[str], list[render.Document]]:
    """Overlay name -> a copy of its documents, to be broken at will."""
    if not render.renderer_found():
        pytest.skip("neither kustomize nor kubectl is installed (infra/checks/kustomize.sh DIR)")
    return lambda name: copy.deepcopy(_rendered(name))
