"""Queries as text embeddings: z_q of the paper, read as the base model's U-Net reads prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor

PROBE = "a photo of a cup"
PROBE_TOKENS = 5


class QueryEncoder:
    """The text encoders of one base model, with their tokenizers.

    One for Stable Diffusion 1 and 2, whose last hidden state the U-Net sees; two for XL, whose
    states before the last layer are put side by side. A tokenizer that is not its encoder's is
    refused.
    """

    def __init__(
        self, encoders: Sequence[Any], tokenizers: Sequence[Any], penultimate: bool = False
    ) -> None:
        if not encoders or len(encoders) != len(tokenizers):
            raise ValueError(
                f"a base model has as many tokenizers as text encoders, and at least one; here are "
                f"{len(tokenizers)} and {len(encoders)}."
            )
        for encoder, tokenizer in zip(encoders, tokenizers, strict=True):
            check_tokenizer(tokenizer, encoder.config)
        if len({tokenizer.model_max_length for tokenizer in tokenizers}) != 1:
            raise ValueError("the base model's tokenizers differ in length: one loaded wrongly.")
        self.encoders = [encoder.eval() for encoder in encoders]
        self.tokenizers = list(tokenizers)
        self.penultimate = penultimate

    @classmethod
    def from_pipeline(cls, pipe: Any) -> Self:
        """The text encoders of a loaded pipeline, shared with it."""
        names = ("", "_2")
        encoders = [getattr(pipe, f"text_encoder{n}", None) for n in names]
        tokenizers = [getattr(pipe, f"tokenizer{n}", None) for n in names]
        if not any(encoders):
            raise ValueError(f"{type(pipe).__name__} has no text encoder to read queries with.")
        return cls(
            [encoder for encoder in encoders if encoder is not None],
            [tokenizer for tokenizer in tokenizers if tokenizer is not None],
            penultimate=hasattr(pipe, "text_encoder_2"),
        )

    @property
    def width(self) -> int:
        """Width D of z_q: the encoders' widths together."""
        return sum(int(encoder.config.hidden_size) for encoder in self.encoders)

    @property
    def tokens(self) -> int:
        """Number of tokens N_q of z_q, padding included."""
        return int(self.tokenizers[0].model_max_length)

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> Self:
        """Move the encoders."""
        for encoder in self.encoders:
            encoder.to(device=device, dtype=dtype)
        return self

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """z_q, (B, N_q, D) in the encoders' dtype, padded and cut to their length; no gradient."""
        states = [
            self._states(encoder, tokenize(tokenizer, texts))
            for encoder, tokenizer in zip(self.encoders, self.tokenizers, strict=True)
        ]
        first = states[0]
        return torch.cat([state.to(first.device, first.dtype) for state in states], dim=-1)

    def words(self, text: str) -> tuple[Tensor, list[str]]:
        """Places of the text's own tokens in z_q, (W,) int64, and the tokens as text.

        Start, end and padding do not count; a text of none is a ValueError.
        """
        tokenizer = self.tokenizers[0]  # the others split in the same way; they pad otherwise
        ids = tokenize(tokenizer, [text])
        places = real_tokens(tokenizer, ids)[0].nonzero().flatten()
        if not len(places):
            raise ValueError(f"the query {text!r} holds no word that the tokenizer knows.")
        told = tokenizer.convert_ids_to_tokens(ids[0, places].tolist())
        return places, [token.removesuffix("</w>") for token in told]

    def _states(self, encoder: Any, ids: Tensor) -> Tensor:
        ids = ids.to(input_device(encoder))
        if self.penultimate:
            return encoder(ids, output_hidden_states=True).hidden_states[-2]
        return encoder(ids).last_hidden_state


def input_device(model: Any) -> torch.device:
    """Where a model's inputs go: its own device, or the one that offloading hooks run it on."""
    for module in model.modules():
        where = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if where is not None:
            return torch.device(where)
    return model.device


def tokenize(tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """Token ids (B, context length) int64, padded and cut to the text encoder's length.

    Words of several vectors (textual inversion) are spelled out, as pipelines do.
    """
    from diffusers.loaders import TextualInversionLoaderMixin

    spelled = TextualInversionLoaderMixin().maybe_convert_prompt(list(texts), tokenizer)
    return token_ids(tokenizer, spelled)


def token_ids(tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """As `tokenize`, without words of several vectors; needs no diffusers."""
    return tokenizer(
        list(texts),
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids


def real_tokens(tokenizer: Any, ids: Tensor) -> Tensor:
    """(B, context length) bool: true at words, false at start, end and padding."""
    special = torch.tensor(tokenizer.all_special_ids, device=ids.device)
    return ~torch.isin(ids, special)


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
    words = int(real_tokens(tokenizer, token_ids(tokenizer, [PROBE])).sum())
    if words != PROBE_TOKENS:
        raise ValueError(
            f"the tokenizer reads {PROBE!r} as {words} tokens instead of {PROBE_TOKENS} words: it "
            "loaded wrongly (without its merges, say)."
        )
