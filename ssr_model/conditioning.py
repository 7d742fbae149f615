"""Using a trained SSR-Encoder: `SSREncoder` drives any Stable Diffusion pipeline of diffusers.

ssr = SSREncoder.from_pretrained("runs/mini/model")
ssr.attach(pipe)
pipe("a cup on the beach", **ssr.condition([Subject(photo, query="cup")])).images[0]
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

import torch
from PIL import Image
from torch import Tensor

from ssr_model import hub, memory, released, weights
from ssr_model.attachment import KEY, Attachment, Condition, ConditionArguments
from ssr_model.branch import SubjectBranch
from ssr_model.config import SSRConfig
from ssr_model.encoder import SSRAdapter, check_layers
from ssr_model.frozen import load_text, load_unet_config, load_vision
from ssr_model.images import (
    Picture,
    as_mask,
    as_region,
    as_rgb,
    check_image_processor,
    mask_tokens,
    seen_box,
)
from ssr_model.maps import AttentionMap
from ssr_model.subject import Subject, subject_rows
from ssr_model.text import QueryEncoder, input_device
from ssr_model.vision import patch_grid, vision_features

Name = str | os.PathLike[str]

_IMAGES_AT_A_TIME = 16  # through the vision model, whose passing memory is not counted


class SSREncoder:
    """A trained adapter with the frozen encoders that feed it.

    vision: `CLIPVisionModel` (or the one with a projection); queries: the base model's text
    encoders; all are used as they are, on their devices. A tokenizer or an image processor that
    does not fit its model is refused here.
    """

    def __init__(
        self,
        adapter: SSRAdapter,
        vision: Any,
        image_processor: Any,
        queries: QueryEncoder,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        check_image_processor(image_processor, vision.config)
        _check_fit(adapter.config, vision.config, queries.width)
        self.config = adapter.config
        self.adapter = adapter.eval()
        self.vision = vision.eval()
        self.image_processor = image_processor
        self.queries = queries
        self.metadata = dict(metadata or {})
        self._attachments: list[Attachment] = []

    # --- on disk ------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        name: Name,
        vision: Any = None,
        base: Any = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        revision: str | None = None,
    ) -> Self:
        """Load a saved SSR-Encoder (folder or hub id) and the frozen models that it was trained on.

        vision: CLIP's folder or hub id, or a loaded (vision model, image processor); base: Stable
        Diffusion's folder or hub id, or a loaded pipeline whose text encoders are shared; none =
        those named in the saved metadata. device, dtype: of adapter and loaded models (float32,
        CPU); what was given loaded stays as it is.
        """
        adapter, metadata = weights.load_adapter(weights.fetch(os.fspath(name), revision))
        vision = vision if vision is not None else metadata.get("vision_model")
        base = base if base is not None else metadata.get("base_model")
        if not vision or base is None:
            lacks = "vision" if not vision else "base"
            raise ValueError(f"{name} does not say which {lacks} model it uses: give {lacks}=.")
        frozen = _frozen(vision, base, device, dtype)
        return cls(adapter.to(device, dtype), *frozen, metadata)

    def save_pretrained(self, folder: Name, dtype: torch.dtype | None = None) -> None:
        """Write config.json, model.safetensors (the trainables alone) and a model card."""
        weights.save_adapter(folder, self.adapter, self.metadata, dtype)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        token: str | None = None,
        commit_message: str = hub.MESSAGE,
        create_pr: bool = False,
        license: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> str:
        """Commit what `save_pretrained` writes to the hub; the commit's address (see `hub.push`).

        Raises ValueError, in one line: no token, no right, or the hub is out of reach.
        """
        return hub.push(
            self.adapter,
            self.metadata,
            repo_id,
            private=private,
            revision=revision,
            token=token,
            commit_message=commit_message,
            create_pr=create_pr,
            license=license,
            dtype=dtype,
        )

    @classmethod
    def from_released(
        cls,
        aligner_path: Name,
        layers_path: Name,
        vision: Any = released.VISION,
        base: Any = released.BASE,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        heads: int = released.HEADS,
        mask_weight: float = 1.0,
    ) -> Self:
        """Load the two files that the paper's authors published, without running their pickles.

        aligner_path: `pytorch_model.bin`; layers_path: `pytorch_model_1.bin`. vision, base, device,
        dtype: as for `from_pretrained`; the defaults are the models that the files were trained on.
        heads: of the aligner, which the files do not tell; mask_weight: w of a mask query. Save the
        result with `save_pretrained` to have it as safetensors.
        """
        vision_model, image_processor, queries = _frozen(vision, base, device, dtype)
        unet = base.unet if hasattr(base, "unet") else load_unet_config(os.fspath(base))
        adapter = released.load(
            aligner_path,
            layers_path,
            vision_model.config,
            queries.width,
            unet,
            heads=heads,
            mask_weight=mask_weight,
        )
        said = {"base_model": _name(base), "vision_model": _name(vision)}
        metadata = {key: name for key, name in said.items() if name}
        return cls(adapter.to(device, dtype), vision_model, image_processor, queries, metadata)

    def save_released(
        self, aligner_path: Name, layers_path: Name, dtype: torch.dtype | None = None
    ) -> None:
        """Write the two files of the authors' layout, for code that reads only those."""
        released.save(self.adapter, aligner_path, layers_path, dtype)

    # --- on a pipeline ------------------------------------------------------------------

    def attach(self, pipe: Any) -> Self:
        """Give the pipeline's U-Net the subject branch; without a condition nothing changes."""
        unet = getattr(pipe, "unet", None)
        if unet is None:
            raise ValueError(
                f"{type(pipe).__name__} has no U-Net: Stable Diffusion 1, 2 or XL is needed."
            )
        check_layers(self.config, unet)
        self._forget_the_gone()
        attachment = self._attachment(unet)
        if attachment is None:
            attachment = Attachment.make(unet, self.config.layers)
            self._attachments.append(attachment)
        attachment.add(pipe)
        return self

    def detach(self, pipe: Any = None) -> None:
        """Give the pipeline (or every pipeline) its U-Net back as it was; pipelines that share the
        U-Net are detached with it.
        """
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

    def to(
        self, device: str | torch.device | None = None, dtype: torch.dtype | None = None
    ) -> Self:
        """Move the adapter, the vision model and the text encoders."""
        self.adapter.to(device=device, dtype=dtype)
        self.vision.to(device=device, dtype=dtype)
        self.queries.to(device, dtype)
        return self

    def _attachment(self, unet: Any) -> Attachment | None:
        return next((a for a in self._attachments if a.unet is unet), None)

    def _forget_the_gone(self) -> None:
        """Give back the U-Nets that no attached pipeline has any more."""
        for gone in [a for a in self._attachments if not a.live]:
            gone.remove()
            self._attachments.remove(gone)

    @torch.no_grad()
    def condition(
        self,
        subjects: Sequence[Subject] | Sequence[Sequence[Subject]],
        guided: bool | None = None,
        depths: Sequence[int] | None = None,
        lora_scale: float | None = None,
    ) -> dict[str, Any]:
        """Keyword arguments for one call of an attached pipeline.

        subjects: a list for all prompts of the call, or a list per prompt, in the prompts' order.
        Several subjects are concatenated over tokens, each with its own scale. guided: whether the
        call uses classifier-free guidance; none = the pipeline is asked. depths: scales to use, the
        last among them; none = all (the last alone is how the first stage trains). lora_scale: of
        the pipeline's LoRAs, which travels in the same argument.

        The subjects are taken as they are now; the result serves later calls too, one at a time.
        Its keys and values go to the device and the precision of the pipeline that uses them.
        """
        self._forget_the_gone()
        if not self._attachments:
            raise ValueError("attach(pipe) first: a pipeline without it would ignore the subjects.")
        depths = self.adapter.encoder.check_depths(self.config.depths if depths is None else depths)
        rows = [[replace(s) for s in row if not s.absent] for row in subject_rows(subjects)]
        flat = [subject for row in rows for subject in row]
        condition = Condition(None, guided=guided)
        if flat:
            images = {id(s.image): as_rgb(s.image) for s in flat}
            masks = [self._mask(s, images[id(s.image)]) for s in flat]
            for subject in flat:
                as_region(subject.region, (1, 1))  # refused here, not in the middle of the call
                subject.scale_at(self.config.layers)
            self._check_room(len(rows) * max(map(len, rows)), len(depths))

            def branch(texts: list[str], features: dict[int, Tensor]) -> SubjectBranch:
                tokens = self._embed(self._z_q(texts), features, masks)
                return SubjectBranch.deal(self.adapter.by_layer(), tokens, rows)

            place = {key: i for i, key in enumerate(images)}
            index = [place[id(s.image)] for s in flat]
            features = self._features(list(images.values()), depths)
            of_subjects = {depth: states[index] for depth, states in features.items()}
            condition.conditional = branch([s.query or "" for s in flat], of_subjects)
            if self.config.unconditional == "zero_image":
                zero = self._zero_features(depths)
                nothing = {d: states.expand(len(flat), -1, -1) for d, states in zero.items()}
                condition.unconditional = branch([""] * len(flat), nothing)
        arguments = ConditionArguments({KEY: condition})
        if lora_scale is not None:
            arguments["scale"] = lora_scale
        return {"cross_attention_kwargs": arguments}

    @torch.no_grad()
    def attention_maps(self, image: Picture, queries: Sequence[str]) -> list[AttentionMap]:
        """Where the aligner looks for each query, word by word; `overlay()` draws a map."""
        texts = not isinstance(queries, str) and all(isinstance(q, str) for q in queries)
        if not texts or not queries or not all(q.strip() for q in queries):
            raise ValueError("queries must be a list of texts, none of them empty.")
        words = [self.queries.words(query) for query in queries]
        picture = as_rgb(image)
        last = self.config.depths[-1]
        z_0 = self._features([picture], [last])[last].expand(len(queries), -1, -1)
        attention = self.adapter.encoder.aligner(self._z_q(queries), z_0).float().mean(dim=1).cpu()
        patches = attention[:, :, 1:].unflatten(2, patch_grid(self.vision.config))
        seen = picture.crop(seen_box(self.image_processor, picture.size))
        return [
            AttentionMap(query, tokens, patches[i, places], seen)
            for i, (query, (places, tokens)) in enumerate(zip(queries, words, strict=True))
        ]

    # --- from images and words to keys and values -----------------------------------------

    def _to_adapter(self, tensor: Tensor) -> Tensor:
        weight = self.adapter.encoder.aligner.to_q.weight
        return tensor.to(weight.device, weight.dtype)

    def _pixels_to_features(self, pixels: Tensor, depths: Sequence[int]) -> dict[int, Tensor]:
        pixels = pixels.to(input_device(self.vision), self.vision.dtype)
        found = vision_features(self.vision, pixels, depths)
        return {depth: self._to_adapter(states) for depth, states in found.items()}

    def _features(self, images: list[Image.Image], depths: Sequence[int]) -> dict[int, Tensor]:
        found = []
        for first in range(0, len(images), _IMAGES_AT_A_TIME):
            some = images[first : first + _IMAGES_AT_A_TIME]
            pixels = self.image_processor(some, return_tensors="pt").pixel_values
            found.append(self._pixels_to_features(pixels, depths))
        return {depth: torch.cat([each[depth] for each in found]) for depth in depths}

    def _zero_features(self, depths: Sequence[int]) -> dict[int, Tensor]:
        vision = self.vision.config
        shape = (1, vision.num_channels, vision.image_size, vision.image_size)
        return self._pixels_to_features(torch.zeros(shape), depths)

    def _z_q(self, texts: Sequence[str]) -> Tensor:
        distinct = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        z_q = self._to_adapter(self.queries(list(distinct)))
        return z_q[[distinct[text] for text in texts]]

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

    def _check_room(self, subjects: int, scales: int) -> None:
        """Refuse more subjects than there is memory for, here and where the pipelines run."""
        config, branches = self.config, 2 if self.config.unconditional == "zero_image" else 1
        rows, columns = patch_grid(self.vision.config)
        tokens = scales * self.queries.tokens
        kept = branches * tokens * 2 * sum(config.layers.values())  # keys and values
        passing = (
            2 * tokens * config.text_dim + 2 * scales * (1 + rows * columns) * config.vision_dim
        )
        weight = self.adapter.encoder.aligner.to_q.weight
        needs = {weight.device: (kept + passing) * weight.element_size()}
        for attachment in self._attachments:
            assert attachment.unet is not None
            weight = next(attachment.unet.parameters())
            if weight.device.type != "meta":
                needs.setdefault(weight.device, kept * weight.element_size())
        for device, need in needs.items():
            need, free = subjects * need, memory.free_bytes(device)
            if need > free:
                raise ValueError(
                    f"{subjects} subjects (padding included) need {need / 2**30:.1f} GiB, most of "
                    f"it for keys and values, and {free / 2**30:.1f} GiB are free on {device}: "
                    "give fewer subjects, or fewer prompts at a time."
                )


def _frozen(
    vision: Any, base: Any, device: str | torch.device | None, dtype: torch.dtype | None
) -> tuple[Any, Any, QueryEncoder]:
    """Vision model, image processor and text encoders; those that are loaded here are moved."""
    if not isinstance(vision, (str, os.PathLike, tuple)):
        raise ValueError(
            f"vision must be a folder, a hub id, or a pair (model, image processor), not a "
            f"{type(vision).__name__}."
        )
    if isinstance(vision, tuple):
        vision_model, image_processor = vision
    else:
        vision_model, image_processor = load_vision(os.fspath(vision))
        vision_model.to(device=device, dtype=dtype)
    if isinstance(base, (str, os.PathLike)):
        return vision_model, image_processor, load_text(os.fspath(base)).to(device, dtype)
    return vision_model, image_processor, QueryEncoder.from_pipeline(base)


def _name(model: Any) -> str:
    """Folder or hub id that a model (or a vision model with its processor) was loaded from."""
    if isinstance(model, (str, os.PathLike)):
        return os.fspath(model)
    model = model[0] if isinstance(model, tuple) else model
    return str(getattr(model, "name_or_path", None) or "")


def _check_fit(config: SSRConfig, vision_config: Any, text_width: int) -> None:
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
    if text_width != config.text_dim:
        raise ValueError(
            f"the base model's text is {text_width} wide and the SSR-Encoder expects "
            f"{config.text_dim}: it was trained on another base model."
        )
