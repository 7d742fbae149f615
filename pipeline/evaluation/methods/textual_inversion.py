"""Textual Inversion (arXiv 2208.01618): of each subject a word is learned, and nothing else.

A word is one vector, which begins as the class's own, and is learned from the reference's whole
pictures under the paper's prompts. Requests of several subjects have several words in one prompt.

The paper's word stands in the class's place, "a <v1> on snow"; here it stands before the class, "a
<v1> cup on snow". Of pictures with several subjects the word alone does not learn which is meant:
of mini scenes the class was drawn in 5 of 12 pictures, and where it is said in 10 of 10.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.config import EvaluateConfig
from pipeline.evaluation.benches import Bench, Request, Selection
from pipeline.evaluation.methods.learned_words import reworded
from pipeline.evaluation.methods.method import Drawn
from pipeline.evaluation.methods.shared import denoising, in_batches
from pipeline.evaluation.methods.tuning import fit, frozen_base, generator_of, key_of, lessons
from pipeline.generation.sampler import denoise

TEMPLATES = (
    "a photo of a {}",
    "a rendering of a {}",
    "a cropped photo of the {}",
    "the photo of a {}",
    "a photo of a clean {}",
    "a photo of a dirty {}",
    "a dark photo of the {}",
    "a photo of my {}",
    "a photo of the cool {}",
    "a close-up photo of a {}",
    "a bright photo of the {}",
    "a cropped photo of a {}",
    "a photo of the {}",
    "a good photo of the {}",
    "a photo of one {}",
    "a close-up photo of the {}",
    "a rendition of the {}",
    "a photo of the clean {}",
    "a rendition of a {}",
    "a photo of a nice {}",
    "a good photo of a {}",
    "a photo of the nice {}",
    "a photo of the small {}",
    "a photo of the weird {}",
    "a photo of the large {}",
    "a photo of a cool {}",
    "a photo of a small {}",
)
"""Neutral prompts of the paper (its supplement, section C) and of diffusers' example."""


class TextualInversion:
    """Learns a word for each subject that is asked for."""

    native, learns = True, True
    title = "Textual Inversion"

    def __init__(self, name: str, cfg: EvaluateConfig) -> None:
        self.name, self.cfg = name, cfg
        self.settings: dict[str, Any] = {
            "method": "textual-inversion",
            "learning": asdict(cfg.tuning.textual_inversion),
            "masked": cfg.tuning.masked,
            "seed": cfg.seed,
            **denoising(cfg),
        }
        self._pipe: Any = None

    def check(self, bench: Bench) -> None:
        for request in bench.outlines():
            reworded(request, [f"<v1> {subject.name}" for subject in request.subjects])

    def open(self) -> None:
        self._pipe = self._pipe or frozen_base(self.cfg)

    def close(self) -> None:
        self._pipe = None

    def __call__(self, requests: Sequence[Request]) -> list[Drawn]:
        asked = {key_of(s): s for request in requests for s in request.selections}
        names = {key: selection.subject.name for key, selection in asked.items()}
        with new_words(self._pipe, list(names.values())) as words:
            called = {k: f"{word} {names[k]}" for k, word in zip(names, words, strict=True)}
            prompts = {
                request.key: reworded(
                    request.outline, [called[key_of(s)] for s in request.selections]
                )
                for request in requests
            }
            for (key, selection), vector in zip(asked.items(), words.values(), strict=True):
                self._learn(selection, called[key], vector)

            def draw(some: Sequence[Request]) -> list[Any]:
                said, seeds = [prompts[r.key] for r in some], [r.seed for r in some]
                return denoise(self._pipe, self.cfg, said, seeds)

            return [Drawn(p) for p in in_batches(requests, self.cfg.batch_size, draw)]

    def _learn(self, selection: Selection, call: str, vector: nn.Parameter) -> None:
        texts = [template.format(call) for template in TEMPLATES]
        masked, targets = self.cfg.tuning.masked, [selection.target]
        pictures = lessons(self._pipe, selection.reference, targets, texts, masked)
        generator = generator_of(self.cfg.seed, [key_of(selection)])
        fit(self._pipe, [vector], pictures, self.cfg.tuning.textual_inversion, generator)


@contextmanager
def new_words(pipe: Any, names: Sequence[str]) -> Iterator[dict[str, nn.Parameter]]:
    """Within the block the pipeline knows a new word for each name: <v1>, <v2>, ..., but for those
    that it knows already; its vector, (D,), begins as the mean of the tokens of the name's last
    word.

    Tokenizer and embeddings are exchanged, never changed, and so are exactly given back.
    """
    tokenizer, table = pipe.tokenizer, pipe.text_encoder.get_input_embeddings()
    known = tokenizer.get_vocab()
    free = (word for n in itertools.count(1) if (word := f"<v{n}>") not in known)
    words = list(itertools.islice(free, len(names)))
    wider = copy.deepcopy(tokenizer)
    wider.add_tokens(words)
    vectors = []
    for name in names:
        ids = tokenizer(name.split()[-1], add_special_tokens=False).input_ids
        vectors.append(nn.Parameter(table.weight[ids].mean(dim=0).detach().clone()))
    pipe.tokenizer = wider
    pipe.text_encoder.set_input_embeddings(_WiderTable(table, vectors))
    try:
        yield dict(zip(words, vectors, strict=True))
    finally:
        pipe.tokenizer = tokenizer
        pipe.text_encoder.set_input_embeddings(table)


class _WiderTable(nn.Module):
    """An embedding table, and after its last entry vectors of their own."""

    def __init__(self, table: nn.Embedding, vectors: Sequence[nn.Parameter]) -> None:
        super().__init__()
        self.table, self.vectors = table, nn.ParameterList(vectors)

    def forward(self, ids: Tensor) -> Tensor:
        first = self.table.num_embeddings
        found = self.table(ids.clamp(max=first - 1))
        for place, vector in enumerate(self.vectors):
            found = torch.where((ids == first + place)[..., None], vector, found)
        return found
