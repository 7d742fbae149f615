"""The documentation's Python runs as it stands; only the demo that comes before is pretended."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from pipeline import models
from pipeline.evaluation.benches.checking import check
from ssr_model import SSRAdapter, SSRConfig
from ssr_model.metrics import METRICS
from ssr_model.weights import save_adapter
from tests.made import write_rows
from tests.sealed import write_features

DOCS = Path(__file__).parents[1] / "docs"


def shorten(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two denoising steps from now on: enough to see that a call runs."""
    call = kind.__call__
    few = {"num_inference_steps": 2}
    monkeypatch.setattr(kind, "__call__", lambda *args, **kw: call(*args, **{**few, **kw}))


@pytest.mark.parametrize("page", [DOCS / "diffusers.md", DOCS.parent / "README.md"])
def test_python_blocks(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block of the page, in order, on the shipped models and a random adapter."""
    base, clip = models.resolve("miniworld:sd"), models.resolve("miniworld:clip")
    unet = models.load_unet(base)
    vision, words = models.load_vision(clip).config, models.load_text_encoder(base).config
    torch.manual_seed(0)
    adapter = SSRAdapter(SSRConfig.from_models(vision, words, unet, heads=2, head_dim=16))
    save_adapter(tmp_path / "runs/mini/model", adapter)
    monkeypatch.chdir(tmp_path)
    text = page.read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S)
    assert blocks
    names: dict[str, object] = {}
    for block in blocks:
        lines = "\n" * text[: text.index(block)].count("\n") + block
        exec(compile(lines, str(page), "exec"), names)
        if block is blocks[0]:
            shorten(type(names["pipe"]), monkeypatch)
    if page.parent == DOCS:
        made = {path.name for path in tmp_path.glob("*.png")}
        assert made == {"fish.png", "where fish.png", "where white boat.png"}
        assert (tmp_path / "my-encoder" / "model.safetensors").is_file()


def test_data_elsewhere(tmp_path: Path, tiny_models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the page on interop says of other readers, on shards of both codecs of states."""
    page = DOCS / "interop.md"
    blocks = re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.M | re.S)
    assert len(blocks) == 9
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write_rows(tmp_path / "runs/mini", "train-00000", [{"url": "http://x", "caption": "a cup"}])
    for codec in ("float16", "int8"):
        write_features(tmp_path / "runs/mini", tiny_models, train=8, test=2, codec=codec)
        names: dict[str, Any] = {}
        for block in blocks:
            if "datasets" in block or "shards.dataset" in block:
                pytest.importorskip("datasets")
            exec(compile(block, str(page), "exec"), names)
        assert names["captions"]["caption"].to_pylist() == ["a cup"]
        assert names["states"].shape[1:] == (65, 48) and len(names["states"]) == 4
        assert names["states"].dtype == {"float16": "float16", "int8": "float32"}[codec]
        assert names["latents"].shape == (4, 16, 8, 8) and names["row"]["clip_6"].shape == (65, 48)


def test_metrics() -> None:
    page = DOCS / "metrics.md"
    (block,) = re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.M | re.S)
    names: dict[str, Any] = {}
    exec(compile(block, str(page), "exec"), names)
    assert list(names["scores"]) == ["clip_t", "clip_i", "clip_es"]
    table = re.findall(r"^\| [^|]+ \| `(\w+)` \| .* \| (higher|lower) \|", page.read_text(), re.M)
    assert sorted(table) == sorted((m.name, m.better) for m in METRICS.values())


def test_benches(tmp_path: Path) -> None:
    """The page's examples are whole: with the pictures that they name, nothing is wrong."""
    text = (DOCS / "benches.md").read_text()
    several, scenes = re.findall(r"^```json\n(.*?)^```$", text, re.M | re.S)
    (classes,) = re.findall(r"^```text\n(.*?)^```$", text, re.M | re.S)
    named = re.findall(r'"([\w/-]+\.(?:jpg|png))"', several)
    benches = {
        "bench.json": (several, named),
        "scenes.json": (
            scenes,
            [f"creature/{n}" for n in ("img.jpg", "mask0.png", "mask1.png", "mask2.png")],
        ),
        "prompts_and_classes.txt": (classes, ["my_cup/00.jpg", "my_dog/00.jpg"]),
    }
    for name, (description, pictures) in benches.items():
        folder = tmp_path / name.partition(".")[0]
        for picture in pictures:
            (folder / picture).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (16, 16), "white").save(folder / picture)
        (folder / name).write_text(description)
        assert pictures and not check(str(folder)).problems
