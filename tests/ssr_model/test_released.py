"""The authors' two files: read, written, and refused where they are not what they say."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from ssr_model import SSRAdapter, SSRConfig, SSREncoder, Subject, released

ALIGNER, LAYERS = "pytorch_model.bin", "pytorch_model_1.bin"


@pytest.fixture
def ssr(kit: Any, build_ssr: Any) -> SSREncoder:
    return build_ssr(kit.pipe.unet, "released", heads=4, head_dim=8)


@pytest.fixture
def files(ssr: SSREncoder, tmp_path: Path) -> tuple[Path, Path]:
    paths = tmp_path / ALIGNER, tmp_path / LAYERS
    ssr.save_released(*paths)
    return paths


def load(kit: Any, files: tuple[Path, Path], **fields: Any) -> SSREncoder:
    clip, base = str(kit.folder / "clip"), str(kit.folder / "sd")
    return SSREncoder.from_released(*files, **{"vision": clip, "base": base, "heads": 4, **fields})


def change(path: Path, by: Any) -> None:
    state = torch.load(path, weights_only=True)
    by(state)
    torch.save(state, path)


def more_scales(state: dict[str, Any], count: int) -> dict[str, Any]:
    names = [f"aligner.processor.to_v.{i}.weight" for i in range(count)]
    return dict.fromkeys(names, state["aligner.processor.to_v.0.weight"])


@torch.no_grad()
def test_round_trip(kit: Any, ssr: SSREncoder, files: tuple[Path, Path]) -> None:
    aligner, layers = (torch.load(path, weights_only=True) for path in files)
    assert sorted(aligner) == sorted(
        ["aligner.to_q.weight", "aligner.to_k.weight", "norm.weight", "norm.bias"]
        + [f"aligner.processor.{kind}.{i}.weight" for kind in ("to_v", "to_out") for i in range(3)]
    )
    odd = range(1, 2 * len(ssr.config.layers), 2)
    assert list(layers) == [f"{i}.to_{kind}_SSR.weight" for i in odd for kind in ("k", "v")]
    loaded = load(kit, files)
    assert loaded.config == ssr.config
    mine, theirs = ssr.adapter.state_dict(), loaded.adapter.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert loaded.metadata["base_model"] == str(kit.folder / "sd")
    # a loaded pipeline, and a loaded vision model
    pair = (kit.ssr.vision, kit.ssr.image_processor)
    shared = load(kit, files, base=kit.pipe, vision=pair)
    assert shared.queries.encoders == [kit.pipe.text_encoder]
    assert shared.metadata == loaded.metadata  # what was loaded says where from
    shared.attach(kit.pipe)
    given = shared.condition([Subject(kit.image, query="fish")])
    found = kit.latents(**given)
    shared.detach()
    ssr.attach(kit.pipe)
    assert torch.equal(kit.latents(**ssr.condition([Subject(kit.image, query="fish")])), found)
    # and once more through our own files
    folder = files[0].parent / "saved"
    loaded.save_pretrained(folder)
    again = SSREncoder.from_pretrained(folder)
    assert again.config == ssr.config and again.config.variant == "released"
    again.save_released(folder / ALIGNER, folder / LAYERS)
    for path in files:
        before, after = (torch.load(p, weights_only=True) for p in (path, folder / path.name))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_layers_counted_over_the_cross_attention_alone(
    kit: Any, ssr: SSREncoder, files: tuple[Path, Path]
) -> None:
    def count_otherwise(state: dict[str, Any]) -> None:
        for key in list(state):
            index, rest = key.split(".", 1)
            state[f"#{int(index) // 2}.{rest}"] = state.pop(key)
        for key in list(state):
            state[key.removeprefix("#")] = state.pop(key)

    change(files[1], count_otherwise)
    assert "0.to_k_SSR.weight" in torch.load(files[1], weights_only=True)
    loaded = load(kit, files).adapter.state_dict()
    mine = ssr.adapter.state_dict()
    assert all(torch.equal(mine[name], loaded[name]) for name in mine)


@torch.no_grad()
def test_half_precision(kit: Any, ssr: SSREncoder, files: tuple[Path, Path]) -> None:
    ssr.save_released(*files, dtype=torch.float16)
    assert torch.load(files[0], weights_only=True)["norm.weight"].dtype == torch.float16
    loaded = load(kit, files)
    assert {p.dtype for p in loaded.adapter.parameters()} == {torch.float32}
    for name, tensor in ssr.adapter.state_dict().items():
        assert torch.equal(loaded.adapter.state_dict()[name], tensor.half().float())


def test_no_pickle_is_run(kit: Any, files: tuple[Path, Path]) -> None:
    witness = files[0].parent / "witness"

    class Evil:
        def __reduce__(self) -> Any:
            return Path.touch, (witness,)

    for data in (pickle.dumps(Evil()), None):
        if data is None:
            torch.save({"aligner.to_q.weight": Evil()}, files[0])
        else:
            files[0].write_bytes(data)
        with pytest.raises(ValueError, match=r"could run code|cannot be read") as error:
            load(kit, files)
        assert "\n" not in str(error.value) and not witness.exists()


@pytest.mark.parametrize(
    ("which", "by", "message"),
    [
        (0, lambda s: s.pop("norm.bias"), "norm.bias is missing"),
        (0, lambda s: s.update({"unet.x": torch.ones(2)}), "unet.x does not belong there"),
        (0, lambda s: s.pop("aligner.processor.to_v.1.weight"), r"scales .* are \[0, 2\]"),
        (0, lambda s: s.clear(), "scales .* are missing"),
        (0, lambda s: s.update({"aligner.to_q.weight": torch.ones(30, 32)}), "does not hold 4"),
        (0, lambda s: s.update({"aligner.to_k.weight": torch.ones(32, 9)}), r"is \(32, 9\), and"),
        (0, lambda s: s.update({"norm.bias": torch.ones(32, dtype=torch.int64)}), "not a float"),
        (0, lambda s: s["norm.bias"].fill_(float("nan")), "holds NaN"),
        (0, lambda s: s.update({"norm.bias": "text"}), "not a state dict of plain tensors"),
        (0, lambda s: s.update({3: torch.ones(2)}), "not a state dict of plain tensors"),
        (0, lambda s: s.update({"norm.bias": torch.ones(32).to_sparse()}), "plain tensors"),
        (0, lambda s: s.update({"norm.bias": torch.ones(32, dtype=torch.float8_e4m3fn)}), "float8"),
        (0, lambda s: s.update({"a\nb": torch.ones(2)}), r"'a\\nb' does not belong"),
        (
            0,
            lambda s: s.update({f"aligner.processor.to_v.{'9' * 5000}.weight": s["norm.bias"]}),
            "9",
        ),
        (0, lambda s: s.update(more_scales(s, 9)), "of at most 6: it is not"),
        (1, lambda s: s.pop("1.to_k_SSR.weight"), "1.to_k_SSR.weight is missing"),
        (1, lambda s: s.update({"2.to_k_SSR.weight": torch.ones(2)}), "2.to_k_SSR.weight does not"),
        (1, lambda s: s.update({"1.to_k_SSR.weight": torch.ones(2, 2)}), "trained on others"),
        (1, lambda s: s.clear(), r"is missing, by the models given \(14 such names in all\)"),
    ],
)
def test_files_that_are_not_what_they_say(
    kit: Any, files: tuple[Path, Path], which: int, by: Any, message: str
) -> None:
    change(files[which], by)
    with pytest.raises(ValueError, match=message) as error:
        load(kit, files)
    assert str(files[which]) in str(error.value) and "\n" not in str(error.value)


def test_other_files(kit: Any, build_ssr: Any, files: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is the released layers, not the aligner: swap"):
        load(kit, files[::-1])
    with pytest.raises(ValueError, match="no such file"):
        load(kit, (tmp_path / "nothing", files[1]))
    with pytest.raises(ValueError, match="does not hold 5 heads"):
        load(kit, files, heads=5)
    for heads in (0, -1, "4", True):
        with pytest.raises(ValueError, match="heads must be a positive whole number"):
            load(kit, files, heads=heads)
    whole = files[0].read_bytes()
    for data in (b"", whole[:1000], whole[:-200], b"\x80" * 500, b"text"):
        files[0].write_bytes(data)
        with pytest.raises(ValueError, match=ALIGNER) as error:
            load(kit, files)
        assert "\n" not in str(error.value)
    files[0].write_bytes(whole)
    with zipfile.ZipFile(tmp_path / "bomb", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(1 << 26))
    assert (tmp_path / "bomb").stat().st_size < 1 << 20
    with pytest.raises(ValueError, match="too large to be the released aligner"):
        load(kit, (tmp_path / "bomb", files[1]))
    for fields, message in (
        ({"start_token": False}, "no encoder without the query's start token"),
        ({"value_projection": "direct"}, "which this encoder .variant released. lacks"),
        ({"token_norm": False}, "use save_pretrained"),
    ):
        other = build_ssr(kit.pipe.unet, "released", **fields)
        with pytest.raises(ValueError, match=message):
            other.save_released(tmp_path / "a", tmp_path / "b")
    assert not (tmp_path / "a").exists()


def test_names_that_share_a_tensor(kit: Any, files: tuple[Path, Path], tmp_path: Path) -> None:
    change(files[0], lambda s: s.update(more_scales(s, 3)))
    load(kit, files).save_pretrained(tmp_path / "saved")  # safetensors refuses what is shared
    assert (tmp_path / "saved" / "model.safetensors").is_file()


def test_the_order_of_a_config_does_not_matter(
    kit: Any, ssr: SSREncoder, files: tuple[Path, Path], tmp_path: Path
) -> None:
    """config.json may have been sorted by some tool; the file counts as the U-Net does."""
    config = ssr.config.to_dict()
    config["layers"] = dict(sorted(config["layers"].items()))
    assert list(config["layers"]) != list(ssr.config.layers)
    adapter = SSRAdapter(SSRConfig.from_dict(config))
    adapter.load_state_dict(ssr.adapter.state_dict())
    released.save(adapter, tmp_path / "a", tmp_path / "b")
    theirs, ours = (torch.load(p, weights_only=True) for p in (tmp_path / "b", files[1]))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)
