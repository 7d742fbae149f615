"""Using a trained SSR-Encoder: `SSREncoder` drives any Stable Diffusion pipeline of diffusers.

ssr = SSREncoder.from_pretrained("runs/mini/model")
ssr.attach(pipe)
pipe("a cup on the beach", **ssr.condition([Subject(photo, query="cup")])).images[0]
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self, TypeGuard

import torch
from PIL import Image
from torch import Tensor

from ssr_model import weights
from ssr_model.attachment import KEY, Attachment, Condition
from ssr_model.attention import SubjectBranch
from ssr_model.config import SSRConfig
from ssr_model.encoder import SSRAdapter, check_layers
from ssr_model.images import (
    Mask,
    Picture,
    as_mask,
    as_rgb,
    check_image_processor,
    mask_tokens,
    seen_box,
)
from ssr_model.text import check_tokenizer, encode_text, real_tokens, tokenize
from ssr_model.vision import patch_grid, vision_features


@dataclass(eq=False)
class Subject:
    """What to take from a reference image: by a text query, by a mask, or by both."""

    image: Picture
    """PIL image, or array (H, W, 3) of uint8 or of floats in [0, 1]."""
    query: str | None = None
    """Words that name the subject in the image ("cup"); none = the mask alone selects."""
    mask: Mask | None = None
    """(H, W) of the image's size, nonzero at the subject; none = the query alone selects."""
    scale: float = 1.0
    """Weight of this subject (lambda of Eq. 4); 0 leaves it out."""

    def __post_init__(self) -> None:
        if self.query is not None and not isinstance(self.query, str):
            raise ValueError(f"a query must be text, not {type(self.query).__name__}.")
        if self.mask is None and not (self.query or "").strip():
            raise ValueError("a subject needs a query, a mask, or both: this one has neither.")
        if isinstance(self.scale, bool) or not math.isfinite(self.scale):
            raise ValueError(f"a subject's scale must be a finite number, not {self.scale!r}.")


class SSREncoder:
    """A trained adapter with the frozen encoders that feed it.

    vision: `CLIPVisionModel`; text_encoder: `CLIPTextModel` of the base model; both are used as they are, on their devices. A tokenizer or
    an image processor that does not fit its model is refused here.
    """

    def __init__(
        self,
        config: SSRConfig,
        adapter: SSRAdapter,
        vision: Any,
        image_processor: Any,
        text_encoder: Any,
        tokenizer: Any,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        check_tokenizer(tokenizer, text_encoder.config)
        check_image_processor(image_processor, vision.config)
        _check_fit(config, vision.config, text_encoder.config)
        if adapter.config != config:
            raise ValueError("the adapter was made with another config than the one given.")
        self.config = config
        self.adapter = adapter.eval()
        self.vision = vision.eval()
        self.image_processor = image_processor
        self.text_encoder = text_encoder.eval()
        self.tokenizer = tokenizer
        self.metadata = dict(metadata or {})
        self._attachments: list[Attachment] = []

    # --- on disk ------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        vision: str | None = None,
        base: Any = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        revision: str | None = None,
    ) -> Self:
        """Load a saved SSR-Encoder (folder or hub id) and the frozen models that it was trained on.

        vision: CLIP's folder or hub id; base: Stable Diffusion's folder or hub id, or a loaded pipeline whose text encoder is shared;
        none = those named in the saved metadata. device, dtype: of adapter and loaded models (float32, CPU).
        """
        adapter, metadata = weights.load_adapter(weights.fetch(os.fspath(name), revision))
        vision = vision or metadata.get("vision_model")
        base = base if base is not None else metadata.get("base_model")
        if not vision or base is None:
            lacks = "vision" if not vision else "base"
            raise ValueError(f"{name} does not say which {lacks} model it uses: give {lacks}=.")
        vision_model, image_processor = _load_vision(vision)
        if hasattr(base, "text_encoder"):
            text_encoder, tokenizer = base.text_encoder, base.tokenizer
        else:
            text_encoder, tokenizer = _load_text(os.fspath(base))
            text_encoder.to(device=device, dtype=dtype)
        vision_model.to(device=device, dtype=dtype)
        adapter.to(device=device, dtype=dtype)
        return cls(
            adapter.config,
            adapter,
            vision_model,
            image_processor,
            text_encoder,
            tokenizer,
            metadata,
        )

    def save_pretrained(
        self, folder: str | os.PathLike[str], dtype: torch.dtype | None = None
    ) -> None:
        """Write config.json and model.safetensors: the trainables alone, with the metadata."""
        weights.save_adapter(folder, self.adapter, self.metadata, dtype)

    # --- on a pipeline ------------------------------------------------------------------

    def attach(self, pipe: Any) -> Self:
        """Give the pipeline's U-Net the subject branch; without a condition nothing changes."""
        unet = getattr(pipe, "unet", None)
        if unet is None:
            raise ValueError(
                f"{type(pipe).__name__} has no U-Net: Stable Diffusion 1, 2 or XL is needed."
            )
        check_layers(self.config, unet)
        attachment = self._attachment(unet)
        if attachment is None:
            attachment = Attachment.make(unet, self.config.layers)
            self._attachments.append(attachment)
        attachment.add(pipe)
        return self

    def detach(self, pipe: Any = None) -> None:
        """Give the pipeline (or every pipeline) its U-Net back as it was."""
        if pipe is None:
            gone = list(self._attachments)
        else:
            attachment = self._attachment(getattr(pipe, "unet", None))
            if attachment is None:
                raise ValueError(f"this {type(pipe).__name__} is not attached to this SSR-Encoder.")
            gone = [attachment]
        for attachment in gone:
            attachment.remove()
            self._attachments.remove(attachment)

    def _attachment(self, unet: Any) -> Attachment | None:
        return next((a for a in self._attachments if a.attention.unet is unet), None)

    @torch.no_grad()
    def condition(
        self, subjects: Sequence[Subject] | Sequence[Sequence[Subject]], guided: bool | None = None
    ) -> dict[str, Any]:
        """Keyword arguments for one call of an attached pipeline.

        subjects: a list for all prompts of the call, or a list per prompt, in the prompts' order. Several subjects are concatenated over
        tokens, each with its own scale. guided: whether the call uses classifier-free guidance; none = the pipeline is asked.
        """
        if not self._attachments:
            raise ValueError("attach(pipe) first: a pipeline without it would ignore the subjects.")
        rows = [[s for s in row if s.scale != 0] for row in _rows(subjects)]
        flat = [subject for row in rows for subject in row]
        condition = Condition(None, guided=guided)
        if flat:
            counts = [len(row) for row in rows]
            images = {id(s.image): as_rgb(s.image) for s in flat}
            masks = [self._mask(s, images[id(s.image)]) for s in flat]
            features = self._features(list(images.values()))
            place = {key: i for i, key in enumerate(images)}
            index = [place[id(s.image)] for s in flat]
            of_subjects = {depth: states[index] for depth, states in features.items()}
            queries = self._queries([s.query or "" for s in flat])
            scales = torch.tensor([s.scale for s in flat])
            tokens = self._embed(queries, of_subjects, masks)
            condition.conditional = self._branch(tokens, scales, counts)
            if self.config.unconditional == "zero_image":
                nothing = {d: s.expand(len(flat), -1, -1) for d, s in self._zero_features().items()}
                null = self._queries([""]).expand(len(flat), -1, -1)
                tokens = self._embed(null, nothing, masks)
                condition.unconditional = self._branch(tokens, scales, counts)
        return {"cross_attention_kwargs": {KEY: condition}}

    @torch.no_grad()
    def attention_maps(self, image: Picture, queries: Sequence[str]) -> Tensor:
        """Where the aligner looks for each query: (queries, rows, columns) float32, on the CPU.

        Each map is the attention on the patches, averaged over heads and over the query's words (start, end and padding tokens do not
        count); `ssr_model.images.overlay` draws one.
        """
        if isinstance(queries, str) or not queries or not all(q.strip() for q in queries):
            raise ValueError("queries must be a list of texts, none of them empty.")
        ids = tokenize(self.tokenizer, queries)
        features = self._features([as_rgb(image)])
        keys = {d: states.expand(len(queries), -1, -1) for d, states in features.items()}
        z_q = self._to_adapter(encode_text(self.text_encoder, ids))
        attention = self.adapter.encoder.aligner(z_q, keys[self.config.depths[-1]])
        real = real_tokens(self.tokenizer, ids).to(attention.device)
        if not real.any(dim=1).all():
            empty = queries[int((~real.any(dim=1)).nonzero()[0])]
            raise ValueError(f"the query {empty!r} holds no word that the tokenizer knows.")
        weight = real.float() / real.sum(dim=1, keepdim=True)
        maps = torch.einsum("bqi,bq->bi", attention.float().mean(dim=1), weight)
        return maps[:, 1:].unflatten(1, patch_grid(self.vision.config)).cpu()

    # --- from images and words to keys and values -----------------------------------------

    def _to_adapter(self, tensor: Tensor) -> Tensor:
        weight = self.adapter.encoder.norm.weight
        return tensor.to(weight.device, weight.dtype)

    def _pixels_to_features(self, pixels: Tensor) -> dict[int, Tensor]:
        pixels = pixels.to(self.vision.device, self.vision.dtype)
        found = vision_features(self.vision, pixels, self.config.depths)
        return {depth: self._to_adapter(states) for depth, states in found.items()}

    def _features(self, images: list[Image.Image]) -> dict[int, Tensor]:
        pixels = self.image_processor(images, return_tensors="pt").pixel_values
        return self._pixels_to_features(pixels)

    def _zero_features(self) -> dict[int, Tensor]:
        vision = self.vision.config
        shape = (1, vision.num_channels, vision.image_size, vision.image_size)
        return self._pixels_to_features(torch.zeros(shape))

    def _queries(self, texts: list[str]) -> Tensor:
        distinct = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        z_q = encode_text(self.text_encoder, tokenize(self.tokenizer, list(distinct)))
        return self._to_adapter(z_q)[[distinct[text] for text in texts]]

    def _mask(self, subject: Subject, image: Image.Image) -> Tensor | None:
        if subject.mask is None:
            return None
        box = seen_box(self.image_processor, image.size)
        grid = patch_grid(self.vision.config)
        return mask_tokens(as_mask(subject.mask, image.size), box, grid, self.config.mask_cls)

    def _embed(
        self, z_q: Tensor, features: dict[int, Tensor], masks: list[Tensor | None]
    ) -> Tensor:
        """Subject tokens (M, K * N_q, D) of M subjects, with a mask or without."""
        tokens: dict[int, Tensor] = {}
        for masked in (False, True):
            index = [i for i, mask in enumerate(masks) if (mask is not None) == masked]
            if index:
                mask = torch.stack([m for m in masks if m is not None]) if masked else None
                found = self.adapter.encoder(
                    z_q[index],
                    {depth: states[index] for depth, states in features.items()},
                    None if mask is None else mask.to(z_q.device),
                )
                tokens.update(zip(index, found.tokens, strict=True))
        return torch.stack([tokens[i] for i in range(len(masks))])

    def _branch(self, tokens: Tensor, scales: Tensor, counts: list[int]) -> SubjectBranch:
        """Keys and values of M subjects, dealt to prompts (counts[i] of them to prompt i)."""
        pairs = self.adapter.keys_values(tokens)
        per_subject, most = tokens.shape[1], max(counts)
        # row i holds the subjects of prompt i, then padding, which points at an extra row of zeros
        filler, start = len(tokens), 0
        index = torch.full((len(counts), most), filler, device=tokens.device)
        for row, count in enumerate(counts):
            index[row, :count] = torch.arange(start, start + count)
            start += count
        weight = scales.to(tokens.device, tokens.dtype)[:, None, None]

        def deal(subjects: Tensor) -> Tensor:
            if all(count == most for count in counts):
                return subjects.unflatten(0, (len(counts), most)).flatten(1, 2)
            padded = torch.cat([subjects, torch.zeros_like(subjects[:1])])
            return padded[index].flatten(1, 2)

        keys = {name: deal(key) for name, (key, _) in pairs.items()}
        values = {name: deal(value * weight) for name, (_, value) in pairs.items()}
        mask = None
        if not all(count == most for count in counts):
            # a prompt without subjects looks at its zeros: nothing is added, and nothing is NaN
            real = (index != filler) | (torch.tensor(counts, device=index.device) == 0)[:, None]
            mask = real.repeat_interleave(per_subject, dim=1)
        return SubjectBranch(keys, values, mask)


def _is_rows(
    subjects: Sequence[Subject] | Sequence[Sequence[Subject]],
) -> TypeGuard[Sequence[Sequence[Subject]]]:
    return bool(subjects) and not any(isinstance(item, Subject) for item in subjects)


def _rows(subjects: Sequence[Subject] | Sequence[Sequence[Subject]]) -> list[list[Subject]]:
    if isinstance(subjects, Subject):
        raise ValueError("give a list of subjects, even for one: condition([Subject(...)]).")
    rows = [list(row) for row in subjects] if _is_rows(subjects) else [list(subjects)]  # type: ignore[arg-type]
    if not all(isinstance(item, Subject) for row in rows for item in row):
        raise ValueError("subjects must be a list of Subject, or one such list per prompt.")
    return rows


def _check_fit(config: SSRConfig, vision_config: Any, text_config: Any) -> None:
    if vision_config.hidden_size != config.vision_dim:
        raise ValueError(
            f"the vision model is {vision_config.hidden_size} wide and the SSR-Encoder expects "
            f"{config.vision_dim}: it was trained on another vision model."
        )
    if vision_config.num_hidden_layers < config.depths[-1]:
        raise ValueError(
            f"the vision model has {vision_config.num_hidden_layers} layers and the SSR-Encoder reads "
            f"depth {config.depths[-1]}: it was trained on another vision model."
        )
    if text_config.hidden_size != config.text_dim:
        raise ValueError(
            f"the text encoder is {text_config.hidden_size} wide and the SSR-Encoder expects "
            f"{config.text_dim}: it was trained on another base model."
        )


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


def _load_vision(name: str) -> tuple[Any, Any]:
    from transformers import CLIPImageProcessorPil, CLIPVisionModel

    with _loading("a CLIP vision model", name):
        model = CLIPVisionModel.from_pretrained(name, dtype=torch.float32, use_safetensors=True)
        return model, CLIPImageProcessorPil.from_pretrained(name)


def _load_text(name: str) -> tuple[Any, Any]:
    from transformers import CLIPTextModel, CLIPTokenizer

    with _loading("the text encoder of a Stable Diffusion", name):
        model = CLIPTextModel.from_pretrained(
            name, subfolder="text_encoder", dtype=torch.float32, use_safetensors=True
        )
        return model, CLIPTokenizer.from_pretrained(name, subfolder="tokenizer")
