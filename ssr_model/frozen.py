"""Loading the frozen models that feed an SSR-Encoder, from a folder or the hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def _loading(what: str, name: str) -> Iterator[None]:
    """Quiet loading (a CLIP's other tower is left out on purpose), failures in one line."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    except OSError as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{name} cannot be loaded as {what}: {reason}") from None
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def load_vision(name: str) -> tuple[Any, Any]:
    """CLIP's vision tower (float32, CPU) and its image processor, in the PIL form everywhere."""
    from transformers import CLIPImageProcessorPil, CLIPVisionModel

    with _loading("a CLIP vision model", name):
        model = CLIPVisionModel.from_pretrained(name, dtype=torch.float32, use_safetensors=True)
        return model, CLIPImageProcessorPil.from_pretrained(name)


def load_text(name: str) -> tuple[Any, Any]:
    """Text encoder (float32, CPU) and tokenizer of a Stable Diffusion in diffusers' layout."""
    from transformers import CLIPTextModel, CLIPTokenizer

    with _loading("the text encoder of a Stable Diffusion", name):
        model = CLIPTextModel.from_pretrained(
            name, subfolder="text_encoder", dtype=torch.float32, use_safetensors=True
        )
        return model, CLIPTokenizer.from_pretrained(name, subfolder="tokenizer")
