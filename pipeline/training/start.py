"""What a run begins from where it does not begin from the base model: trained weights (`init`).

They may lie in a folder for from_pretrained (or on the hub), in a checkpoint of another run, or in
the two files that the paper's authors published. Whatever they are, a run keeps its own copy under
train/init, which its workers read: a restart needs the source no more, and the weights' hash is
among the run's settings.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from pipeline import models
from pipeline.config import ModelsConfig
from pipeline.errors import UserError
from pipeline.progress import say
from pipeline.storage import Storage
from pipeline.training.checkpoint import MARKER, read_weights
from pipeline.training.export import adapter_of, write_model
from ssr_model import released
from ssr_model.config import SSRConfig
from ssr_model.encoder import SSRAdapter
from ssr_model.weights import CONFIG, fetch, load_adapter

KEPT = "train/init"
_SOURCE = f"{KEPT}/source.json"
_RELEASED = ("pytorch_model.bin", "pytorch_model_1.bin")
# What must be equal for the weights to mean the same: of the models, and of the run's settings.
_OF_MODELS = ("vision_dim", "text_dim", "layers")
_OF_SETTINGS = ("variant", "value_projection", "heads", "head_dim", "token_norm", "start_token")


@dataclass
class Start:
    """Trained weights to begin from."""

    source: str
    sha256: str
    """Of the tensors, whatever file they came from."""
    adapter: SSRAdapter | None = None
    """None once a run has its copy."""

    @classmethod
    def kept(cls, root: Storage) -> Start | None:
        """What the run under `root` was begun from, if it keeps a copy."""
        return cls(**root.read_json(_SOURCE)) if root.exists(_SOURCE) else None

    def keep(self, root: Storage, base: ModelsConfig) -> None:
        """Copy the weights into the run's root, for its workers."""
        if self.adapter is None:
            return
        root.delete(_SOURCE)
        said = {
            "base_model": models.resolve(base.base),
            "vision_model": models.resolve(base.vision),
            "copy_of": self.source,
        }
        write_model(root.sub(KEPT), self.adapter, said)
        root.write_json(_SOURCE, {"source": self.source, "sha256": self.sha256})
        say(f"training begins from {self.source} (sha256 {self.sha256[:12]})")
        self.adapter = None

    def check(self, shape: SSRConfig) -> None:
        """Raises UserError where the weights are not of a model of this shape, scales apart."""
        assert self.adapter is not None
        theirs, what = self.adapter.config, f"init {self.source}"
        for name in _OF_MODELS:
            if getattr(theirs, name) != getattr(shape, name):
                raise UserError(
                    f"{what} was trained on other models than models.base and models.vision are "
                    f"({name} differs); name those that it was trained on"
                )
        for name in _OF_SETTINGS:
            if (there := getattr(theirs, name)) != (here := getattr(shape, name)):
                raise UserError(
                    f"{what} has {name} {_spelt(there)}, this run {_spelt(here)}; set "
                    f"--{name} {_spelt(there)}, or begin from others"
                )
        if theirs.depths[-1] != shape.depths[-1]:
            raise UserError(
                f"{what} takes its keys from depth {theirs.depths[-1]} of the vision model, the "
                f"shards from {shape.depths[-1]}; begin from others, or without init"
            )


def read(source: str, base: ModelsConfig, heads: int | None) -> Start:
    """Read what `init` names: a folder, s3:// or gs://, or a hub id.

    Args:
        heads: of the aligner, which the released files do not tell; none = the authors'.

    Raises:
        UserError: it is none of these, or damaged.
    """
    try:
        adapter = _read(source, base, heads)
    except ValueError as error:
        raise UserError(f"init: {' '.join(str(error).split())}") from None
    return Start(source, _sha256(adapter.state_dict()), adapter)


def begin(adapter: SSRAdapter, known: Mapping[str, Tensor]) -> None:
    """Put trained weights into an adapter: scales that they lack begin as copies of the last."""
    adapter.load_state_dict(dict(known), strict=False)
    adapter.encoder.start_new_scales_from(adapter.config.depths[-1])
    adapter.load_state_dict(dict(known), strict=False)  # the scales that are known


def read_kept(root: Storage) -> dict[str, Tensor]:
    """The weights that the run under `root` keeps."""
    return dict(_saved(root.sub(KEPT)).state_dict())


def _read(source: str, base: ModelsConfig, heads: int | None) -> SSRAdapter:
    if "://" not in source and not Path(source).expanduser().is_dir():
        return load_adapter(fetch(source))[0]  # a hub id, or refused
    folder = Storage(source)
    if folder.exists(MARKER):
        return adapter_of(read_weights(folder))
    if folder.exists(CONFIG):
        return _saved(folder)
    if all(folder.exists(name) for name in _RELEASED):
        return _released(folder, base, heads)
    inner = f"; name {folder.url('model')}" if folder.exists(f"model/{CONFIG}") else ""
    raise UserError(
        f"init: {folder.url()} is neither a saved SSR-Encoder ({CONFIG}), nor a checkpoint "
        f"({MARKER}), nor released weights ({', '.join(_RELEASED)}){inner}"
    )


def _saved(folder: Storage) -> SSRAdapter:
    if folder.local:
        return load_adapter(folder.url())[0]
    with tempfile.TemporaryDirectory(prefix="ssr-init-") as copy:
        folder.download_tree("", copy)
        return load_adapter(copy)[0]


def _released(folder: Storage, base: ModelsConfig, heads: int | None) -> SSRAdapter:
    aligner, layers = _RELEASED
    with folder.local_copy(aligner) as aligner_path, folder.local_copy(layers) as layers_path:
        return released.load(
            aligner_path,
            layers_path,
            models.load_vision_config(base.vision, base.revision),
            int(models.load_text_config(base.base, base.revision).hidden_size),
            models.load_unet_config(base.base, base.revision),
            heads=released.HEADS if heads is None else heads,
        )


def _sha256(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
        digest.update(tensor.detach().contiguous().numpy().data)
    return digest.hexdigest()


def _spelt(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
