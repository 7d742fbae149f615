"""The SSR-Encoder as a method: told which subject by a text query, by a mask, or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline import models
from pipeline.config import EvaluateConfig
from pipeline.errors import UserError
from pipeline.evaluation.benches import Bench, Request, Selection
from pipeline.evaluation.methods.method import Drawn, Part
from pipeline.evaluation.methods.shared import denoising, in_batches, refuse_changed
from pipeline.generation.recipe import Reference
from pipeline.generation.sampler import Sampler, model_folder, model_identity
from pipeline.storage import Storage
from ssr_model.images import seen_box
from ssr_model.text import real_tokens, token_ids

By = Literal["text", "mask", "nothing"]
TITLES: dict[By, str] = {
    "text": "SSR, text query",
    "mask": "SSR, mask query",
    "nothing": "Whole image, no selection",
}

_NO_MASK = "without a mask ({}); add the masks"
_NO_WORD = "whose name holds no word that the base model's tokenizer knows ({}); rename it"


class SelectBy:
    """A trained SSR-Encoder.

    Args:
        name: in results.
        cfg: models, sampling, device.
        by: what says which subject is meant. `text`: its name. `mask`: its mask, and the null text.
            `nothing`: the null text over the whole image, for encoders that were trained so: the
            rival that shows what selecting is worth.
        model: the trained encoder, folder or hub id; None = the run's own.
        title: in tables; None = by what selects.
    """

    native, learns = True, False

    def __init__(
        self,
        name: str,
        cfg: EvaluateConfig,
        by: By,
        model: str | None = None,
        title: str | None = None,
    ) -> None:
        self.name, self.by, self.cfg = name, by, cfg
        self.title = title or TITLES[by]
        self._model = model or cfg.model
        self._sampler: Sampler | None = None
        with model_folder(Storage(cfg.root), self._model) as folder:
            identity = model_identity(folder)
        self.settings: dict[str, Any] = {
            "method": f"ssr-{by}",
            "model": identity,
            "scale": cfg.scale,
            "vision": models.identity(cfg.models.vision, "", cfg.models.revision),
            **denoising(cfg),
        }

    def check(self, bench: Bench) -> None:
        if self.by == "mask":
            self._refuse([r.key for r in bench.outlines() if not r.masked], bench, _NO_MASK)
            self._check_masks(bench)
        if self.by == "text":
            self._refuse(self._unread(bench), bench, _NO_WORD)

    def _check_masks(self, bench: Bench) -> None:
        names = self.cfg.models
        processor = models.load_image_processor(names.vision, names.revision)
        for which, mask in bench.masks():
            left, top, right, bottom = seen_box(processor, (mask.shape[1], mask.shape[0]))
            if not mask[top:bottom, left:right].any():
                raise UserError(
                    f"{self.name}: the mask of {which} lies outside the picture's centre square, "
                    f"which is all that CLIP sees; crop the picture, or leave {self.name} out of "
                    "methods"
                )

    def _unread(self, bench: Bench) -> list[str]:
        """Keys of requests with a query of which the tokenizer knows nothing."""
        requests = bench.outlines()
        queries = list({subject.query: None for r in requests for subject in r.subjects})
        tokenizer = models.load_tokenizer(self.cfg.models.base, self.cfg.models.revision)
        known = real_tokens(tokenizer, token_ids(tokenizer, queries)).any(dim=1).tolist()
        unread = {query for query, some in zip(queries, known, strict=True) if not some}
        return [r.key for r in requests if any(s.query in unread for s in r.subjects)]

    def _refuse(self, keys: Sequence[str], bench: Bench, reason: str) -> None:
        if keys:
            some = ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")
            raise UserError(
                f"{self.name}: {len(keys)} of the bench's {len(bench)} requests ask for a subject "
                f"{reason.format(some)}, or leave {self.name} out of methods"
            )

    def open(self) -> None:
        if self._sampler is None:
            with model_folder(Storage(self.cfg.root), self._model) as folder:
                sampler = Sampler.load(folder, self.cfg, self.cfg)
                # after it was read, so that nothing can be exchanged in between
                now = {"model": model_identity(folder)}
                refuse_changed(self.name, self._model or "the run's model", self.settings, now)
            self._sampler = sampler

    def close(self) -> None:
        self._sampler = None

    def __call__(self, requests: Sequence[Request]) -> list[Drawn]:
        assert self._sampler is not None
        pictures = in_batches(requests, self.cfg.batch_size, self._draw)
        if self.by != "text":
            return [Drawn(picture) for picture in pictures]
        return [
            Drawn(picture, *_look(self._sampler, request))
            for picture, request in zip(pictures, requests, strict=True)
        ]

    def _draw(self, requests: Sequence[Request]) -> list[Image.Image]:
        """The requests in one batch; all select the same number of subjects."""
        assert self._sampler is not None
        subjects = [
            [reference(s, self.by, self.cfg.scale).subject() for s in request.selections]
            for request in requests
        ]
        return self._sampler.draw(
            [r.prompt for r in requests], [r.seed for r in requests], subjects
        )


def reference(selection: Selection, by: By, scale: float) -> Reference:
    """A selection as the encoder is asked for it."""
    image, chosen = selection.reference.image, selection.subject
    name = f"{selection.reference.key}, {chosen.name}"
    if by == "text":
        return Reference(image, query=chosen.query, name=name, scale=scale)
    mask = chosen.mask if by == "mask" else np.ones((image.height, image.width), bool)
    assert mask is not None  # `check` has refused it
    drawn = Image.fromarray(mask.astype(np.uint8) * 255)
    return Reference(image, mask=drawn, name=name, scale=scale)


def _look(sampler: Sampler, request: Request) -> tuple[NDArray[np.float32], Part]:
    """Where the first query looks in its reference, and what of that the map covers."""
    image = request.reference.image
    (attention,) = sampler.attention(image, [request.selections[0].subject.query])
    left, top, right, bottom = sampler.seen_box(image)
    width, height = image.size
    return attention, (left / width, top / height, right / width, bottom / height)
