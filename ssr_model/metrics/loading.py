"""Loading what metrics look with, from a folder or the hub; what is no such model is refused."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ssr_model.frozen import loading
from ssr_model.metrics.backbones import ClipBackbone, DinoBackbone
from ssr_model.metrics.segmenting import ClipSegSegmenter
from ssr_model.weights import fetch

_FILES = ("*.json", "*.txt")
_SAFE, _PICKLED = "model*.safetensors", "pytorch_model*.bin"


def load_clip(source: str, revision: str | None = None, name: str | None = None) -> ClipBackbone:
    """A CLIP (float32, CPU) from a folder or the hub, such as openai/clip-vit-base-patch32.

    name: what results call it; None = source. What is not a whole CLIP is a ValueError.
    """
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    folder, weights = _files(source, revision)
    _check_type(source, folder, {"clip": CLIPModel}, "a CLIP of both towers")
    model = _load(source, CLIPModel, folder, weights, "a CLIP of both towers")
    with loading("a CLIP's image processor", source):
        processor = CLIPImageProcessorPil.from_pretrained(folder)
    with loading("a CLIP's tokenizer", source):
        tokenizer = CLIPTokenizer.from_pretrained(folder)
    try:
        return ClipBackbone(model, processor, tokenizer, name or source, _sha256(weights))
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def load_dino(source: str, revision: str | None = None, name: str | None = None) -> DinoBackbone:
    """A DINO (facebook/dino-vits16, dino-vits8) or DINOv2 (facebook/dinov2-small), with registers
    or without, float32 on the CPU, from a folder or the hub.

    name: what results call it; None = source. What is no such model is a ValueError. A ViT that was
    trained otherwise has the same form: nothing but its name and hash tells it from a DINO.
    """
    import transformers
    from transformers import BitImageProcessorPil, ViTImageProcessorPil

    folder, weights = _files(source, revision)
    known = {
        "vit": transformers.ViTModel,
        "dinov2": transformers.Dinov2Model,
        "dinov2_with_registers": transformers.Dinov2WithRegistersModel,
    }
    found = _check_type(source, folder, known, "a DINO or DINOv2")
    # the pooling layer of a ViT is no part of DINO, and its weights would be random
    options = {"add_pooling_layer": False} if found == "vit" else {}
    model = _load(source, known[found], folder, weights, "a DINO or DINOv2", **options)
    kind = ViTImageProcessorPil if found == "vit" else BitImageProcessorPil
    with loading("a DINO's image processor", source):
        processor = kind.from_pretrained(folder)
    try:
        return DinoBackbone(model, processor, name or source, _sha256(weights))
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def load_clipseg(
    source: str, revision: str | None = None, name: str | None = None
) -> ClipSegSegmenter:
    """A CLIPSeg (float32, CPU) from a folder or the hub, such as CIDAS/clipseg-rd64-refined.

    name: what results call it; None = source. What is no such model is a ValueError.
    """
    from transformers import CLIPSegForImageSegmentation, CLIPTokenizer, ViTImageProcessorPil

    folder, weights = _files(source, revision)
    _check_type(source, folder, {"clipseg": CLIPSegForImageSegmentation}, "a CLIPSeg")
    model = _load(source, CLIPSegForImageSegmentation, folder, weights, "a CLIPSeg")
    with loading("a CLIPSeg's image processor", source):
        processor = ViTImageProcessorPil.from_pretrained(folder)
    with loading("a CLIPSeg's tokenizer", source):
        tokenizer = CLIPTokenizer.from_pretrained(folder)
    try:
        return ClipSegSegmenter(model, processor, tokenizer, name or source, _sha256(weights))
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def _files(source: str, revision: str | None) -> tuple[Path, list[Path]]:
    """The model's local folder, and its files of weights: safetensors where there are any."""
    for kind in (_SAFE, _PICKLED):
        folder = fetch(source, revision, (*_FILES, kind))
        # without the variants beside them (model.fp16.safetensors)
        weights = sorted(file for file in folder.glob(kind) if "." not in file.stem)
        if weights:
            return folder, weights
    raise ValueError(f"{source} holds no weights ({_SAFE}, or {_PICKLED}): name a model's folder.")


def _check_type(source: str, folder: Path, known: dict[str, Any], what: str) -> str:
    from transformers import AutoConfig

    with loading(what, source):
        # unless told not to, it asks at the terminal whether to run the code that a model brings
        found = AutoConfig.from_pretrained(folder, trust_remote_code=False).model_type
    if found not in known:
        raise ValueError(
            f"{source} is a model of type {found!r}, not {what} ({' or '.join(known)}): name "
            "another folder or hub id."
        )
    return str(found)


def _load(
    source: str, cls: Any, folder: Path, weights: list[Path], what: str, **options: Any
) -> Any:
    with loading(what, source):
        model, info = cls.from_pretrained(
            folder,
            dtype=torch.float32,
            use_safetensors=weights[0].suffix == ".safetensors",
            ignore_mismatched_sizes=True,  # told below, in one line
            output_loading_info=True,
            **options,
        )
    lacking = sorted(info["missing_keys"])
    misfits = sorted(str(key[0]) for key in info["mismatched_keys"])
    if lacking or misfits:
        how = "lack" if lacking else "have another shape of"
        names = lacking or misfits
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise ValueError(
            f"{source}: the weights {how} {names[0]}{more}, by the config beside them: they are "
            f"not those of {what}; fetch the model again, or name another."
        )
    return model


def _sha256(files: Sequence[Path]) -> str:
    digests = []
    for path in files:
        with path.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return (
        digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
    )
