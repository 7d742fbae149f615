"""Using a trained SSR-Encoder: `SSREncoder` drives any Stable Diffusion pipeline of diffusers.

ssr = SSREncoder.from_pretrained("runs/mini/model")
ssr.attach(pipe)
pipe("a cup on the beach", **ssr.condition([Subject(photo, query="cup")])).images[0]
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from PIL import Image
from torch import Tensor

from ssr_model import weights
from ssr_model.attachment import KEY, Attachment, Condition
from ssr_model.attention import SubjectBranch
from ssr_model.config import SSRConfig
from ssr_model.encoder import SSRAdapter, check_layers
from ssr_model.frozen import load_text, load_vision
from ssr_model.images import (
    Picture,
    as_mask,
    as_rgb,
    check_image_processor,
    mask_tokens,
    seen_box,
)
from ssr_model.subject import Subject, subject_rows
from ssr_model.text import check_tokenizer, encode_text, real_tokens, tokenize
from ssr_model.vision import patch_grid, vision_features


class SSREncoder:
    """A trained adapter with the frozen encoders that feed it.

    vision: `CLIPVisionModel`; text_encoder: `CLIPTextModel` of the base model; both are used as
    they are, on their devices. A tokenizer or an image processor that does not fit its model is
    refused here.
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
        vision: Any = None,
        base: Any = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        revision: str | None = None,
    ) -> Self:
        """Load a saved SSR-Encoder (folder or hub id) and the frozen models that it was trained on.

        vision: CLIP's folder or hub id, or a loaded (vision model, image processor); base: Stable
        Diffusion's folder or hub id, or a loaded pipeline whose text encoder is shared; none =
        those named in the saved metadata. device, dtype: of adapter and loaded models (float32,
        CPU).
        """
        adapter, metadata = weights.load_adapter(weights.fetch(os.fspath(name), revision))
        vision = vision if vision is not None else metadata.get("vision_model")
        base = base if base is not None else metadata.get("base_model")
        if not vision or base is None:
            lacks = "vision" if not vision else "base"
            raise ValueError(f"{name} does not say which {lacks} model it uses: give {lacks}=.")
        loaded = isinstance(vision, tuple)
        vision_model, image_processor = vision if loaded else load_vision(os.fspath(vision))
        if hasattr(base, "text_encoder"):
            text_encoder, tokenizer = base.text_encoder, base.tokenizer
        else:
            text_encoder, tokenizer = load_text(os.fspath(base))
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

        subjects: a list for all prompts of the call, or a list per prompt, in the prompts' order.
        Several subjects are concatenated over tokens, each with its own scale. guided: whether the
        call uses classifier-free guidance; none = the pipeline is asked.
        """
        if not self._attachments:
            raise ValueError("attach(pipe) first: a pipeline without it would ignore the subjects.")
        rows = [[s for s in row if s.scale != 0] for row in subject_rows(subjects)]
        flat = [subject for row in rows for subject in row]
        condition = Condition(None, guided=guided)
        if flat:
            images = {id(s.image): as_rgb(s.image) for s in flat}
            masks = [self._mask(s, images[id(s.image)]) for s in flat]
            scales, counts = [s.scale for s in flat], [len(row) for row in rows]

            def branch(texts: list[str], features: dict[int, Tensor]) -> SubjectBranch:
                tokens = self._embed(self._queries(texts), features, masks)
                return SubjectBranch.deal(self.adapter.keys_values(tokens), scales, counts)

            place = {key: i for i, key in enumerate(images)}
            index = [place[id(s.image)] for s in flat]
            features = self._features(list(images.values()))
            of_subjects = {depth: states[index] for depth, states in features.items()}
            condition.conditional = branch([s.query or "" for s in flat], of_subjects)
            if self.config.unconditional == "zero_image":
                zero = self._zero_features()
                nothing = {d: states.expand(len(flat), -1, -1) for d, states in zero.items()}
                condition.unconditional = branch([""] * len(flat), nothing)
        return {"cross_attention_kwargs": {KEY: condition}}

    @torch.no_grad()
    def attention_maps(self, image: Picture, queries: Sequence[str]) -> Tensor:
        """Where the aligner looks for each query: (queries, rows, columns) float32, on the CPU.

        Each map is the attention on the patches, averaged over heads and over the query's words
        (start, end and padding tokens do not count); `ssr_model.images.overlay` draws one.
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
        pixels = as_mask(subject.mask, image.size)
        box = seen_box(self.image_processor, image.size)
        grid = patch_grid(self.vision.config)
        return mask_tokens(pixels, box, grid, self.config.mask_form, self.config.mask_cls)

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


def _check_fit(config: SSRConfig, vision_config: Any, text_config: Any) -> None:
    if vision_config.hidden_size != config.vision_dim:
        raise ValueError(
            f"the vision model is {vision_config.hidden_size} wide and the SSR-Encoder expects "
            f"{config.vision_dim}: it was trained on another vision model."
        )
    if vision_config.num_hidden_layers < config.depths[-1]:
        raise ValueError(
            f"the vision model has {vision_config.num_hidden_layers} layers and the SSR-Encoder "
            f"reads depth {config.depths[-1]}: it was trained on another vision model."
        )
    if text_config.hidden_size != config.text_dim:
        raise ValueError(
            f"the text encoder is {text_config.hidden_size} wide and the SSR-Encoder expects "
            f"{config.text_dim}: it was trained on another base model."
        )
