"""Detail-preserving subject encoder (Eq. 3), and the adapter that owns every trainable tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from ssr_model.aligner import TokenToPatchAligner, split_heads
from ssr_model.config import SSRConfig, cross_attention_layers, layer_key


@dataclass
class SubjectEmbedding:
    """What the subject encoder says of a subject."""

    tokens: Tensor
    """c_s: (B, K * N_q, D), scales concatenated over tokens, shallowest first."""
    attention: Tensor
    """A: (B, heads, N_q, N_i), the CLS token first."""
    z_q: Tensor
    """The query's states that made them, (B, N_q, D): all, or all but the start token's."""

    @property
    def per_scale(self) -> Tensor:
        """c_s^k: (B, K, N_q, D)."""
        return self.tokens.unflatten(1, (-1, self.attention.shape[2]))


class SubjectEncoder(nn.Module):
    """c_s^k = A V_k with V_k = W^V_k z_k: the aligner's map applied to every scale.

    `to_v` is W^V_k, or its first factor where `to_out` is the second (as released, which also has a
    LayerNorm over the tokens of all scales).
    """

    def __init__(self, config: SSRConfig) -> None:
        super().__init__()
        self.config = config
        self.aligner = TokenToPatchAligner(config)
        factored = config.value_projection == "factored"
        width = config.inner_dim if factored else config.text_dim

        def per_scale(inputs: int, outputs: int) -> nn.ModuleDict:
            return nn.ModuleDict(
                {str(d): nn.Linear(inputs, outputs, bias=False) for d in config.depths}
            )

        self.to_v = per_scale(config.vision_dim, width)
        self.to_out = per_scale(width, config.text_dim) if factored else nn.ModuleDict()
        norm = nn.LayerNorm(config.text_dim, eps=config.norm_eps)
        self.norm: nn.Module = norm if config.token_norm else nn.Identity()

    @property
    def projections(self) -> list[nn.ModuleDict]:
        """W^V_k of all scales, in one factor or two, by depth."""
        return [self.to_v, self.to_out] if len(self.to_out) else [self.to_v]

    def forward(
        self, z_q: Tensor, features: Mapping[int, Tensor], mask: Tensor | None = None
    ) -> SubjectEmbedding:
        """Embed the subject that `z_q` (and `mask`) selects.

        z_q: (B, N_q, text width), the text encoder's last hidden state; the null text for a mask
        query.
        features: {depth: (B, N_i, vision width)}; any of the config's depths, the last (the keys)
        among them.
        mask: (B, N_i) in [0, 1], see `TokenToPatchAligner`.
        """
        depths = self.check_depths(list(features))
        if not self.config.start_token:
            z_q = z_q[:, 1:]
        attention = self.aligner(z_q, features[depths[-1]], mask)
        scales = []
        for depth in depths:
            value = split_heads(self.to_v[str(depth)](features[depth]), self.config.heads)
            merged = (attention.to(value.dtype) @ value).transpose(1, 2).flatten(2)
            scales.append(self.to_out[str(depth)](merged) if len(self.to_out) else merged)
        tokens = self.norm(torch.cat(scales, dim=1))
        return SubjectEmbedding(tokens=tokens, attention=attention, z_q=z_q)

    def check_depths(self, depths: Sequence[int]) -> list[int]:
        """Scales to use, shallowest first: any of the config's with the last, which gives the
        keys; others are a ValueError.
        """
        known = self.config.depths
        strange = [depth for depth in depths if depth not in known]
        if strange:
            raise ValueError(
                f"depth {strange[0]} is not one of the encoder's scales {list(known)}."
            )
        if known[-1] not in depths:
            raise ValueError(f"features lack depth {known[-1]}, which the keys are made from.")
        return [depth for depth in known if depth in depths]

    def start_new_scales_from(self, depth: int) -> None:
        """Stage 2: the projections of every other scale start as those of `depth` (stage 1's)."""
        for projections in self.projections:
            source = projections[str(depth)].state_dict()
            for key, projection in projections.items():
                if key != str(depth):
                    projection.load_state_dict(source)


class SubjectKeyValue(nn.Module):
    """K_S and V_S of one cross-attention layer of the U-Net (Eq. 4)."""

    def __init__(self, token_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.to_k = nn.Linear(token_dim, hidden_dim, bias=False)
        self.to_v = nn.Linear(token_dim, hidden_dim, bias=False)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, D) -> keys and values, each (B, T, hidden)."""
        return self.to_k(tokens), self.to_v(tokens)


class SSRAdapter(nn.Module):
    """Every trainable tensor of the method, and nothing of the frozen models.

    `encoder.*` is the subject encoder; `layers.<name>.to_k|to_v` belong to the U-Net's
    cross-attention layers, the dots of their names replaced by underscores.
    """

    def __init__(self, config: SSRConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = SubjectEncoder(config)
        self.layers = nn.ModuleDict(
            {
                layer_key(name): SubjectKeyValue(config.text_dim, dim)
                for name, dim in config.layers.items()
            }
        )

    def init_from_unet(self, unet: nn.Module) -> None:
        """Start K_S, V_S as the variant says: copies of the U-Net's text K, V (`paper`), or at
        random.

        The copies are tensors of their own; the U-Net is not changed.
        """
        check_layers(self.config, unet)
        if self.config.init_layers != "copy":
            return
        for name in self.config.layers:
            attention = unet.get_submodule(name.removesuffix(".processor"))
            layer = self.layers[layer_key(name)]
            for projection in ("to_k", "to_v"):
                text = attention.get_submodule(projection)
                text = getattr(text, "base_layer", text)  # under a LoRA: the base weight
                layer.get_submodule(projection).load_state_dict({"weight": text.weight})

    def by_layer(self) -> dict[str, SubjectKeyValue]:
        """{processor name: K_S and V_S of that layer}, in the U-Net's order."""
        return {
            name: cast(SubjectKeyValue, self.layers[layer_key(name)]) for name in self.config.layers
        }

    def keys_values(self, tokens: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Subject tokens (B, T, D) -> {processor name: (keys, values)}, each (B, T, hidden of the
        layer).
        """
        return {name: layer(tokens) for name, layer in self.by_layer().items()}

    def train_scales(self, depths: Sequence[int]) -> None:
        """Let gradients reach the given scales only (stage 1: the last); the rest of the adapter
        stays trainable.

        DistributedDataParallel waits for every tensor that requires a gradient, so the unused
        scales must not.
        """
        strange = [depth for depth in depths if depth not in self.config.depths]
        if strange or not depths:
            raise ValueError(
                f"scales to train must be among {list(self.config.depths)}, not {list(depths)}."
            )
        self.requires_grad_(True)
        for projections in self.encoder.projections:
            for key, projection in projections.items():
                projection.requires_grad_(int(key) in depths)


def check_layers(config: SSRConfig, unet: nn.Module) -> None:
    """Refuse a U-Net whose text cross-attention is not the one that the adapter was made for."""
    layers, width = cross_attention_layers(unet)
    if width != config.text_dim:
        raise ValueError(
            f"this U-Net's cross-attention is {width} wide, the SSR-Encoder's subject tokens "
            f"{config.text_dim}: it was trained for another base model."
        )
    if layers != config.layers:
        odd = sorted(set(layers.items()) ^ set(config.layers.items()))
        raise ValueError(
            f"this U-Net's {len(layers)} cross-attention layers differ from the SSR-Encoder's "
            f"{len(config.layers)} at {odd[0][0]}: it was trained for another base model."
        )
