"""The environment of salesforce-lavis: how the driver looks it over, how a worker imports LAVIS.

LAVIS pins a transformers that cannot share a process with ours, so it lives in an environment of
its own (`make lavis-env`), in which the caption stage's workers run. Run there as a module, this
file does what a worker will do, and tells the driver the versions it found.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import platform
import subprocess
import sys
import warnings
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

from pipeline.errors import UserError

LAVIS = "1.0.2"
"""The release of salesforce-lavis whose inner parts are known here."""
_LAVIS = "salesforce-lavis"
_MAKE = "run `make lavis-env`, or name the python of an environment it made"
_ROOT = Path(__file__).resolve().parents[3]
# Imported by LAVIS at module level, for videos, scores and other tasks; never used in captioning.
_UNUSED = (
    "decord", "spacy", "pycocoevalcap", "pycocoevalcap.eval", "pycocotools", "pycocotools.coco",
)  # fmt: skip


@functools.cache
def check(python: str, model: str, kind: str) -> str:
    """Absolute path of the environment's interpreter, after a look at it in a process of its own.

    Raises UserError, in one line, if it is not there, does not import LAVIS and what a worker
    needs, knows no such model, or has another Python or Ray than ours.
    """
    # not resolve(): the interpreter of a virtual environment is a link, and found by its own place
    interpreter = Path(python).expanduser().absolute()
    if not interpreter.is_file():
        raise UserError(f"caption.lavis_python: {python} is not there; {_MAKE}")
    path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
    try:
        done = subprocess.run(
            [interpreter, "-m", __spec__.name, model, kind],
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            timeout=600,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"caption.lavis_python: {python} does not run ({error}); {_MAKE}") from None
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    last = lines[-1] if lines else f"exit status {done.returncode}"
    if done.returncode == 2:  # a wrong setting, told by `main`
        raise UserError(last.removeprefix("error: "))
    if done.returncode:
        raise UserError(f"caption.lavis_python: {python} cannot run LAVIS ({last[:200]}); {_MAKE}")
    wanted = {"python": _minor(), "ray": version("ray"), _LAVIS: LAVIS}
    try:
        told = json.loads(last)
        found = {name: told[name] for name in wanted}
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"caption.lavis_python: {python} is no python ({last[:200]!r} instead of versions); "
            f"{_MAKE}"
        ) from None
    for name, ours in wanted.items():
        _compare(python, name, found[name], ours)
    return str(interpreter)


def check_worker() -> None:
    """The same in a worker, whose environment may be another node's: raises the same line."""
    try:
        found = version(_LAVIS)
    except PackageNotFoundError:
        found = "not at all"
    _compare(sys.executable, _LAVIS, found, LAVIS)


def _compare(python: str, name: str, found: str, ours: str) -> None:
    if found != ours:
        raise UserError(
            f"caption.lavis_python: {python} has {name} {found}, but {ours} is needed; {_MAKE}"
        )


def import_lavis() -> Any:
    """The `lavis` package, in its own environment; what it never uses is stood in for."""
    if not _there("lavis"):
        raise ModuleNotFoundError("No module named 'lavis'")
    missing = [name for name in _UNUSED if not _there(name)]
    sys.modules.update({name: _StandIn(name) for name in missing})
    warnings.simplefilter("ignore")
    _import_torchvision()
    import lavis

    return lavis


def model_class(model: str, kind: str) -> Any:
    """LAVIS's class of a model ("blip2_opt"), or one that a module of yours registers with LAVIS
    ("module:name"). Raises UserError for an unknown one, and for a type that it does not have.
    """
    import_lavis()
    from lavis.common.registry import registry

    module, _, name = model.rpartition(":")
    if module:
        importlib.import_module(module)
    found = registry.get_model_class(name)
    if found is None:
        raise UserError(f"caption.lavis_model: LAVIS has no model {name!r}; e.g. blip2_opt")
    if kind not in found.PRETRAINED_MODEL_CONFIG_DICT:
        known = ", ".join(found.PRETRAINED_MODEL_CONFIG_DICT)
        raise UserError(f"caption.lavis_type: {model} has no type {kind!r}; it has {known}")
    return found


class _StandIn(ModuleType):
    """An empty module that gives empty modules; calling one does nothing."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)  # libraries ask with find_spec what is installed

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _StandIn(f"{self.__name__}.{name}")

    def __call__(self, *_: Any, **__: Any) -> None: ...


def _there(name: str) -> bool:
    return importlib.util.find_spec(name.partition(".")[0]) is not None


def _import_torchvision() -> None:
    """Import torchvision; beside a CPU torch, its CUDA build finds its compiled operators missing.

    They are declared then, without any code: LAVIS's transforms call none of them.
    """
    import torch

    try:
        import torchvision
    except RuntimeError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        global _operators  # they are gone when the library is
        _operators = torch.library.Library("torchvision", "DEF")
        _operators.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _operators.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision  # noqa: F401


_operators: Any = None


def _minor() -> str:
    return ".".join(platform.python_version_tuple()[:2])


def main() -> None:
    import_lavis()
    import pipeline.curation.captioning.caption
    import pipeline.progress  # noqa: F401

    if len(sys.argv) > 1:
        model_class(*sys.argv[1:3])
    names = ("ray", _LAVIS, "torch", "transformers")
    print(json.dumps({"python": _minor(), **{name: version(name) for name in names}}))


if __name__ == "__main__":
    from pipeline.errors import run

    run(main)
