"""Queries as text embeddings: the z_q of the paper."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

PROBE = "a photo of a cup"


def tokenize(tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """Token ids (B, context length) int64, padded and cut to the text encoder's length."""
    return tokenizer(
        list(texts),
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids


def encode_text(text_encoder: Any, token_ids: Tensor) -> Tensor:
    """Last hidden state (B, context length, text width) as the U-Net sees it; no gradient."""
    with torch.no_grad():
        return text_encoder(token_ids.to(text_encoder.device)).last_hidden_state


def real_tokens(tokenizer: Any, token_ids: Tensor) -> Tensor:
    """(B, context length) bool: true at words, false at start, end and padding."""
    special = torch.tensor(tokenizer.all_special_ids, device=token_ids.device)
    return ~torch.isin(token_ids, special)


def check_tokenizer(tokenizer: Any, text_config: Any) -> None:
    """Refuse a tokenizer that is not the text encoder's.

    With no hub and no cache, transformers gives a tokenizer of two entries and no error.
    """
    entries, length = len(tokenizer), tokenizer.model_max_length
    if entries != text_config.vocab_size:
        raise ValueError(
            f"the tokenizer has {entries} entries and its text encoder {text_config.vocab_size}: "
            "it loaded wrongly, or belongs to another model."
        )
    if length != text_config.max_position_embeddings:
        raise ValueError(
            f"the tokenizer's model_max_length is {length} and its text encoder's length "
            f"{text_config.max_position_embeddings}: it loaded wrongly."
        )
    words = real_tokens(tokenizer, tokenize(tokenizer, [PROBE])).sum()
    if not int(words):
        raise ValueError(f"the tokenizer finds no word in {PROBE!r}: it loaded wrongly.")
