"""An SSR-Encoder on disk: config.json, model.safetensors (trainables alone), README.md."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ssr_model.card import is_hub_id, model_card
from ssr_model.config import SSRConfig
from ssr_model.encoder import SSRAdapter

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
FORMAT = "ssr-encoder-2"
_MAX_CONFIG_BYTES = 1 << 20
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def save_adapter(
    folder: str | os.PathLike[str],
    adapter: SSRAdapter,
    metadata: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write config.json, model.safetensors and the model card into `folder` (made where missing).

    metadata: what the file says of itself (base_model, vision_model, stage, step), stored as text
    beside the variant.
    dtype: of the stored weights; None = as they are. Each file appears whole or not at all.
    """
    from safetensors.torch import save

    if dtype is not None and dtype not in _DTYPES.values():
        raise ValueError(f"weights are stored as float32, float16 or bfloat16, not {dtype}.")
    folder = Path(folder)
    tensors = {
        name: tensor.detach().to("cpu", dtype).contiguous()
        for name, tensor in adapter.state_dict().items()
    }
    said = {key: str(value) for key, value in (metadata or {}).items() if value is not None}
    header = {**said, "format": FORMAT, "variant": adapter.config.variant}
    write_whole(folder / CARD, model_card(adapter, header).encode())
    write_whole(folder / WEIGHTS, save(tensors, metadata=header))
    write_whole(folder / CONFIG, adapter.config.to_json().encode())


def load_adapter(folder: str | os.PathLike[str]) -> tuple[SSRAdapter, dict[str, str]]:
    """Read what `save_adapter` wrote: the adapter (float32, CPU, eval) and the metadata.

    Nothing in the files is executed. A file that is not what it should be is a ValueError of one
    line: names, shapes and dtypes are compared before any memory is taken.
    """
    folder = Path(folder)
    config = read_config(folder)
    path = folder / WEIGHTS
    with torch.device("meta"):
        adapter = SSRAdapter(config)
    expected = {name: tuple(tensor.shape) for name, tensor in adapter.state_dict().items()}
    tensors, metadata = _read_tensors(path, expected)
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{path}: {name} holds NaN or infinite values.")
    adapter.load_state_dict(tensors, assign=True)
    return adapter.eval(), metadata


def stored_dtype(folder: str | os.PathLike[str]) -> torch.dtype:
    """The precision that a checked model's weights are stored in."""
    from safetensors import safe_open

    with safe_open(Path(folder) / WEIGHTS, framework="pt") as file:
        return _DTYPES[file.get_slice(next(iter(file.keys()))).get_dtype()]


def fetch(
    name: str,
    revision: str | None = None,
    patterns: Sequence[str] = (CONFIG, WEIGHTS, CARD),
) -> Path:
    """The local folder of a saved model: a folder as it is, a hub id downloaded.

    patterns: of the hub's files that are wanted; those of a saved SSR-Encoder unless told.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if not is_hub_id(name):
        raise ValueError(f"{name}: no such folder, and not a hub id (owner/name).")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        found = snapshot_download(name, revision=revision, allow_patterns=list(patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{name}: no such folder, and not found on the hub ({reason}).") from None
    return Path(found)


def read_config(folder: str | os.PathLike[str]) -> SSRConfig:
    """The config alone of what `save_adapter` wrote. What is none is a ValueError of one line."""
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise ValueError(f"{path} is missing: this is not a saved SSR-Encoder.")
    if path.stat().st_size > _MAX_CONFIG_BYTES:
        raise ValueError(f"{path} is too large to be an SSR-Encoder's config.")
    try:
        return SSRConfig.from_json(path.read_bytes())
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None


def _read_tensors(
    path: Path, expected: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise ValueError(f"{path} is missing: this is not a saved SSR-Encoder.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            if metadata.get("format") != FORMAT:
                raise ValueError(
                    f"{path}: format {metadata.get('format')!r} instead of {FORMAT!r}; "
                    "it is not an SSR-Encoder that this version saved."
                )
            found = set(file.keys())
            for name in sorted(found ^ set(expected)):
                how = "is missing" if name in expected else "does not belong there"
                raise ValueError(f"{path}: {name} {how}, by the config beside it.")
            for name, shape in expected.items():
                view = file.get_slice(name)
                if view.get_dtype() not in _DTYPES:
                    raise ValueError(f"{path}: {name} is {view.get_dtype()}, not a float tensor.")
                if tuple(view.get_shape()) != shape:
                    raise ValueError(
                        f"{path}: {name} is {tuple(view.get_shape())}, "
                        f"and {shape} by the config beside it."
                    )
            return {name: file.get_tensor(name).float() for name in expected}, metadata
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}.") from None


def write_whole(path: Path, data: bytes) -> None:
    """Write a file that appears whole or not at all; its folder is made where missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
