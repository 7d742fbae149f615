"""IP-Adapter (arXiv 2308.06721) through diffusers' own loader: the whole reference conditions.

WEIGHTS is one of
- the hub id or the local folder of a repository laid out as h94/IP-Adapter: of it
  `models/ip-adapter_sd15.safetensors` is taken, or the .bin beside it;
- one file of such a repository, `h94/IP-Adapter/models/ip-adapter-plus_sd15.safetensors`, or one
  local file.
The image encoder that the weights were trained with lies beside them, in `image_encoder/`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from pipeline import models
from pipeline.config import EvaluateConfig
from pipeline.errors import UserError
from pipeline.evaluation.benches import Bench, Request
from pipeline.evaluation.methods.method import Drawn
from pipeline.evaluation.methods.shared import (
    denoising,
    in_batches,
    refuse_changed,
    whole_images,
)
from pipeline.generation.sampler import denoise, load_base

if TYPE_CHECKING:
    from torch import Tensor

FILES = ("models/ip-adapter_sd15.safetensors", "models/ip-adapter_sd15.bin")
"""What is taken of a repository, the first that is there."""
ENCODER = "image_encoder"

_KINDS = ("proj.weight", "proj.3.weight", "latents")
"""A tensor by which diffusers tells the kinds of image projection that take CLIP's output: plain,
full-face, plus. The others (FaceID) take the embeddings of a face recogniser."""

State = dict[str, dict[str, "Tensor"]]


class IPAdapter:
    """Stable Diffusion with an IP-Adapter; its scale is cfg.ip_adapter_scale.

    It has no selection: of each reference of a request the first image conditions, as much of it
    as CLIP sees (the central square). Several references are several images of one adapter, whose
    tokens are concatenated.
    """

    native, learns = True, False
    title = "IP-Adapter"

    def __init__(self, name: str, cfg: EvaluateConfig, weights: str) -> None:
        self.name, self.cfg = name, cfg
        self._weights = weights
        self.settings: dict[str, Any] = {
            "method": "ip-adapter",
            **identities(find_weights(weights)),
            "scale": cfg.ip_adapter_scale,
            **denoising(cfg),
        }
        self._pipe: Any = None

    def check(self, bench: Bench) -> None: ...

    def open(self) -> None:
        if self._pipe is None:
            file = find_weights(self._weights)  # here: a worker has a hub cache of its own
            refuse_changed(self.name, str(file), self.settings, identities(file))
            pipe = load_base(self.cfg)
            attach(pipe, file)
            pipe.set_ip_adapter_scale(self.cfg.ip_adapter_scale)
            self._pipe = pipe

    def close(self) -> None:
        if self._pipe is not None:
            detach(self._pipe)
            self._pipe = None

    def __call__(self, requests: Sequence[Request]) -> list[Drawn]:
        pictures = in_batches(
            requests, self.cfg.batch_size, self._draw, lambda request: len(whole_images(request))
        )
        return [Drawn(picture) for picture in pictures]

    def _draw(self, requests: Sequence[Request]) -> list[Image.Image]:
        embeds = embed(self._pipe, [whole_images(r) for r in requests], self.cfg.guidance > 1)
        prompts, seeds = [r.prompt for r in requests], [r.seed for r in requests]
        return denoise(self._pipe, self.cfg, prompts, seeds, ip_adapter_image_embeds=[embeds])


def find_weights(weights: str) -> Path:
    """The local file of the weights (see above), from the hub where they are not here.

    Raises UserError where there is no such file, or no image encoder beside it.
    """
    path = Path(weights).expanduser()
    if path.is_dir():
        files = [path / name for name in FILES]
    elif path.is_file():
        files = [path]
    else:
        files = _fetch(weights)
    found = [file for file in files if file.is_file()]
    if not found:
        raise UserError(
            f"ip-adapter: {weights} holds neither {FILES[0]} nor the .bin; name one file of it"
        )
    if not (found[0].parent / ENCODER / "config.json").is_file():
        raise UserError(
            f"ip-adapter: {found[0]}: no {ENCODER}/ beside it; put the CLIP there that it was "
            "trained with (h94/IP-Adapter has it in models/image_encoder)"
        )
    return found[0]


def identities(file: Path) -> dict[str, Any]:
    """What the weights are, and the image encoder beside them."""
    return {
        "weights": {"name": file.name, "sha256": models.file_sha256(str(file))},
        "image_encoder": models.identity(str(file.parent / ENCODER))["sha256"],
    }


def _fetch(weights: str) -> list[Path]:
    owner, _, rest = weights.partition("/")
    name, _, file = rest.partition("/")
    if not owner.strip("~.") or not name:
        raise UserError(f"ip-adapter: {weights}: no such file or folder, and not a hub id")
    from huggingface_hub import snapshot_download

    files = (file,) if file else FILES
    beside = Path(files[0]).parent / ENCODER
    wanted = [*files, f"{beside}/config.json", f"{beside}/model.safetensors"]
    try:
        folder = snapshot_download(f"{owner}/{name}", allow_patterns=wanted)
    except (OSError, ValueError) as error:
        line = " ".join(str(error).split())[:240]
        raise UserError(f"ip-adapter: cannot fetch {weights}: {line}") from error
    return [Path(folder) / each for each in files]


def attach(pipe: Any, file: Path) -> None:
    """Load the adapter and its image encoder into a pipeline of the base that it was trained on.

    Raises UserError, and leaves the pipeline without an adapter, where they do not fit.
    """
    from transformers import CLIPImageProcessorPil

    state = read_weights(file)
    _check_layers(file, state["ip_adapter"], pipe.unet)
    encoder = models.load_image_embedder(str(file.parent / ENCODER))
    # What diffusers would make of the encoder's own size, in the form whose pixels are known.
    side = encoder.config.image_size
    square = {"height": side, "width": side}
    processor = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=square)
    pipe.register_modules(image_encoder=encoder.to(pipe.device), feature_extractor=processor)
    pipe.prepare_ip_adapter_image_embeds = _as_given
    try:
        pipe.load_ip_adapter(state, subfolder="", weight_name=file.name)
        _try(pipe)
    except (ValueError, KeyError, RuntimeError) as error:
        detach(pipe)
        line = " ".join(str(error).split())[:200]
        raise UserError(
            f"ip-adapter: {file} does not fit the base model and the encoder beside it: {line}"
        ) from error


def detach(pipe: Any) -> None:
    """Give the pipeline back without the adapter."""
    pipe.unload_ip_adapter()
    pipe.register_modules(feature_extractor=None)
    del pipe.prepare_ip_adapter_image_embeds


def embed(pipe: Any, images: Sequence[Sequence[Image.Image]], guided: bool) -> Tensor:
    """Reference images of n requests, m each, as the adapter takes them: (n, m, ...), of the image
    encoder; with guidance (2 n, m, ...), those of no image first.
    """
    import torch

    flat = [image for each in images for image in each]
    layers = pipe.unet.encoder_hid_proj.image_projection_layers
    hidden = type(layers[0]).__name__ != "ImageProjection"  # which alone takes the embedding
    with torch.no_grad():
        some, none = pipe.encode_image(flat, pipe.device, 1, hidden)
    both = [none, some] if guided else [some]
    return torch.cat([each.unflatten(0, (len(images), -1)) for each in both])


def _as_given(_: Any, embeds: list[Tensor], *__: Any) -> list[Tensor]:
    """In the place of the pipeline's own step, which repeats the embeddings of a batch once per
    prompt and so mixes their references (huggingface/diffusers#9813).
    """
    return embeds


def _try(pipe: Any) -> None:
    """One picture through encoder and projection; tokens that the U-Net cannot take, ValueError."""
    import torch

    width = pipe.unet.config.cross_attention_dim
    with torch.no_grad():
        (tokens,) = pipe.unet.encoder_hid_proj([embed(pipe, [[Image.new("RGB", (8, 8))]], False)])
    if tokens.shape[-1] != width:
        raise ValueError(f"its tokens are {tokens.shape[-1]} wide, the base model's text {width}.")


def read_weights(file: Path) -> State:
    """`image_proj` and `ip_adapter`, read without running a pickle. Raises UserError."""
    import torch
    from safetensors.torch import load_file

    try:
        if file.suffix == ".safetensors":
            state: Any = {"image_proj": {}, "ip_adapter": {}}
            for key, tensor in load_file(file).items():
                part, _, name = key.partition(".")
                state.setdefault(part, {})[name] = tensor
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged or hostile file makes the reader do
        reason = f"{type(error).__name__}: {error}".split("\n")[0][:160]
        raise UserError(f"ip-adapter: {file} cannot be read as weights: {reason}") from None
    if not _is_state(state):
        raise UserError(
            f"ip-adapter: {file} is not an IP-Adapter: its tensors are not image_proj.* and "
            "ip_adapter.*, finite"
        )
    if not any(kind in state["image_proj"] for kind in _KINDS):
        raise UserError(
            f"ip-adapter: {file} takes no picture (FaceID takes the embedding of a face); use "
            "ip-adapter, ip-adapter-plus or ip-adapter-full-face"
        )
    return state  # type: ignore[no-any-return]


def _is_state(state: Any) -> bool:
    import torch

    if not isinstance(state, dict) or set(state) != {"image_proj", "ip_adapter"}:
        return False
    return all(
        isinstance(part, dict)
        and part
        and all(
            isinstance(name, str)
            and isinstance(tensor, torch.Tensor)
            and tensor.layout is torch.strided
            and tensor.is_floating_point()
            and bool(tensor.isfinite().all())
            for name, tensor in part.items()
        )
        for part in state.values()
    )


def _check_layers(file: Path, layers: Mapping[str, Tensor], unet: Any) -> None:
    """Refuse weights of another base: keys and values for other layers, or of other widths."""
    crossing = [name for name in unet.attn_processors if not name.endswith("attn1.processor")]
    expected: dict[str, tuple[int, ...]] = {}
    for i, name in enumerate(crossing):
        shape = unet.get_submodule(name.removesuffix(".processor")).to_k.weight.shape
        expected |= {f"{2 * i + 1}.to_{part}_ip.weight": tuple(shape) for part in "kv"}
    found = {name: tuple(tensor.shape) for name, tensor in layers.items()}
    if found != expected:
        odd = min(set(found.items()) ^ set(expected.items()))[0]
        raise UserError(
            f"ip-adapter: {file} was trained on another base model: {odd[:80]} is "
            f"{found.get(odd, 'missing')}, and {expected.get(odd, 'nothing')} by models.base"
        )
