"""Images -> captions: BLIP-2 describes every image anew; the subjects it names stand beside it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO, Protocol

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from pipeline import models
from pipeline.config import CaptionConfig, ModelsConfig
from pipeline.curation.images import ahead, read_images
from pipeline.curation.phrases import RULES, noun_phrases
from pipeline.curation.wording import Wording
from pipeline.errors import UserError
from pipeline.storage import Storage
from pipeline.units import Tally

SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("caption", pa.string()),
        ("subjects", pa.list_(pa.string())),
        ("backend", pa.string()),
        ("model", pa.string()),
        ("prompt", pa.string()),
    ]
)


class Captioner(Protocol):
    """Describes images. Cheap to build: weights are loaded by `open()`, in the worker."""

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that shapes a caption, as JSON: the weights' hash, prompt, decoding."""
        ...

    def open(self) -> None:
        """Load the weights."""
        ...

    def __call__(self, images: Sequence[Image.Image]) -> list[str]:
        """One caption per image; an empty string where the model had nothing to say."""
        ...


class TransformersCaptioner:
    """BLIP-2 by transformers' Blip2ForConditionalGeneration: greedy or beam search, batched."""

    def __init__(self, cfg: CaptionConfig, names: ModelsConfig, device: str) -> None:
        self.cfg, self.names, self.device = cfg, names, device

    @functools.cached_property
    def settings(self) -> dict[str, Any]:
        return {
            "backend": "transformers",
            "model": models.identity(self.names.captioner, "", revision=self.names.revision),
            "phrases": RULES,
            "prompt": self.cfg.prompt,
            "max_new_tokens": self.cfg.max_new_tokens,
            "num_beams": self.cfg.num_beams,
        }

    def open(self) -> None:
        self._loaded  # noqa: B018 (loads)

    def __call__(self, images: Sequence[Image.Image]) -> list[str]:
        model, processor, tokenizer = self._loaded
        pixels = processor(images=list(images), return_tensors="pt")["pixel_values"]
        prompt = self._prompt_ids.expand(len(images), -1)
        with torch.inference_mode():
            ids = model.generate(
                pixels.to(model.device, model.dtype),
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=self.cfg.max_new_tokens,
                num_beams=self.cfg.num_beams,
                do_sample=False,
            )
        if not model.config.text_config.is_encoder_decoder:
            ids = ids[:, prompt.shape[1] :]  # a decoder repeats what it was given
        texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [" ".join(text.split()) for text in texts]

    @functools.cached_property
    def _loaded(self) -> tuple[Any, Any, Any]:
        from transformers import (
            AutoTokenizer,
            Blip2ForConditionalGeneration,
            BlipImageProcessorPil,
        )

        name, device = models.resolve(self.names.captioner), models.device(self.device)
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        revision = {"revision": self.names.revision} if self.names.revision else {}
        try:
            model = Blip2ForConditionalGeneration.from_pretrained(name, dtype=dtype, **revision)
            processor = BlipImageProcessorPil.from_pretrained(name, **revision)
            tokenizer = AutoTokenizer.from_pretrained(name, **revision)
        except (OSError, ValueError) as error:
            line = str(error).strip().splitlines()[0]
            raise UserError(f"captioner {self.names.captioner} does not load: {line}") from error
        return model.to(device).eval(), processor, tokenizer

    @functools.cached_property
    def _prompt_ids(self) -> torch.Tensor:
        """(1, query tokens + prompt) int64: image tokens, then the prompt or the start token."""
        model, _, tokenizer = self._loaded
        config = model.config
        if config.image_token_index is None:
            raise UserError(
                f"captioner {self.names.captioner} names no image token in its config "
                "(image_token_index); use a newer revision of the model"
            )
        text = list(tokenizer(self.cfg.prompt)["input_ids"]) if self.cfg.prompt else []
        start = config.text_config.bos_token_id
        if not config.text_config.is_encoder_decoder and text[:1] != [start]:
            text = [start, *text]
        elif not text:
            text = [start]
        ids = [config.image_token_index] * config.num_query_tokens + text
        return torch.tensor([ids], device=model.device)


BACKENDS: dict[str, Callable[[CaptionConfig, ModelsConfig, str], Captioner]] = {
    "transformers": TransformersCaptioner,
}


class CaptionStage:
    """images/<unit>.parquet -> captions/<unit>.parquet.

    Images that do not decode fail (`undecodable`); those without a caption are dropped
    (`empty_caption`). A caption in which no subject is found is its own subject, so that
    `subjects` is never empty.
    """

    name = "captions"
    source = "images"

    def __init__(self, cfg: CaptionConfig, names: ModelsConfig, device: str = "auto") -> None:
        self.cfg, self.names = cfg, names
        self.captioner = BACKENDS[cfg.backend](cfg, names, device)

    @functools.cached_property
    def settings(self) -> dict[str, Any]:
        """All of the captioner's; the batch size is not among them, since it changes no caption."""
        return self.captioner.settings

    def open(self) -> None:
        self.captioner.open()

    def __call__(self, unit: str, storage: Storage, sink: BinaryIO) -> Tally:
        path = f"{self.source}/{unit}.parquet"
        size = self.cfg.batch_size
        tally, wording = Tally(rows_in=0, kept=0), Wording()
        fixed = {
            "backend": self.cfg.backend,
            "model": self.names.captioner,
            "prompt": self.cfg.prompt,
        }
        with pq.ParquetWriter(sink, SCHEMA, compression="zstd") as writer:
            for batch in ahead(lambda: read_images(storage, path, ["key"], size)):
                captions = self.captioner(batch.images) if batch.images else []
                rows = [
                    {
                        "key": row["key"],
                        "caption": caption,
                        "subjects": noun_phrases(caption) or [caption],
                        **fixed,
                    }
                    for row, caption in zip(batch.rows, captions, strict=True)
                    if caption
                ]
                writer.write_table(pa.Table.from_pylist(rows, schema=SCHEMA))
                for row in rows:
                    wording.add(row["caption"], row["subjects"])
                tally.rows_in += len(batch.rows) + batch.undecodable
                tally.kept += len(rows)
                _count(tally.failed, "undecodable", batch.undecodable)
                _count(tally.dropped, "empty_caption", len(batch.rows) - len(rows))
        tally.extra |= wording.extra()
        return tally


def _count(reasons: dict[str, int], reason: str, rows: int) -> None:
    if rows:
        reasons[reason] = reasons.get(reason, 0) + rows
