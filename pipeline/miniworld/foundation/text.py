"""The mini world's CLIP tokenizer: byte-level BPE, each of the world's words one token."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer

from pipeline.miniworld import world

CONTEXT = 24  # tokens; the longest caption of three subjects with attributes takes 24
BOS, EOS = "<|startoftext|>", "<|endoftext|>"
GLUE = ("a", "an", "and", "on", ",", "striped", "plain", "of", "photo", "picture", "the", "with")


def words() -> list[str]:
    """Every word of the world's captions, sorted."""
    return sorted({*GLUE, *world.CLASSES, *world.GROUNDS, *world.COLOURS})


def build_tokenizer() -> CLIPTokenizer:
    """Bytes, then merges that spell out each word; any other text falls back to its letters."""
    alphabet = sorted(ByteLevel.alphabet())
    tokens = alphabet + [f"{letter}</w>" for letter in alphabet]
    merges: list[tuple[str, str]] = []
    for word in words():
        # earlier words' merges come first in BPE's order, so start from what they leave
        pieces = _merged([*word[:-1], f"{word[-1]}</w>"], merges)
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces = ["".join(pieces[:2]), *pieces[2:]]
            tokens.append(pieces[0])
    vocab = {token: number for number, token in enumerate([*tokens, BOS, EOS])}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=CONTEXT)


def _merged(pieces: list[str], merges: list[tuple[str, str]]) -> list[str]:
    """BPE's own reading of a word: the earliest merge that applies, until none does."""
    rank = {pair: number for number, pair in enumerate(merges)}
    while len(pieces) > 1:
        pairs = list(pairwise(pieces))
        best = min(range(len(pairs)), key=lambda i: rank.get(pairs[i], len(rank)))
        if pairs[best] not in rank:
            break
        pieces = [*pieces[:best], "".join(pairs[best]), *pieces[best + 2 :]]
    return pieces


def encode(tokenizer: CLIPTokenizer, texts: Sequence[str]) -> torch.Tensor:
    """Token ids, int64 (n, 24), padded as Stable Diffusion pads."""
    batch = tokenizer(
        list(texts), padding="max_length", max_length=CONTEXT, truncation=True, return_tensors="pt"
    )
    return batch["input_ids"]
