"""How a unit's captions are worded, for its marker: their lengths, and the subjects they name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

_EDGES = [*range(0, 31, 2), 40, 60, 100]
_SUBJECTS = 50


class Wording:
    """Counts captions as they come."""

    def __init__(self) -> None:
        self.words = [0] * (len(_EDGES) - 1)
        self.subjects: Counter[str] = Counter()

    def add(self, caption: str, subjects: Sequence[str]) -> None:
        """Count one caption, and each subject that it names once."""
        length = min(len(caption.split()), _EDGES[-1] - 1)
        self.words[sum(length >= edge for edge in _EDGES[1:])] += 1
        self.subjects.update(set(subjects))

    def extra(self) -> dict[str, Any]:
        """`words`: captions by number of words; `subjects`: captions that name each of the most
        frequent ones.
        """
        # equal counts in the order of the names: the same captions give the same marker
        frequent = sorted(self.subjects.items(), key=lambda entry: (-entry[1], entry[0]))
        return {
            "words": {"edges": _EDGES, "rows": self.words},
            "subjects": dict(frequent[:_SUBJECTS]),
        }
