"""From a language model's scores to captions: draws, ends that were cut, loops, and nothing said.

Both backends decode through transformers' `generate`, of different ages; what is here asks for
nothing of either but its tokens and scores.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from pipeline.config import CaptionConfig

# A caption that was cut does not end in these: what they were to lead to is gone.
_LEADING = re.compile(
    r"(an?|the|and|or|but|with|of|on|in|at|to|from|by|for|as|near|into|onto|over|under|is|are|was"
    r"|were|that|which|who|while|its|his|her|their|this),?",
    re.IGNORECASE,
)
# Words in a run that is said again, and how often in a row makes a loop of it.
_LOOPS = ((1, 3), (2, 3), (3, 2), (4, 2), (5, 2), (6, 2))


def decoding(cfg: CaptionConfig) -> dict[str, Any]:
    """Every setting that shapes a caption once model and images are given."""
    names = (
        "prompt", "max_new_tokens", "min_new_tokens", "num_beams", "length_penalty",
        "repetition_penalty", "no_repeat_ngram_size", "temperature", "top_p", "seed",
        "captions_per_image", "dtype",
    )  # fmt: skip
    return {name: getattr(cfg, name) for name in names}


class SeededSampling:
    """Nucleus sampling as a logits processor: each draw is the row's own, not the batch's.

    `generate` would draw for the whole batch from one generator, so that a caption depended on its
    neighbours. Here a row's uniform numbers are a hash of (seed, key, index of the caption), and
    the token is where the number falls in the nucleus, likeliest first. All other tokens get -inf,
    so that whatever `generate` does next can only take this one.
    """

    def __init__(self, cfg: CaptionConfig, keys: Sequence[str], end: int | Sequence[int]) -> None:
        self.temperature, self.top_p = cfg.temperature, cfg.top_p
        self.draws = np.stack(
            [
                _uniform(f"{cfg.seed}/{index}/{key}", cfg.max_new_tokens + 1)
                for key in keys
                for index in range(cfg.captions_per_image)
            ]
        )
        self.ends = np.atleast_1d(np.asarray(end))
        self.running = np.ones(len(self.draws), dtype=bool)
        self.taken: list[np.ndarray] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores (rows, vocabulary) -> the same shape, all -inf but for the token drawn."""
        log_p = scores.float().log_softmax(-1)
        ordered, tokens = (log_p / self.temperature).sort(descending=True, stable=True)
        p = ordered.softmax(-1)
        reach = p.cumsum(-1)
        nucleus = (reach - p < self.top_p) & (p > 0)  # the likeliest is always in
        total = (p * nucleus).sum(-1, keepdim=True)
        draw = torch.from_numpy(self.draws[:, len(self.taken)]).to(p)[:, None] * total
        place = (reach <= draw).sum(-1, keepdim=True).clamp(max=nucleus.sum(-1, keepdim=True) - 1)
        token = tokens.gather(1, place)
        self.taken.append(
            np.where(self.running, log_p.gather(1, token)[:, 0].cpu().numpy(), np.nan)
        )
        self.running &= ~np.isin(token[:, 0].cpu().numpy(), self.ends)
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)

    def likelihood(self) -> np.ndarray:
        """Mean log-probability of a token of each row, (rows,), by the model's own scores."""
        return np.nanmean(np.stack(self.taken), axis=0)  # type: ignore[no-any-return]


def texts(tokenizer: Any, ids: torch.Tensor, limit: int, end: int | Sequence[int]) -> list[str]:
    """New tokens (rows, at most limit + 1) -> texts of at most `limit` tokens, in whole words.

    The token beyond the limit is never told. It shows whether the text ended there, and if not,
    whether its last word did: a word cut in two is left out, and then whatever led to it ("a dog
    on the sa" is "a dog").
    """
    made = []
    plain = tokenizer.batch_decode(ids[:, :limit], skip_special_tokens=True)
    longer = tokenizer.batch_decode(ids, skip_special_tokens=True)
    ends = set(np.atleast_1d(np.asarray(end)).tolist())
    for row, text, whole in zip(ids.tolist(), plain, longer, strict=True):
        words = text.split()
        if len(row) > limit and not ends & set(row):
            if words and words != whole.split()[: len(words)]:
                words.pop()
            while words and _LEADING.fullmatch(words[-1]):
                words.pop()
        made.append(" ".join(words))
    return made


def grouped(made: list[str], size: int, sampling: SeededSampling | None) -> list[list[str]]:
    """Texts of all rows, image by image, likeliest first.

    Beams come in that order; of samples, the likeliest by token is put first, for `caption`.
    """
    order = np.arange(len(made)).reshape(-1, size)
    if sampling is not None:
        ranks = np.argsort(-sampling.likelihood().reshape(-1, size), axis=1, kind="stable")
        order = np.take_along_axis(order, ranks, axis=1)
    return [[made[index] for index in row] for row in order.tolist()]


def mended(text: str) -> tuple[str, str]:
    """(caption, "") with loops taken out, or ("", reason) for a text that describes nothing.

    Reasons: `empty_caption`, without a letter or digit; `repeated_word`, one word over and over.
    """
    words = text.split()
    if not any(character.isalnum() for character in text):
        return "", "empty_caption"
    if len(words) > 1 and len({_bare(word) for word in words}) == 1:
        return "", "repeated_word"
    for size, times in _LOOPS:
        words = _unlooped(words, size, times)
    return " ".join(words), ""


def _unlooped(words: list[str], size: int, times: int) -> list[str]:
    """Words without the repeats of any run of `size` words that stands `times` in a row or more."""
    kept: list[str] = []
    i = 0
    while i < len(words):
        run, repeats = [_bare(word) for word in words[i : i + size]], 1
        while [_bare(w) for w in words[i + repeats * size : i + (repeats + 1) * size]] == run:
            repeats += 1
        if len(run) == size and repeats >= times:
            kept += words[i : i + size]
            i += repeats * size
        else:
            kept.append(words[i])
            i += 1
    return kept


def _bare(word: str) -> str:
    return word.lower().strip(".,;:!?\"'")


def _uniform(name: str, count: int) -> np.ndarray:
    """`count` numbers in [0, 1), float64, that are a hash of `name`."""
    drawn = np.frombuffer(hashlib.shake_256(name.encode()).digest(8 * count), "<u8")
    return (drawn >> np.uint64(11)) * 2.0**-53
