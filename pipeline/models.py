"""Pretrained models by name: a hub id, a local folder of the same layout, or `miniworld:<name>`.

Weights are loaded from safetensors; every loader gives an fp32 module in eval mode, on the CPU,
unless told otherwise. `base` names a Stable Diffusion in diffusers' layout, `vision` a CLIP.
"""

from __future__ import annotations

import functools
import hashlib
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from pipeline.errors import UserError

if TYPE_CHECKING:
    import torch
    from diffusers import (
        AutoencoderKL,
        StableDiffusionControlNetPipeline,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import (
        CLIPTextConfig,
        CLIPTextModel,
        CLIPTokenizer,
        CLIPVisionConfig,
        CLIPVisionModel,
        CLIPVisionModelWithProjection,
    )

SHIPPED = "miniworld:"
"""Begins the names of the models that come with the package."""
_WEIGHTS = Path(__file__).parent / "miniworld" / "weights"
_CONFIGS = ("model_index.json", "config.json")
_TEXTS = ("*.json", "*.txt")
_WEIGHT_KINDS = ("*.safetensors", "*.bin")  # the first that there is, as loaders take it
_READ_WITH = {"text_encoder": ("tokenizer",), "unet": ("scheduler",)}


def resolve(name: str) -> str:
    """Folder or hub id to load from: `miniworld:sd` is a folder of the shipped weights.

    Raises UserError for an unknown shipped name, and for a folder without a config.
    """
    if name.startswith(SHIPPED):
        folder = _WEIGHTS / name.removeprefix(SHIPPED)
        if not any((folder / config).is_file() for config in _CONFIGS):
            there = sorted(item.name for item in _WEIGHTS.glob("*") if item.is_dir())
            known = (
                ", ".join(SHIPPED + item for item in there) or "none; run the foundation training"
            )
            raise UserError(f"{name}: no such mini model is shipped here; there are: {known}")
        return str(folder)
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not any((folder / config).is_file() for config in _CONFIGS):
            raise UserError(
                f"{name}: the folder has no {' or '.join(_CONFIGS)}; name a model's folder"
            )
        return str(folder)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UserError(f"{name}: no such folder, and not a hub id (owner/name) or {SHIPPED}name")
    return name


def device(name: str = "auto") -> torch.device:
    """Torch device for `auto` (the accelerator where there is one), `cpu`, `cuda`, `cuda:1`, ..."""
    import torch

    accelerator = (
        torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    )
    if name == "auto":
        return accelerator or torch.device("cpu")
    try:
        wanted = torch.device(name)
    except RuntimeError:
        raise UserError(f"device {name!r} is unknown; use auto, cpu or cuda") from None
    if wanted.type != "cpu" and (accelerator is None or accelerator.type != wanted.type):
        raise UserError(f"device {name!r} is not there; use auto or cpu")
    return wanted


def load_tokenizer(base: str, revision: str | None = None) -> CLIPTokenizer:
    """Tokenizer of the text encoder; checked against it.

    With no hub and no cache, transformers gives a two-entry vocabulary and no error.
    """
    from transformers import CLIPTextConfig, CLIPTokenizer

    where = _Source(base, revision)
    tokenizer = where.load(CLIPTokenizer, "tokenizer")
    config = where.load(CLIPTextConfig, "text_encoder")
    if len(tokenizer) != config.vocab_size:
        raise UserError(
            f"{base}: the tokenizer has {len(tokenizer)} entries, its text encoder "
            f"{config.vocab_size}; the tokenizer's files are missing or of another model"
        )
    if tokenizer.model_max_length != config.max_position_embeddings:
        raise UserError(
            f"{base}: the tokenizer's length is {tokenizer.model_max_length}, its text encoder's "
            f"{config.max_position_embeddings}; set model_max_length in tokenizer_config.json"
        )
    return tokenizer  # type: ignore[no-any-return]


def load_text_encoder(
    base: str, revision: str | None = None, dtype: torch.dtype | None = None
) -> CLIPTextModel:
    from transformers import CLIPTextModel

    model: CLIPTextModel = _Source(base, revision).model(CLIPTextModel, "text_encoder", dtype)
    return model


def load_vae(
    base: str, revision: str | None = None, dtype: torch.dtype | None = None
) -> AutoencoderKL:
    from diffusers import AutoencoderKL

    model: AutoencoderKL = _Source(base, revision).model(AutoencoderKL, "vae", dtype)
    return model


def load_unet(
    base: str, revision: str | None = None, dtype: torch.dtype | None = None
) -> UNet2DConditionModel:
    from diffusers import UNet2DConditionModel

    model: UNet2DConditionModel = _Source(base, revision).model(UNet2DConditionModel, "unet", dtype)
    return model


def load_scheduler(base: str, cls: Any = None, revision: str | None = None) -> Any:
    """The base model's noise schedule as a scheduler of class `cls` (default DDIMScheduler)."""
    from diffusers import DDIMScheduler

    return _Source(base, revision).load(cls or DDIMScheduler, "scheduler")


def load_vision(
    vision: str, revision: str | None = None, dtype: torch.dtype | None = None
) -> CLIPVisionModel:
    """Vision tower of a CLIP; its text tower, where the weights hold one, is left out."""
    from transformers import CLIPVisionModel

    model: CLIPVisionModel = _Source(vision, revision).model(CLIPVisionModel, "", dtype)
    return model


def load_image_embedder(
    vision: str, revision: str | None = None, dtype: torch.dtype | None = None
) -> CLIPVisionModelWithProjection:
    """Vision tower of a CLIP and its projection, which give the image embedding.

    Raises UserError where the weights hold no projection: it would be random.
    """
    from transformers import CLIPVisionModelWithProjection

    config = load_image_embedder_config(vision, revision)
    model, info = _Source(vision, revision).model(
        CLIPVisionModelWithProjection, "", dtype, config=config, output_loading_info=True
    )
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:3])
        raise UserError(
            f"{vision} has no image embedding: its weights lack {missing}; use a whole CLIP"
        )
    return model.eval()  # type: ignore[no-any-return]


def load_image_embedder_config(vision: str, revision: str | None = None) -> CLIPVisionConfig:
    """The vision tower's configuration, with the projection's width as the whole CLIP has it."""
    from transformers import AutoConfig

    # unless told not to, Auto classes ask at the terminal whether to run the code a model brings
    config = _Source(vision, revision).load(AutoConfig, "", trust_remote_code=False)
    if hasattr(config, "vision_config"):  # a whole CLIP; its tower may still have the default
        config.vision_config.projection_dim = config.projection_dim
        config = config.vision_config
    return config  # type: ignore[no-any-return]


def load_vision_config(vision: str, revision: str | None = None) -> CLIPVisionConfig:
    """The vision tower's configuration alone."""
    from transformers import CLIPVisionConfig

    config: CLIPVisionConfig = _Source(vision, revision).load(CLIPVisionConfig, "")
    return config


def load_text_config(base: str, revision: str | None = None) -> CLIPTextConfig:
    """The text encoder's configuration alone."""
    from transformers import CLIPTextConfig

    config: CLIPTextConfig = _Source(base, revision).load(CLIPTextConfig, "text_encoder")
    return config


def load_unet_config(base: str, revision: str | None = None) -> dict[str, Any]:
    """The U-Net's configuration alone."""
    from diffusers import UNet2DConditionModel

    return dict(_Source(base, revision).load(UNet2DConditionModel, "unet", "load_config"))


def side(base: str, revision: str | None = None) -> int:
    """Side of the pictures that the base model draws, pixels; read off its configs."""
    from diffusers import AutoencoderKL

    vae = _Source(base, revision).load(AutoencoderKL, "vae", "load_config")
    shrinks = 2 ** (len(vae["block_out_channels"]) - 1)
    return int(load_unet_config(base, revision)["sample_size"] * shrinks)


def vae_scaling_factor(base: str, revision: str | None = None) -> float:
    """What the VAE's samples are multiplied by to be the U-Net's latents; read off its config."""
    from diffusers import AutoencoderKL

    config = _Source(base, revision).load(AutoencoderKL, "vae", "load_config")
    return float(config["scaling_factor"])


def load_image_processor(vision: str, revision: str | None = None) -> Any:
    """The CLIP's image processor, always in its PIL form: backends differ in pixels."""
    from transformers import CLIPImageProcessorPil

    return _Source(vision, revision).load(CLIPImageProcessorPil, "")


def load_pipeline(
    base: str, revision: str | None = None, dtype: torch.dtype | None = None
) -> StableDiffusionPipeline:
    """The whole Stable Diffusion pipeline with a DDIM scheduler, without a safety checker."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    load_tokenizer(base, revision)  # refuse a broken one before the large files are read
    pipe = _Source(base, revision).load(
        StableDiffusionPipeline,
        "",
        safety_checker=None,
        feature_extractor=None,
        image_encoder=None,
        requires_safety_checker=False,
        **_dtype(StableDiffusionPipeline, dtype),
    )
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe  # type: ignore[no-any-return]


def with_controlnet(
    pipe: StableDiffusionPipeline,
    controlnet: str,
    dtype: torch.dtype | None = None,
) -> StableDiffusionControlNetPipeline:
    """A ControlNet pipeline on the parts of `pipe`; `controlnet` is a hub id or a folder."""
    from diffusers import ControlNetModel, StableDiffusionControlNetPipeline

    net = _Source(controlnet, None).model(ControlNetModel, "", dtype)
    controlled = StableDiffusionControlNetPipeline(
        **pipe.components, controlnet=net, requires_safety_checker=False
    )
    controlled.set_progress_bar_config(disable=True)
    return controlled


def identity(name: str, subfolder: str = "", revision: str | None = None) -> dict[str, str]:
    """What a part of a model is, for fingerprints and manifests: the model's name, and the sha256
    of its weights, its configs, and what is read with it (a text encoder's tokenizer).
    """
    parts = (subfolder, *_READ_WITH.get(subfolder, ()))
    for kind in _WEIGHT_KINDS:
        folder = _local(resolve(name), subfolder, kind, parts, revision)
        if weights := sorted(_whole(folder / subfolder, kind)):
            break
    else:
        raise UserError(f"{folder / subfolder} holds no weights ({', '.join(_WEIGHT_KINDS)})")
    texts = {file for part in parts for kind in _TEXTS for file in (folder / part).glob(kind)}
    digest = hashlib.sha256()
    for file in [*weights, *sorted(texts)]:
        stat = file.stat()
        digest.update(str(file.relative_to(folder)).encode())
        digest.update(_sha256(str(file.resolve()), stat.st_size, stat.st_mtime_ns).encode())
    return {"name": name, "sha256": digest.hexdigest()}


def file_sha256(path: str) -> str:
    """sha256 of a local file. Raises UserError where there is none."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"{path}: no such file; check the path")
    stat = file.stat()
    return _sha256(str(file.resolve()), stat.st_size, stat.st_mtime_ns)


def _whole(folder: Path, kind: str) -> list[Path]:
    """Weights as they are loaded, without the variants beside them (model.fp16.safetensors)."""
    return [file for file in folder.glob(kind) if "." not in file.stem]


class _Source:
    """Where a model's parts are loaded from, with failures in one line."""

    def __init__(self, name: str, revision: str | None) -> None:
        self.name, self.path = name, resolve(name)
        self.revision = None if Path(self.path).is_dir() else revision

    def load(
        self, cls: Any, subfolder: str, method: str = "from_pretrained", **options: Any
    ) -> Any:
        try:
            if self.revision is not None:
                options["revision"] = self.revision
            if subfolder:
                options["subfolder"] = subfolder
            return getattr(cls, method)(self.path, **options)
        except (OSError, ValueError, KeyError, SafetensorError, pickle.UnpicklingError) as error:
            line = " ".join(str(error).split())[:240]
            part = f"{self.name}/{subfolder}" if subfolder else self.name
            raise UserError(f"cannot load {cls.__name__} from {part}: {line}") from error

    def model(self, cls: Any, subfolder: str, dtype: torch.dtype | None, **options: Any) -> Any:
        safe: dict[str, Any] = {"use_safetensors": True} if self._has_safetensors(subfolder) else {}
        loaded = self.load(cls, subfolder, **safe, **_dtype(cls, dtype), **options)
        return loaded if options else loaded.eval()

    def _has_safetensors(self, subfolder: str) -> bool:
        folder = Path(self.path)
        return folder.is_dir() and any((folder / subfolder).glob("*.safetensors"))


def _dtype(cls: Any, dtype: torch.dtype | None) -> dict[str, Any]:
    import torch

    # diffusers still calls it torch_dtype
    name = "torch_dtype" if cls.__module__.startswith("diffusers") else "dtype"
    return {name: dtype or torch.float32}


def _local(
    resolved: str, subfolder: str, kind: str, parts: Sequence[str], revision: str | None
) -> Path:
    """A model's folder; of a hub id a snapshot of its weights of one kind, and all parts' texts."""
    if Path(resolved).is_dir():
        return Path(resolved)
    from huggingface_hub import snapshot_download

    def within(part: str, pattern: str) -> str:
        return f"{part}/{pattern}" if part else pattern

    wanted = [within(subfolder, kind), *(within(p, text) for p in parts for text in _TEXTS)]
    try:
        return Path(
            snapshot_download(
                resolved,
                revision=revision,
                allow_patterns=wanted,
                ignore_patterns=[within(subfolder, f"*.{kind}")],
            )
        )
    except (OSError, ValueError) as error:
        line = " ".join(str(error).split())[:240]
        raise UserError(f"cannot fetch {resolved}: {line}") from error


@functools.lru_cache(maxsize=256)
def _sha256(path: str, size: int, modified: int) -> str:
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
