"""Methods under test behind one small protocol, by the names that settings know them by."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from functools import partial

from pipeline.config import EvaluateConfig
from pipeline.errors import UserError
from pipeline.evaluation.methods.dreambooth import DreamBoothLoRA
from pipeline.evaluation.methods.folder import DrawnElsewhere
from pipeline.evaluation.methods.ip_adapter import IPAdapter
from pipeline.evaluation.methods.method import Drawn, Method
from pipeline.evaluation.methods.reference_only import ReferenceOnly
from pipeline.evaluation.methods.ssr import By, SelectBy
from pipeline.evaluation.methods.text_only import TextOnly
from pipeline.evaluation.methods.textual_inversion import TextualInversion

__all__ = ["METHODS", "Drawn", "DrawnElsewhere", "Method", "make_methods"]

Factory = Callable[[str, EvaluateConfig, str | None], Method]
"""(name in results, settings, weights or None) -> the method."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]*")


def _ssr(by: By, name: str, cfg: EvaluateConfig, weights: str | None) -> Method:
    return SelectBy(name, cfg, by, weights)


def _whole_image(name: str, cfg: EvaluateConfig, weights: str | None) -> Method:
    if weights is None:
        raise UserError(
            "methods: whole-image needs an encoder that was trained without selection; name it: "
            "whole-image@FOLDER (trained with --drop_query 1 --tau 0 --queries 1 --mask_cls true)"
        )
    return SelectBy(name, cfg, "nothing", weights)


def _ip_adapter(name: str, cfg: EvaluateConfig, weights: str | None) -> Method:
    if weights is None:
        raise UserError(
            "methods: ip-adapter needs its weights; name them: ip-adapter@h94/IP-Adapter, or a "
            "folder or a file of its layout"
        )
    return IPAdapter(name, cfg, weights)


def _weightless(
    method: Callable[[str, EvaluateConfig], Method],
    known_as: str,
    name: str,
    cfg: EvaluateConfig,
    weights: str | None,
) -> Method:
    if weights is not None:
        raise UserError(f"methods: {known_as} takes no weights ({weights}); leave them out")
    return method(name, cfg)


METHODS: dict[str, Factory] = {
    "text-only": partial(_weightless, TextOnly, "text-only"),
    "ssr-text": partial(_ssr, "text"),
    "ssr-mask": partial(_ssr, "mask"),
    "whole-image": _whole_image,
    "ip-adapter": _ip_adapter,
    "reference-only": partial(_weightless, ReferenceOnly, "reference-only"),
    "textual-inversion": partial(_weightless, TextualInversion, "textual-inversion"),
    "dreambooth-lora": partial(_weightless, DreamBoothLoRA, "dreambooth-lora"),
}
"""By name. The third argument is what stands behind the @ of `methods`."""


def make_methods(cfg: EvaluateConfig) -> list[Method]:
    """The methods of cfg.methods, each `[NAME=]METHOD[@WEIGHTS]`, and after them the pictures of
    cfg.images_from, each `[NAME=]FOLDER`.

    Raises UserError for unknown methods, names that occur twice or cannot name a folder, and what
    the methods refuse.
    """
    made: list[Method] = []
    for spec in cfg.methods:
        said, _, weights = spec.partition("@")  # a path may hold a = too
        name, equals, method = said.partition("=")
        method = method if equals else name
        if method not in METHODS:
            near = difflib.get_close_matches(method, METHODS, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise UserError(
                f"methods: unknown method {method!r}; {hint}there are: {', '.join(METHODS)}; "
                "pictures that another tool drew: --images_from NAME=FOLDER"
            )
        made.append(METHODS[method](_checked(name), cfg, weights or None))
        if name != method:  # two encoders have one title
            made[-1].title += f" ({name})"
    made += [_folder(entry) for entry in cfg.images_from]
    _refuse_twins([method.name for method in made])
    return made


def _folder(entry: str) -> DrawnElsewhere:
    """`NAME=FOLDER`; without a NAME the folder's own is taken."""
    name, equals, folder = entry.partition("=")
    if not equals or "/" in name:  # a path may hold a = too
        name, folder = entry.rstrip("/").rpartition("/")[2], entry
    if not _NAME.fullmatch(name):
        raise UserError(
            f"images_from: {entry!r}: {name!r} cannot name a method; write NAME=FOLDER, NAME of "
            "letters, digits, dots and dashes"
        )
    if not folder:
        raise UserError(f"images_from: {entry!r} names no folder; write NAME=FOLDER")
    return DrawnElsewhere(name, folder)


def _checked(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise UserError(
            f"methods: {name!r} cannot name a method; use letters, digits, dots and dashes"
        )
    return name


def _refuse_twins(names: Sequence[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise UserError(
                f"methods: {name} is there twice; tell them apart: other-name={name}@WEIGHTS"
            )
