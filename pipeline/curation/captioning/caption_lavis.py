"""The `lavis` captioner: BLIP-2 by salesforce-lavis, in workers of its own environment.

The class is built in the driver too, for its settings; LAVIS itself is imported by `open()` alone.
"""

from __future__ import annotations

import functools
import hashlib
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from pipeline import models
from pipeline.config import CaptionConfig, ModelsConfig
from pipeline.curation.captioning.decoding import SeededSampling, decoding, grouped, texts
from pipeline.curation.captioning.lavis_environment import LAVIS, check_worker, model_class
from pipeline.errors import UserError

_LANGUAGE = "opt_model."


class LavisCaptioner:
    """BLIP-2 with an OPT language model, by LAVIS's own loading, preprocessing and `generate`."""

    def __init__(self, cfg: CaptionConfig, names: ModelsConfig, device: str) -> None:
        self.cfg, self.device = cfg, device

    @property
    def model(self) -> str:
        return f"{self.cfg.lavis_model}/{self.cfg.lavis_type}"

    @functools.cached_property
    def settings(self) -> dict[str, Any]:
        """Weights that LAVIS fetches itself are known by their names and its version."""
        cfg = self.cfg
        return {
            "backend": "lavis",
            "lavis": LAVIS,
            "model": cfg.lavis_model,
            "type": cfg.lavis_type,
            "checkpoint": _file_sha256(_checkpoint(cfg)) if cfg.lavis_checkpoint else None,
            "opt": models.identity(_opt_folder(cfg)) if cfg.lavis_opt else None,
            **decoding(cfg),
        }

    def open(self) -> None:
        check_worker()
        self._loaded  # noqa: B018 (loads)

    def __call__(self, images: Sequence[Image.Image], keys: Sequence[str]) -> list[list[str]]:
        model, processor, language = self._loaded
        cfg = self.cfg
        pixels = torch.stack([processor(image) for image in images]).to(model.device)
        sampling = None
        if cfg.temperature > 0:
            sampling = SeededSampling(cfg, keys, model.eos_token_id)
        language.sampling = sampling
        with torch.inference_mode():
            model.generate(
                {"image": pixels, **({"prompt": cfg.prompt} if cfg.prompt else {})},
                use_nucleus_sampling=sampling is not None,
                num_beams=cfg.num_beams,
                max_length=cfg.max_new_tokens + 1,  # one to see whether the last word is whole
                min_length=0,  # counts the prompt; min_new_tokens does not
                top_p=cfg.top_p,
                repetition_penalty=cfg.repetition_penalty,
                length_penalty=cfg.length_penalty,
                num_captions=cfg.captions_per_image,
                temperature=cfg.temperature or 1.0,
            )
        ids, end = language.new_tokens, model.eos_token_id
        made = texts(model.opt_tokenizer, ids, cfg.max_new_tokens, end)
        return grouped(made, cfg.captions_per_image, sampling)

    @functools.cached_property
    def _loaded(self) -> tuple[Any, Any, _Language]:
        cfg, device = self.cfg, models.device(self.device)
        cls = model_class(cfg.lavis_model, cfg.lavis_type)
        from lavis.models import load_preprocess
        from omegaconf import OmegaConf

        config = OmegaConf.load(cls.default_config_path(cfg.lavis_type))
        if cfg.lavis_opt:
            config.model.opt_model = _opt_folder(cfg)
        loader = _with_own_weights(cls) if cfg.lavis_checkpoint else cls
        try:
            model = loader.from_config(config.model)
        except (OSError, ValueError, RuntimeError) as error:
            line = " ".join(str(error).split())[:240]
            raise UserError(f"captioner {self.model} does not load: {line}") from error
        if not hasattr(model, "opt_model"):
            raise UserError(f"caption.lavis_model: {cfg.lavis_model} has no OPT; use blip2_opt")
        if cfg.lavis_checkpoint:
            _load(model, _checkpoint(cfg))
        if device.type == "cpu":
            model = model.float()  # OPT is loaded in float16, which the CPU hardly computes in
        model = model.to(device).eval()
        processors, _ = load_preprocess(config.preprocess)
        return model, processors["eval"], _Language(model.opt_model, cfg)


class _Language:
    """LAVIS's OPT, told what LAVIS's `generate` has no parameter for; keeps the tokens it made."""

    def __init__(self, opt: Any, cfg: CaptionConfig) -> None:
        self.cfg = cfg
        self.sampling: SeededSampling | None = None
        self.new_tokens = torch.empty(0)
        self._generate = opt.generate
        opt.generate = self

    def __call__(self, input_ids: torch.Tensor, **options: Any) -> torch.Tensor:
        options["min_new_tokens"] = self.cfg.min_new_tokens
        options["no_repeat_ngram_size"] = self.cfg.no_repeat_ngram_size
        if self.sampling is not None:
            options["logits_processor"] = [self.sampling]
        ids: torch.Tensor = self._generate(input_ids=input_ids, **options)
        self.new_tokens = ids[:, input_ids.shape[1] :]
        return ids


def _with_own_weights(cls: Any) -> Any:
    """The class, except that it fetches no checkpoint: ours is loaded after it."""
    return type(cls.__name__, (cls,), {"load_checkpoint_from_config": lambda *_, **__: None})


def _load(model: Any, file: Path) -> None:
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        problems = model.load_state_dict(state.get("model", state), strict=False)
    except (OSError, RuntimeError, AttributeError, pickle.UnpicklingError) as error:
        line = " ".join(str(error).split())[:240]
        raise UserError(f"caption.lavis_checkpoint: {file} does not load: {line}") from error
    missing = [name for name in problems.missing_keys if not name.startswith(_LANGUAGE)]
    if missing or problems.unexpected_keys:
        names = ", ".join([*missing, *problems.unexpected_keys][:3])
        raise UserError(
            f"caption.lavis_checkpoint: {file} is of another model: {len(missing)} tensors "
            f"missing, {len(problems.unexpected_keys)} too many ({names}); see caption.lavis_type"
        )


def _checkpoint(cfg: CaptionConfig) -> Path:
    file = Path(str(cfg.lavis_checkpoint)).expanduser()
    if not file.is_file():
        raise UserError(f"caption.lavis_checkpoint: {file} is not there; name a .pth file")
    return file


def _opt_folder(cfg: CaptionConfig) -> str:
    folder = Path(str(cfg.lavis_opt)).expanduser()
    if not folder.is_dir():
        raise UserError(f"caption.lavis_opt: {folder} is not there; name a folder of an OPT")
    return models.resolve(str(folder))


def _file_sha256(file: Path) -> str:
    stat = file.stat()
    return _sha256(str(file.resolve()), stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=16)
def _sha256(path: str, size: int, modified: int) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
