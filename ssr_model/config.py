"""`SSRConfig`: the shape of an SSR-Encoder, read off the models that it stands on.

Two named variants of one model. `paper` follows arXiv 2312.16272; `released` follows the authors'
code where the two differ. The variant only sets fields: the modules read the fields, and there is
no subclass per variant.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

Variant = Literal["paper", "released"]
RegForm = Literal["mean", "per_scale"]
MaskForm = Literal["reweight", "bias"]
Unconditional = Literal["null", "zero_image"]
ValueProjection = Literal["direct", "factored"]

# What the variants differ in. The width inside the aligner, on which the paper is silent, is the
# authors'; so are the six scales and their depths.
VARIANTS: dict[str, dict[str, Any]] = {
    "paper": {
        "heads": 1,
        "head_dim": 512,
        "value_projection": "direct",
        "token_norm": False,
        "init_layers": "copy",
        "reg_form": "mean",
        "mask_form": "reweight",
        "mask_cls": False,
        "unconditional": "null",
    },
    "released": {
        "heads": 8,
        "head_dim": 64,
        "value_projection": "factored",
        "token_norm": True,
        "init_layers": "random",
        "reg_form": "per_scale",
        "mask_form": "bias",
        "mask_cls": True,
        "unconditional": "zero_image",
    },
}


_LAYER = re.compile(r"([A-Za-z0-9_]+\.)*attn2\.processor")
_LARGEST = 1 << 24  # of any dimension: a config from a stranger must not overflow a shape


def depths_for(num_layers: int, scales: int) -> tuple[int, ...]:
    """Depths (indices into `hidden_states`) of `scales` evenly spaced layers, the last included.

    24 layers and 6 scales give 4, 8, ..., 24.
    """
    if not 1 <= scales <= num_layers:
        raise ValueError(
            f"scales must be 1 to {num_layers} (the vision model's layers), not {scales}."
        )
    return tuple(round(num_layers * (i + 1) / scales) for i in range(scales))


def layer_key(processor_name: str) -> str:
    """Name of a U-Net attention processor as a key of the adapter's weights (no dots)."""
    return processor_name.removesuffix(".processor").replace(".", "_")


@dataclass(frozen=True)
class SSRConfig:
    """Everything that shapes the trainable tensors and their arithmetic."""

    vision_dim: int
    """Width of the vision model's hidden states."""
    text_dim: int
    """Width of the query embedding z_q, and so of the subject tokens."""
    depths: tuple[int, ...]
    """Vision depths used as scales, shallowest first; keys come from the last."""
    layers: dict[str, int]
    """U-Net cross-attention processor name -> width of its keys and values, in the U-Net's
    order.
    """
    variant: Variant = "paper"
    """Which reading of the method the fields below follow."""
    heads: int = 1
    """Softmax heads of the token-to-patch aligner."""
    head_dim: int = 512
    """Width of one head of the aligner."""
    value_projection: ValueProjection = "direct"
    """W^V_k (Eq. 3) is one matrix, or two with the heads between them (`factored`)."""
    token_norm: bool = False
    """Whether a LayerNorm follows over the subject tokens of all scales."""
    norm_eps: float = 1e-5
    """Epsilon of the LayerNorm over the subject tokens."""
    init_layers: Literal["copy", "random"] = "copy"
    """K_S, V_S start as copies of the text K, V, or at random."""
    reg_form: RegForm = "mean"
    """L_reg on the mean over scales (Eq. 6), or summed over scales."""
    mask_form: MaskForm = "reweight"
    """A mask multiplies the attention map, or is added to its logits."""
    mask_weight: float = 1.0
    """Weight w of the mask in the `bias` form; the `reweight` form has none."""
    mask_cls: bool = False
    """Whether a mask query may look at the CLS token, which has seen the whole image."""
    start_token: bool = True
    """Whether the query's start token makes subject tokens too. In a causal text encoder its state
    is the same for every query: it can carry the whole image, and select nothing."""
    unconditional: Unconditional = "null"
    """Subject of the unconditional branch: nothing (zeros), or a zero image with empty text."""

    def __post_init__(self) -> None:
        _check(self)

    @property
    def inner_dim(self) -> int:
        """Width of queries, keys and values inside the aligner."""
        return self.heads * self.head_dim

    @classmethod
    def from_models(
        cls,
        vision_config: Any,
        text_config: Any,
        unet: Any,
        *,
        scales: int | None = None,
        depths: tuple[int, ...] | None = None,
        variant: Variant = "paper",
        **fields: Any,
    ) -> SSRConfig:
        """Read the dimensions off the configs of the vision model, the text model and the U-Net.

        `text_config` is one, or a list of the two of SDXL; `unet` is a U-Net of diffusers or its
        config; `depths` or `scales` choose the scales (default: 6, or every layer where there are
        fewer). Any further field overrides the variant's.
        """
        if variant not in VARIANTS:
            raise ValueError(f"unknown variant {variant!r}; use one of {', '.join(VARIANTS)}.")
        vision_config = getattr(vision_config, "vision_config", vision_config)
        several = isinstance(text_config, (list, tuple))
        texts: list[Any] = list(text_config) if several else [text_config]
        text_dim = sum(int(getattr(text, "text_config", text).hidden_size) for text in texts)
        num_layers = int(vision_config.num_hidden_layers)
        if depths is None:
            depths = depths_for(num_layers, min(6, num_layers) if scales is None else scales)
        elif scales is not None and scales != len(depths):
            raise ValueError(f"scales={scales} and depths={depths} disagree; give one of them.")
        if max(depths) > num_layers:
            raise ValueError(
                f"depth {max(depths)} is beyond the vision model's {num_layers} layers."
            )
        layers, cross_dim = cross_attention_layers(unet)
        if cross_dim != text_dim:
            raise ValueError(
                f"the text model is {text_dim} wide and the U-Net's cross-attention {cross_dim}: "
                "they belong to different models."
            )
        return cls(
            vision_dim=int(vision_config.hidden_size),
            text_dim=text_dim,
            depths=tuple(int(depth) for depth in depths),
            layers=layers,
            variant=variant,
            **{**VARIANTS[variant], **fields},
        )

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return {**dataclasses.asdict(self), "depths": list(self.depths)}

    def to_json(self) -> str:
        """The fields as JSON text, as stored in config.json."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SSRConfig:
        """Build from JSON values; an unknown or missing key is a ValueError that names the
        nearest.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in names:
                near = difflib.get_close_matches(str(key), names, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(names)}."
                raise ValueError(f"unknown key {key!r} in the SSR-Encoder's config{hint}")
        missing = [
            field.name
            for field in dataclasses.fields(cls)
            if field.default is dataclasses.MISSING and field.name not in values
        ]
        if missing:
            raise ValueError(f"the SSR-Encoder's config lacks {', '.join(missing)}.")
        depths = values["depths"]
        if not isinstance(depths, (list, tuple)):
            raise ValueError(f"depths must be a list of layer numbers, not {depths!r}.")
        return cls(**{**values, "depths": tuple(depths)})

    @classmethod
    def from_json(cls, text: str | bytes) -> SSRConfig:
        """Read config.json's text; anything but an object with the known keys is a ValueError."""
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"the SSR-Encoder's config is not JSON: {error}.") from None
        if not isinstance(values, dict):
            raise ValueError("the SSR-Encoder's config must be a JSON object.")
        return cls.from_dict(values)


def cross_attention_layers(unet: Any) -> tuple[dict[str, int], int]:
    """Text cross-attention layers of a U-Net (or of its config): {processor name: width}, and the
    text's width.

    Only `attn2` of transformer blocks counts; motion modules attend over time and see no text.
    """
    if not isinstance(unet, torch.nn.Module):
        from diffusers import UNet2DConditionModel

        config = unet.to_dict() if hasattr(unet, "to_dict") else dict(unet)
        with torch.device("meta"):  # names and widths only, no memory
            unet = UNet2DConditionModel.from_config(config)
    layers: dict[str, int] = {}
    widths: set[int] = set()
    for name in getattr(unet, "attn_processors", {}):
        if name.endswith("attn2.processor") and "motion_modules" not in name:
            attention = unet.get_submodule(name.removesuffix(".processor"))
            layers[name] = int(attention.to_k.out_features)
            widths.add(int(attention.to_k.in_features))
    if not layers or len(widths) != 1:
        raise ValueError(
            f"{type(unet).__name__} has no text cross-attention of the Stable Diffusion kind "
            "(attn2 in its transformer blocks): the SSR-Encoder cannot be attached to it."
        )
    return layers, widths.pop()


def _check(config: SSRConfig) -> None:
    for name in ("vision_dim", "text_dim", "heads", "head_dim"):
        _positive_int(name, getattr(config, name))
    for name, allowed in (
        ("variant", get_args(Variant)),
        ("init_layers", ("copy", "random")),
        ("value_projection", get_args(ValueProjection)),
        ("reg_form", get_args(RegForm)),
        ("mask_form", get_args(MaskForm)),
        ("unconditional", get_args(Unconditional)),
    ):
        if getattr(config, name) not in allowed:
            raise ValueError(
                f"{name} must be one of {', '.join(allowed)}, not {getattr(config, name)!r}."
            )
    for name in ("norm_eps", "mask_weight"):
        value = getattr(config, name)
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not 0 < value < float("inf")
        ):
            raise ValueError(f"{name} must be a positive number, not {value!r}.")
    for name in ("token_norm", "mask_cls", "start_token"):
        if not isinstance(getattr(config, name), bool):
            raise ValueError(f"{name} must be true or false, not {getattr(config, name)!r}.")
    if config.value_projection == "direct" and config.text_dim % config.heads:
        raise ValueError(
            f"a direct value_projection needs heads that divide the text's width: {config.heads} "
            f"and {config.text_dim}."
        )
    if not config.depths:
        raise ValueError("depths must name at least one layer of the vision model.")
    for depth in config.depths:
        _positive_int("depths", depth)
    if list(config.depths) != sorted(set(config.depths)):
        raise ValueError(f"depths must rise without repeats, not {list(config.depths)}.")
    if not isinstance(config.layers, dict) or not config.layers:
        raise ValueError("layers must map the U-Net's cross-attention names to their widths.")
    for name, width in config.layers.items():
        if not isinstance(name, str) or not _LAYER.fullmatch(name):
            raise ValueError(f"layers[{name!r}] is no text cross-attention (….attn2.processor).")
        _positive_int(f"layers[{name!r}]", width)
    if len({layer_key(name) for name in config.layers}) != len(config.layers):
        raise ValueError("two names in layers differ by dots alone.")


def _positive_int(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive whole number, not {value!r}.")
    if value > _LARGEST:
        raise ValueError(f"{name} must be at most {_LARGEST}, not {value}.")
