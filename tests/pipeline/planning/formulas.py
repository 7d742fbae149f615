"""A formula of the plan, read as a person would and reckoned anew."""

from __future__ import annotations

import math
import re

_NUMBER = r"\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?"
_UNIT = r" [A-Za-z][^\s(),]*"


def evaluate(formula: str) -> float:
    """The value of "ceil(12 images / 5 s) × 3": numbers, one word of a unit after each, + × / and
    ceil, floor, min, max. Raises SyntaxError or NameError for anything else.
    """
    bare = re.sub(f"({_NUMBER})(?:{_UNIT})?", lambda m: m[1].replace(",", ""), formula)
    names = {"ceil": _ceil, "floor": _floor, "min": min, "max": max, "__builtins__": {}}
    return float(eval(bare.replace("×", "*"), names))


def _ceil(value: float) -> int:
    return math.ceil(value - 1e-9 * min(1.0, value))


def _floor(value: float) -> int:
    return math.floor(value + 1e-9)
