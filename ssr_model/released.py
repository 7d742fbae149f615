"""The two files of the authors' published weights, read and written.

Both are pickled state dicts. `pytorch_model.bin` is the aligner with the projections of the scales,
counted from the shallowest; `pytorch_model_1.bin` holds K_S, V_S of the U-Net's cross-attention
layers, counted over all its attention processors (1, 3, ..., as self- and cross-attention take
turns) or, in some copies, over the cross-attention layers alone (0, 1, ...).
"""

from __future__ import annotations

import io
import os
import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssr_model.config import VARIANTS, SSRConfig, cross_attention_layers, depths_for, layer_key
from ssr_model.encoder import SSRAdapter
from ssr_model.weights import write_whole

VISION = "openai/clip-vit-large-patch14"
BASE = "stable-diffusion-v1-5/stable-diffusion-v1-5"
HEADS = VARIANTS["released"]["heads"]

_VALUE = re.compile(r"aligner\.processor\.to_v\.(\d{1,3})\.weight")
_LAYER = re.compile(r"(\d{1,3})\.to_([kv])_SSR\.weight")
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_HEADER_BYTES = 1 << 24  # beside the tensors, in a file of the expected ones


def load(
    aligner_path: str | os.PathLike[str],
    layers_path: str | os.PathLike[str],
    vision_config: Any,
    text_dim: int,
    unet: Any,
    heads: int = HEADS,
    mask_weight: float = 1.0,
) -> SSRAdapter:
    """Read both files into an adapter (float32, CPU, eval) of the `released` variant.

    vision_config, text_dim, unet (or its config): of the models that the weights were trained on.
    No pickle is run. A file that is not what it should be is a ValueError of one line.
    """
    layers, _ = cross_attention_layers(unet)
    depth, width = int(vision_config.num_hidden_layers), int(vision_config.hidden_size)
    most = depth * 2 * width * text_dim * torch.float32.itemsize
    aligner = _read(aligner_path, "aligner", most)
    scales = sorted(int(found[1]) for key in aligner if (found := _VALUE.fullmatch(key)))
    if not scales or scales != list(range(len(scales))) or len(scales) > depth:
        raise ValueError(
            f"{aligner_path}: its scales (aligner.processor.to_v.*) are {scales or 'missing'}, not "
            f"0, 1, ... of at most {depth}: it is not a released aligner for this vision model."
        )
    if isinstance(heads, bool) or not isinstance(heads, int) or heads < 1:
        raise ValueError(f"heads must be a positive whole number, not {heads!r}.")
    query = aligner.get("aligner.to_q.weight")
    inner = query.shape[0] if query is not None and query.ndim == 2 else 0
    if not inner or inner % heads:
        raise ValueError(
            f"{aligner_path}: aligner.to_q.weight of {inner} rows does not hold {heads} heads."
        )
    config = SSRConfig(
        vision_dim=width,
        text_dim=text_dim,
        depths=depths_for(depth, len(scales)),
        layers=layers,
        variant="released",
        mask_weight=mask_weight,
        **{**VARIANTS["released"], "heads": heads, "head_dim": inner // heads},
    )
    with torch.device("meta"):
        adapter = SSRAdapter(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in adapter.state_dict().items()}
    names = _aligner_names(config)
    state = _pick(aligner_path, aligner, names, shapes)
    bytes_of_layers = 8 * sum(torch.Size(s).numel() for n, s in shapes.items() if n not in state)
    published = _read(layers_path, "layers", bytes_of_layers)
    indices = sorted({int(found[1]) for key in published if (found := _LAYER.fullmatch(key))})
    state |= _pick(layers_path, published, _layer_names(config, _counted(indices, layers)), shapes)
    adapter.load_state_dict(state, assign=True)
    return adapter.eval()


def save(
    adapter: SSRAdapter,
    aligner_path: str | os.PathLike[str],
    layers_path: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
) -> None:
    """Write both files as published: layers counted over all attention processors.

    dtype: of the stored weights; None = as they are. Each file appears whole or not at all.
    """
    config = adapter.config
    if not config.start_token:
        raise ValueError("the released layout knows no encoder without the query's start token.")
    if config.value_projection != "factored" or not config.token_norm:
        raise ValueError(
            "the released layout has a factored value_projection and a token_norm, which this "
            f"encoder (variant {config.variant}) lacks: use save_pretrained."
        )
    state = {
        name: tensor.detach().to("cpu", dtype) for name, tensor in adapter.state_dict().items()
    }
    odd = range(1, 2 * len(config.layers), 2)
    for path, names in (
        (aligner_path, _aligner_names(config)),
        (layers_path, _layer_names(config, odd)),
    ):
        buffer = io.BytesIO()
        torch.save({theirs: state[ours].clone() for ours, theirs in names.items()}, buffer)
        write_whole(Path(path), buffer.getvalue())


def _aligner_names(config: SSRConfig) -> dict[str, str]:
    """{our name: name in the aligner's file}."""
    names = {
        f"encoder.aligner.{kind}.weight": f"aligner.{kind}.weight" for kind in ("to_q", "to_k")
    }
    for i, depth in enumerate(config.depths):
        for kind in ("to_v", "to_out"):
            names[f"encoder.{kind}.{depth}.weight"] = f"aligner.processor.{kind}.{i}.weight"
    return names | {f"encoder.norm.{kind}": f"norm.{kind}" for kind in ("weight", "bias")}


def _layer_names(config: SSRConfig, indices: Iterable[int]) -> dict[str, str]:
    """{our name: name in the layers' file}; indices: of the layers, in the U-Net's order."""
    return {
        f"layers.{layer_key(name)}.to_{kind}.weight": f"{index}.to_{kind}_SSR.weight"
        for name, index in zip(sorted(config.layers, key=_in_unet), indices, strict=True)
        for kind in ("k", "v")
    }


def _in_unet(name: str) -> tuple[int, list[int]]:
    """A layer's place in diffusers' U-Net, whatever order a config.json was written in."""
    parts = name.split(".")
    blocks = ("down_blocks", "up_blocks", "mid_block")  # as the U-Net registers them
    place = blocks.index(parts[0]) if parts[0] in blocks else len(blocks)
    return place, [int(part) for part in parts if part.isdigit()]


def _counted(found: list[int], layers: Mapping[str, int]) -> range:
    """How a file counts its layers; what is neither way is compared with the first, and refused."""
    count = len(layers)
    return range(count) if found == list(range(count)) else range(1, 2 * count, 2)


def _pick(
    path: str | os.PathLike[str],
    found: Mapping[str, Tensor],
    names: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, Tensor]:
    """The tensors under our names, float32, after names, shapes and values are checked."""
    odd = sorted(set(found) ^ set(names.values()))
    if odd:
        how = "does not belong there" if odd[0] in found else "is missing"
        more = f" ({len(odd)} such names in all)" if len(odd) > 1 else ""
        name = odd[0] if odd[0].isprintable() else repr(odd[0])
        raise ValueError(f"{path}: {name:.200} {how}, by the models given{more}.")
    for ours, theirs in names.items():
        tensor = found[theirs]
        if tensor.dtype not in _DTYPES or tensor.is_meta:
            raise ValueError(f"{path}: {theirs} is {tensor.dtype}, not a float tensor.")
        if tuple(tensor.shape) != shapes[ours]:
            raise ValueError(
                f"{path}: {theirs} is {tuple(tensor.shape)}, and {shapes[ours]} by the models "
                "given: it was trained on others."
            )
        if not tensor.isfinite().all():
            raise ValueError(f"{path}: {theirs} holds NaN or infinite values.")
    # copies: two names of a file may share one tensor, which safetensors would not save
    return {ours: found[theirs].to(torch.float32, copy=True) for ours, theirs in names.items()}


def _read(path: str | os.PathLike[str], what: str, most_bytes: int) -> dict[str, Tensor]:
    """The state dict in a file, read without running its pickle."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file; the released {what} was to be read.")
    if _unpacked_bytes(path) > most_bytes + _HEADER_BYTES:
        raise ValueError(f"{path} is too large to be the released {what} for these models.")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(
            f"{path} is no state dict, or holds more than tensors: it was not read, since reading "
            "could run code of whoever made it."
        ) from None
    except Exception as error:  # whatever a damaged or hostile file makes the reader do
        reason = f"{type(error).__name__}: {error}".split("\n")[0]
        raise ValueError(f"{path} cannot be read as PyTorch weights: {reason}.") from None
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) and value.layout is torch.strided
        for key, value in state.items()
    ):
        raise ValueError(f"{path} is not a state dict of plain tensors.")
    other = "layers" if what == "aligner" else "aligner"
    if any((_LAYER if what == "aligner" else _VALUE).fullmatch(key) for key in state):
        raise ValueError(f"{path} is the released {other}, not the {what}: swap the two paths.")
    return state


def _unpacked_bytes(path: Path) -> int:
    """Bytes of a file, of a zip archive when unpacked: a small one can hold a large one."""
    if not zipfile.is_zipfile(path):
        return path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            return sum(item.file_size for item in archive.infolist())
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} cannot be read as PyTorch weights: {error}.") from None
