"""Overlays rendered by kustomize, and YAML read as Kubernetes reads it."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import UserError

INFRA = Path(__file__).parents[1]
OVERLAYS = INFRA / "overlays"

Document = dict[str, Any]


class _Loader(yaml.SafeLoader):
    """No key twice, and no dates: to Kubernetes `2026-01-01` is a string."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            name = key.value
            if name in seen and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {name!r} is given twice", key.start_mark
                )
            seen.add(name)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [pair for pair in pairs if pair[0] != "tag:yaml.org,2002:timestamp"]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def parse(text: str, where: str) -> list[Any]:
    """The documents of `text`; UserError where it is no YAML, or has a key twice."""
    try:
        return [document for document in yaml.load_all(text, _Loader) if document is not None]
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"{where}:{mark.line + 1}" if mark else where
        problem = getattr(error, "problem", None) or error
        raise UserError(f"{line}: {problem}; mend the YAML there") from error


def load(text: str, where: str) -> list[Document]:
    """The objects of `text`, each a mapping; UserError as of `parse`."""
    documents = parse(text, where)
    for document in documents:
        if not isinstance(document, dict):
            raise UserError(f"{where}: a document is no mapping; give it apiVersion and kind")
    return documents


def overlays(names: list[str]) -> list[Path]:
    """The folders called by name or path, in order; all of infra/overlays without any."""
    if not names:
        found = sorted(path.parent for path in OVERLAYS.glob("*/kustomization.yaml"))
        if not found:
            raise UserError(f"{OVERLAYS}: no overlay there; add one, or name a folder")
        return found
    return [_overlay(name) for name in names]


def _overlay(name: str) -> Path:
    for folder in (OVERLAYS / name, Path(name)):
        if (folder / "kustomization.yaml").is_file():
            return folder
    raise UserError(f"{name}: no such overlay; name a folder of {OVERLAYS}, or a path to one")


def render(folder: Path) -> list[Document]:
    """What `kustomize build` makes of `folder`."""
    done = subprocess.run([*_kustomize(), str(folder)], capture_output=True, text=True)
    if done.returncode:
        problem = " ".join(done.stderr.split()) or f"exit status {done.returncode}"
        raise UserError(f"{folder}: kustomize refuses it: {problem}")
    return load(done.stdout, f"{folder} as rendered")


def renderer_found() -> bool:
    """Whether something that renders overlays is installed."""
    return any(shutil.which(program) for program in ("kustomize", "kubectl"))


def _kustomize() -> list[str]:
    if shutil.which("kustomize"):
        return ["kustomize", "build"]
    if shutil.which("kubectl"):
        return ["kubectl", "kustomize"]
    raise UserError(
        "neither kustomize nor kubectl is installed; infra/checks/kustomize.sh fetches the former"
    )


def sources() -> Iterator[Path]:
    """Every YAML file of infra/: a patch with a key twice is silently half applied."""
    for suffix in ("*.yaml", "*.yml"):
        yield from sorted(INFRA.rglob(suffix))
