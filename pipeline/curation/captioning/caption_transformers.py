"""The `transformers` captioner: Blip2ForConditionalGeneration, in the main environment."""

from __future__ import annotations

import functools
import pickle
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from pipeline import models
from pipeline.config import CaptionConfig, ModelsConfig
from pipeline.curation.captioning.decoding import SeededSampling, decoding, grouped, texts
from pipeline.errors import UserError


class TransformersCaptioner:
    """BLIP-2 by transformers: greedy, beam search or sampling, batched."""

    def __init__(self, cfg: CaptionConfig, names: ModelsConfig, device: str) -> None:
        self.cfg, self.names, self.device = cfg, names, device

    @property
    def model(self) -> str:
        return self.names.captioner

    @functools.cached_property
    def settings(self) -> dict[str, Any]:
        return {
            "backend": "transformers",
            "model": models.identity(self.names.captioner, "", revision=self.names.revision),
            **decoding(self.cfg),
        }

    def open(self) -> None:
        self._loaded  # noqa: B018 (loads)

    def __call__(self, images: Sequence[Image.Image], keys: Sequence[str]) -> list[list[str]]:
        model, processor, tokenizer = self._loaded
        cfg = self.cfg
        pixels = processor(images=list(images), return_tensors="pt")["pixel_values"]
        prompt = self._prompt_ids.expand(len(images), -1)
        end = model.language_model.generation_config.eos_token_id  # it is what generates
        sampling = SeededSampling(cfg, keys, end) if cfg.temperature > 0 else None
        # The sampling does what temperature, top_p and top_k would; those are at their neutral.
        drawn = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "logits_processor": [sampling]}
        with torch.inference_mode():
            ids = model.generate(
                pixels.to(model.device, model.vision_model.dtype),
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=cfg.max_new_tokens + 1,  # one to see whether the last word is whole
                min_new_tokens=cfg.min_new_tokens,
                num_beams=cfg.num_beams,
                num_return_sequences=cfg.captions_per_image,
                length_penalty=cfg.length_penalty,
                repetition_penalty=cfg.repetition_penalty,
                no_repeat_ngram_size=cfg.no_repeat_ngram_size,
                do_sample=sampling is not None,
                **(drawn if sampling else {}),
            )
        if not model.config.text_config.is_encoder_decoder:
            ids = ids[:, prompt.shape[1] :]  # a decoder repeats what it was given
        made = texts(tokenizer, ids, cfg.max_new_tokens, end)
        return grouped(made, cfg.captions_per_image, sampling)

    @functools.cached_property
    def _loaded(self) -> tuple[Any, Any, Any]:
        from transformers import (
            AutoTokenizer,
            Blip2ForConditionalGeneration,
            BlipImageProcessorPil,
        )

        name, device = models.resolve(self.names.captioner), models.device(self.device)
        revision = {"revision": self.names.revision} if self.names.revision else {}
        dtype = self._dtype(device)
        try:
            model = Blip2ForConditionalGeneration.from_pretrained(name, dtype=dtype, **revision)
            processor = BlipImageProcessorPil.from_pretrained(name, **revision)
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, **revision)
        except (OSError, ValueError, pickle.UnpicklingError) as error:
            line = str(error).strip().splitlines()[0]
            raise UserError(f"captioner {self.names.captioner} does not load: {line}") from error
        return model.to(device).eval(), processor, tokenizer

    def _dtype(self, device: torch.device) -> torch.dtype:
        if self.cfg.dtype == "auto":
            return torch.float32 if device.type == "cpu" else torch.bfloat16
        return getattr(torch, self.cfg.dtype)  # type: ignore[no-any-return]

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
