"""IP-Adapter: tiny real weights in the published layout, through diffusers' loader."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from pipeline import models
from pipeline.errors import UserError
from pipeline.evaluation.methods import make_methods
from pipeline.evaluation.methods.ip_adapter import IPAdapter
from pipeline.evaluation.methods.text_only import TextOnly
from tests.pipeline.evaluation.rivals import (
    NOISE,
    apart,
    draw,
    of_one_photo,
    of_two,
    requests,
    settings,
)

EMBEDDING, HIDDEN, TOKENS = 24, 32, 4
State = dict[str, dict[str, Tensor]]


def write_encoder(folder: Path) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(
        hidden_size=HIDDEN,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
        projection_dim=EMBEDDING,
        initializer_range=0.2,
    )
    torch.manual_seed(6)
    CLIPVisionModelWithProjection(config).eval().save_pretrained(folder / "image_encoder")


def layers(unet: Any) -> dict[str, Tensor]:
    """to_k_ip and to_v_ip of the U-Net's cross-attentions, counted as published: 1, 3, 5, ..."""
    crossing = [name for name in unet.attn_processors if "attn2" in name]
    made = {}
    for i, name in enumerate(crossing):
        shape = unet.get_submodule(name.removesuffix(".processor")).to_k.weight.shape
        for part in "kv":
            made[f"{2 * i + 1}.to_{part}_ip.weight"] = torch.randn(shape) * 0.5
    return made


def plain_projection(width: int) -> dict[str, Tensor]:
    return {
        "proj.weight": torch.randn(TOKENS * width, EMBEDDING),
        "proj.bias": torch.zeros(TOKENS * width),
        "norm.weight": torch.ones(width),
        "norm.bias": torch.zeros(width),
    }


def plus_projection(width: int, dim: int = 16, inner: int = 64) -> dict[str, Tensor]:
    """The Perceiver of ip-adapter-plus, four layers deep, as published."""
    made = {
        "latents": torch.randn(1, TOKENS, dim),
        "proj_in.weight": torch.randn(dim, HIDDEN),
        "proj_in.bias": torch.zeros(dim),
        "proj_out.weight": torch.randn(width, dim),
        "proj_out.bias": torch.zeros(width),
        "norm_out.weight": torch.ones(width),
        "norm_out.bias": torch.zeros(width),
    }
    for i in range(4):
        for norm in (f"layers.{i}.0.norm1", f"layers.{i}.0.norm2", f"layers.{i}.1.0"):
            made |= {f"{norm}.weight": torch.ones(dim), f"{norm}.bias": torch.zeros(dim)}
        made[f"layers.{i}.0.to_q.weight"] = torch.randn(inner, dim) / 4
        made[f"layers.{i}.0.to_kv.weight"] = torch.randn(2 * inner, dim) / 4
        made[f"layers.{i}.0.to_out.weight"] = torch.randn(dim, inner) / 8
        made[f"layers.{i}.1.1.weight"] = torch.randn(4 * dim, dim) / 4
        made[f"layers.{i}.1.3.weight"] = torch.randn(dim, 4 * dim) / 8
    return made


def save(state: State, file: Path) -> Path:
    """As published: one flat safetensors file, or a pickled dict of two dicts."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".bin":
        torch.save(state, file)
    else:
        flat = {f"{part}.{name}": t for part, each in state.items() for name, t in each.items()}
        save_file(flat, file)
    return file


@pytest.fixture(scope="module")
def plain(tiny_models: Path) -> State:
    unet = models.load_unet(str(tiny_models / "sd"))
    torch.manual_seed(7)
    width = unet.config.cross_attention_dim
    return {"image_proj": plain_projection(width), "ip_adapter": layers(unet)}


@pytest.fixture(scope="module")
def repository(plain: State, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder laid out as h94/IP-Adapter."""
    folder = tmp_path_factory.mktemp("ip-adapter")
    save(plain, folder / "models/ip-adapter_sd15.safetensors")
    write_encoder(folder / "models")
    return folder


@pytest.fixture(scope="module")
def opened(repository: Path, tiny_models: Path) -> Iterator[IPAdapter]:
    method = IPAdapter("ip-adapter", settings(tiny_models), str(repository))
    method.open()
    yield method
    method.close()


def test_scale_zero_is_text_only_and_one_is_not(opened: IPAdapter, tiny_models: Path) -> None:
    asked = requests(2)
    floor = TextOnly("text-only", opened.cfg)
    floor.open()
    plain_pictures = draw(floor, asked)
    assert apart(draw(opened, asked), plain_pictures) > 10
    opened._pipe.set_ip_adapter_scale(0.0)
    try:
        assert apart(draw(opened, asked), plain_pictures) == 0
    finally:
        opened._pipe.set_ip_adapter_scale(1.0)
    cfg = settings(tiny_models, ip_adapter_scale=0.0)
    unscaled = IPAdapter("zero", cfg, opened._weights)
    unscaled.open()
    assert apart(draw(unscaled, asked), plain_pictures) == 0
    assert unscaled.settings != opened.settings


def test_every_picture_of_a_batch_sees_its_own_reference(opened: IPAdapter) -> None:
    """diffusers' own preparation of embeddings mixes them."""
    asked = requests(3)
    together = draw(opened, asked)
    alone = [draw(opened, [each])[0] for each in asked]
    for picture, single in zip(together, alone, strict=True):
        assert apart(picture, single) <= NOISE
    other = requests(3)[0]
    swapped = type(other)(other.key, asked[1].selections, other.prompt, other.seed)
    assert apart(draw(opened, [swapped])[0], alone[0]) > 10, "the reference matters"


def test_two_references_condition_and_one_photo_does_once(opened: IPAdapter) -> None:
    first, second = requests(2)
    one, both = draw(opened, [first, of_two(first, second)])
    assert apart(one, both) > 10
    assert apart(draw(opened, [of_one_photo(first)])[0], one) <= NOISE
    back = of_two(second, first)
    turned = type(back)(back.key, back.selections, first.prompt, first.seed)
    assert apart(draw(opened, [turned])[0], both) <= NOISE, "attention knows no order"


def test_the_pipelines_own_call_on_one_picture_draws_the_same(opened: IPAdapter) -> None:
    """A batch of one, which diffusers prepares rightly: through its own `ip_adapter_image`."""
    (asked,) = requests(1)
    pipe, ours = opened._pipe, draw(opened, [asked])[0]
    prepared = pipe.__dict__.pop("prepare_ip_adapter_image_embeds")
    try:
        picture = pipe(
            asked.prompt,
            ip_adapter_image=asked.reference.image,
            num_inference_steps=opened.cfg.steps,
            guidance_scale=opened.cfg.guidance,
            generator=torch.Generator("cpu").manual_seed(asked.seed),
            output_type="np",
        ).images[0]
    finally:
        pipe.prepare_ip_adapter_image_embeds = prepared
    assert apart(ours, (picture * 255).round().astype("int16")) <= NOISE


def test_without_guidance(repository: Path, tiny_models: Path) -> None:
    method = IPAdapter("unguided", settings(tiny_models, guidance=1.0), str(repository))
    method.open()
    asked = requests(2)
    assert apart(draw(method, asked)[1], draw(method, asked[1:])[0]) <= NOISE


def test_bin_and_one_file_are_read_alike(
    opened: IPAdapter, plain: State, tiny_models: Path, tmp_path: Path
) -> None:
    save(plain, tmp_path / "models/ip-adapter_sd15.bin")
    write_encoder(tmp_path / "models")
    asked = requests(1)
    for weights in (tmp_path, tmp_path / "models/ip-adapter_sd15.bin"):
        (made,) = make_methods(settings(tiny_models, methods=[f"bin=ip-adapter@{weights}"]))
        method = pickle.loads(pickle.dumps(made))  # noqa: S301 (our own, as Ray sends it)
        method.open()
        assert apart(draw(method, asked), draw(opened, asked)) == 0


def test_plus(opened: IPAdapter, plain: State, tiny_models: Path, tmp_path: Path) -> None:
    """Its projection takes the encoder's hidden states."""
    width = plain["image_proj"]["norm.weight"].shape[0]
    state = {**plain, "image_proj": plus_projection(width)}
    file = save(state, tmp_path / "ip-adapter-plus_sd15.safetensors")
    write_encoder(tmp_path)
    method = IPAdapter("plus", settings(tiny_models), str(file))
    method.open()
    asked = requests(2)
    together = draw(method, asked)
    assert apart(together[1], draw(method, asked[1:])[0]) <= NOISE
    assert apart(together, draw(opened, asked)) > 10


def test_the_pipeline_is_given_back(repository: Path, tiny_models: Path) -> None:
    cfg = settings(tiny_models)
    method, floor = IPAdapter("ip-adapter", cfg, str(repository)), TextOnly("text-only", cfg)
    method.open()
    method.open()  # once is enough
    pipe = method._pipe
    method.close()
    method.close()
    floor.open()
    asked, plain_pipe = requests(1), floor._pipe
    assert method._pipe is None
    assert pipe.image_encoder is None and pipe.feature_extractor is None
    assert pipe.unet.encoder_hid_proj is None and "prepare_ip_adapter_image_embeds" not in vars(
        pipe
    )
    ours, theirs = pipe.unet.state_dict(), plain_pipe.unet.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    before = draw(floor, asked)
    floor._pipe = pipe
    assert apart(draw(floor, asked), before) == 0


def test_a_worker_finds_the_weights_in_its_own_cache(
    repository: Path, plain: State, tiny_models: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """Of a hub id the driver's place is none of the worker's; what lies there must be the same."""
    here, there = tmp_path / "driver", tmp_path / "worker"
    for place in (here, there):
        shutil.copytree(repository, place)
    cache = {"place": here}
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(cache["place"]))
    sent = pickle.dumps(IPAdapter("ip", settings(tiny_models), "h94/IP-Adapter"))
    shutil.rmtree(here)
    cache["place"] = there
    method: IPAdapter = pickle.loads(sent)  # noqa: S301 (our own, as Ray sends it)
    method.open()
    assert len(draw(method, requests(1))) == 1
    method.close()
    other = {**plain, "ip_adapter": {k: t + 1 for k, t in plain["ip_adapter"].items()}}
    save(other, there / "models/ip-adapter_sd15.safetensors")
    with pytest.raises(UserError, match=r"ip: .* is not what it was when the eval") as caught:
        method.open()
    assert "\n" not in str(caught.value) and method._pipe is None
    save(plain, there / "models/ip-adapter_sd15.safetensors")
    config = there / "models/image_encoder/config.json"
    config.write_text(config.read_text() + " ")
    with pytest.raises(UserError, match="is not what it was"):
        method.open()


def test_its_scale_is_its_own(repository: Path, tiny_models: Path) -> None:
    def told(**chosen: float) -> Any:
        return IPAdapter("ip", settings(tiny_models, **chosen), str(repository)).settings

    assert told(scale=0.5) == told() != told(ip_adapter_scale=0.5)


def refuse(weights: object, tiny_models: Path) -> str:
    with pytest.raises(UserError) as caught:
        IPAdapter("ip-adapter", settings(tiny_models), str(weights)).open()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_does_not_fit_is_one_line(plain: State, tiny_models: Path, tmp_path: Path) -> None:
    write_encoder(tmp_path)
    k = "1.to_k_ip.weight"

    def with_layers(change: dict[str, Tensor]) -> Path:
        state = {**plain, "ip_adapter": {**plain["ip_adapter"], **change}}
        return save(state, tmp_path / "odd.safetensors")

    wide = with_layers({k: torch.randn(640, 2048)})
    assert "trained on another base model: 1.to_k_ip.weight is (640, 2048)" in refuse(
        wide, tiny_models
    )
    more = with_layers({"99.to_k_ip.weight": torch.randn(16, 32)})
    assert "99.to_k_ip.weight is (16, 32), and nothing" in refuse(more, tiny_models)
    assert "finite" in refuse(with_layers({k: plain["ip_adapter"][k] * torch.nan}), tiny_models)

    def with_projection(projection: dict[str, Tensor]) -> Path:
        return save({**plain, "image_proj": projection}, tmp_path / "odd.bin")

    face = {"norm.weight": torch.ones(32), "proj.0.weight": torch.ones(8, 8)}
    assert "FaceID" in refuse(with_projection(face), tiny_models)
    odd_width = plain_projection(plain["image_proj"]["norm.weight"].shape[0] // 2)
    assert "wide" in refuse(with_projection(odd_width), tiny_models)
    blind = {**plain["image_proj"], "proj.weight": plain["image_proj"]["proj.weight"][:, :5]}
    assert "the encoder beside it" in refuse(with_projection(blind), tiny_models)
    lacking = {"proj.weight": plain["image_proj"]["proj.weight"]}
    assert "the encoder beside it" in refuse(with_projection(lacking), tiny_models)


class _Evil:
    def __reduce__(self) -> Any:
        return (open, ("ran", "w"))


def test_hostile_files_are_one_line(
    plain: State, tiny_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_encoder(tmp_path)
    torch.save({**plain, "more": _Evil()}, tmp_path / "evil.bin")
    assert "cannot be read as weights" in refuse(tmp_path / "evil.bin", tiny_models)
    assert not (tmp_path / "ran").exists()
    for name in ("noise.bin", "noise.safetensors"):
        (tmp_path / name).write_bytes(b"\x80\x02junk" * 50)
        assert "cannot be read as weights" in refuse(tmp_path / name, tiny_models)
    torch.save([1, 2], tmp_path / "list.bin")
    assert "is not an IP-Adapter" in refuse(tmp_path / "list.bin", tiny_models)


def test_what_is_not_there_is_one_line(plain: State, tiny_models: Path, tmp_path: Path) -> None:
    assert "neither models/ip-adapter_sd15" in refuse(tmp_path, tiny_models)
    file = save(plain, tmp_path / "models/ip-adapter_sd15.safetensors")
    assert "no image_encoder/ beside it" in refuse(tmp_path, tiny_models)
    write_encoder(tmp_path / "models")
    (file.parent / "image_encoder/model.safetensors").unlink()
    assert "no weights" in refuse(tmp_path, tiny_models)
    assert "not a hub id" in refuse("./nowhere", tiny_models)
    assert "not a hub id" in refuse("nowhere", tiny_models)
    assert "cannot fetch owner/nowhere" in refuse("owner/nowhere", tiny_models)
    with pytest.raises(UserError, match="ip-adapter needs its weights"):
        make_methods(settings(tiny_models, methods=["ip-adapter"]))
