"""Loading the frozen models that feed an SSR-Encoder, from a folder or the hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ssr_model.text import QueryEncoder


@contextmanager
def loading(what: str, name: str) -> Iterator[None]:
    """Quiet loading (a CLIP's other tower is left out on purpose), failures in one line."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    except Exception as error:  # damaged or foreign files make the libraries raise anything
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{name} cannot be loaded as {what}: {reason}") from None
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def load_vision(name: str) -> tuple[Any, Any]:
    """CLIP's vision tower (float32, CPU) and its image processor, in the PIL form everywhere."""
    from transformers import CLIPImageProcessorPil, CLIPVisionModel

    with loading("a CLIP vision model", name):
        model = CLIPVisionModel.from_pretrained(name, dtype=torch.float32, use_safetensors=True)
        return model, CLIPImageProcessorPil.from_pretrained(name)


def load_text(name: str) -> QueryEncoder:
    """Text encoders (float32, CPU) and tokenizers of a Stable Diffusion in diffusers' layout; those
    of SDXL are two.
    """
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    index = _config(name, "the text encoder of a Stable Diffusion")
    encoders, tokenizers = [], []
    for suffix, kind in (("", CLIPTextModel), ("_2", CLIPTextModelWithProjection)):
        if suffix and not any(index.get(f"text_encoder{suffix}") or ()):
            continue
        with loading("the text encoder of a Stable Diffusion", name):
            encoders.append(
                kind.from_pretrained(
                    name,
                    subfolder=f"text_encoder{suffix}",
                    dtype=torch.float32,
                    use_safetensors=True,
                )
            )
            tokenizers.append(CLIPTokenizer.from_pretrained(name, subfolder=f"tokenizer{suffix}"))
    return QueryEncoder(encoders, tokenizers, penultimate="text_encoder_2" in index)


def load_unet_config(name: str) -> dict[str, Any]:
    """Config of the U-Net of a Stable Diffusion in diffusers' layout."""
    return _config(name, "the U-Net of a Stable Diffusion", "unet")


def _config(name: str, what: str, subfolder: str | None = None) -> dict[str, Any]:
    from diffusers import DiffusionPipeline, UNet2DConditionModel

    with loading(what, name):
        if subfolder is None:
            return dict(DiffusionPipeline.load_config(name))
        return dict(UNet2DConditionModel.load_config(name, subfolder=subfolder))
