import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from pipeline.config import CaptionConfig, ModelsConfig
from pipeline.curation.caption import CaptionStage, TransformersCaptioner
from pipeline.curation.phrases import noun_phrases
from pipeline.errors import UserError
from pipeline.storage import Storage
from pipeline.units import run_unit

UNIT = "train-00000"


def pictures(count: int) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(count)
    ]


def encoded(image: Image.Image) -> bytes:
    data = io.BytesIO()
    image.save(data, "png")
    return data.getvalue()


def write_images(storage: Storage, blobs: list[bytes | None]) -> None:
    table = pa.table({"key": [f"k{i}" for i in range(len(blobs))], "image": blobs})
    with storage.publish(f"images/{UNIT}.parquet") as sink:
        pq.write_table(table, sink)


def captions(storage: Storage) -> list[dict]:
    with storage.open_input(f"captions/{UNIT}.parquet") as file:
        return pq.read_table(file).to_pylist()


@pytest.fixture
def names(tiny_models: Path) -> ModelsConfig:
    return ModelsConfig(captioner=str(tiny_models / "blip2"))


def captioner(names: ModelsConfig, **cfg: object) -> TransformersCaptioner:
    return TransformersCaptioner(CaptionConfig(max_new_tokens=6, **cfg), names, "cpu")  # type: ignore[arg-type]


def test_batched_captions_are_the_ones_transformers_makes_alone(
    names: ModelsConfig, tiny_models: Path
) -> None:
    from transformers import AutoTokenizer, Blip2ForConditionalGeneration, BlipImageProcessorPil

    folder = tiny_models / "blip2"
    model = Blip2ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    processor = BlipImageProcessorPil.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    images = pictures(5)
    expected = []
    for image in images:
        pixels = processor(images=[image], return_tensors="pt")["pixel_values"]
        ids = model.generate(pixels, max_new_tokens=6, do_sample=False)[0]
        prompt = model.config.num_query_tokens + 1
        expected.append(tokenizer.decode(ids[prompt:], skip_special_tokens=True).strip())
    made = captioner(names)(images)
    assert made == expected
    assert any(made)


def test_a_prompt_steers_and_is_not_part_of_the_caption(names: ModelsConfig) -> None:
    images = pictures(3)
    plain = captioner(names)(images)
    steered = captioner(names, prompt="a photo of")(images)
    assert steered != plain
    assert all(not text.startswith("a photo of a photo of") for text in steered)
    assert all(len(text.split()) <= 6 for text in steered)


def test_beams_run(names: ModelsConfig) -> None:
    assert len(captioner(names, num_beams=3)(pictures(2))) == 2


def test_a_unit_becomes_captions_and_every_row_is_accounted_for(
    names: ModelsConfig, tmp_path: Path
) -> None:
    storage = Storage(str(tmp_path))
    good = [encoded(image) for image in pictures(5)]
    write_images(storage, [*good[:3], b"no image", good[3][:60], None, *good[3:]])
    cfg = CaptionConfig(max_new_tokens=6, batch_size=3)
    stage = CaptionStage(cfg, names, "cpu")
    marker = run_unit(stage, UNIT, storage, "f" * 16)
    assert (marker.tally.rows_in, marker.tally.kept) == (8, 5)
    assert marker.tally.failed == {"undecodable": 3} and marker.tally.dropped == {}
    rows = captions(storage)
    assert [row["key"] for row in rows] == ["k0", "k1", "k2", "k6", "k7"]
    made = captioner(names)(pictures(5))
    assert [row["caption"] for row in rows] == made
    for row in rows:
        assert row["subjects"] == (noun_phrases(row["caption"]) or [row["caption"]])
        assert row["backend"] == "transformers" and row["prompt"] == ""
        assert row["model"] == names.captioner


def test_an_image_without_a_caption_is_dropped(names: ModelsConfig, tmp_path: Path) -> None:
    class Silent:
        def __init__(self) -> None:
            self.settings: dict = {}

        def open(self) -> None: ...

        def __call__(self, images: list) -> list[str]:
            return ["" if i % 2 else "a fish on sand" for i in range(len(images))]

    storage = Storage(str(tmp_path))
    write_images(storage, [encoded(image) for image in pictures(4)])
    stage = CaptionStage(CaptionConfig(), names, "cpu")
    stage.captioner = Silent()
    marker = run_unit(stage, UNIT, storage, "f" * 16)
    assert marker.tally.dropped == {"empty_caption": 2} and marker.tally.kept == 2
    assert [row["subjects"] for row in captions(storage)] == [["a fish"], ["a fish"]]


def test_an_empty_unit_gives_an_empty_file(names: ModelsConfig, tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    table = pa.table({"key": pa.array([], pa.string()), "image": pa.array([], pa.binary())})
    with storage.publish(f"images/{UNIT}.parquet") as sink:
        pq.write_table(table, sink)
    marker = run_unit(CaptionStage(CaptionConfig(), names, "cpu"), UNIT, storage, "f" * 16)
    assert marker.tally.rows_in == 0 and captions(storage) == []


def test_settings_name_what_shapes_a_caption(names: ModelsConfig) -> None:
    settings = CaptionStage(CaptionConfig(prompt="a photo of"), names, "cpu").settings
    assert settings["prompt"] == "a photo of" and len(settings["model"]["sha256"]) == 64
    larger = CaptionStage(CaptionConfig(prompt="a photo of", batch_size=2), names, "cpu").settings
    assert larger == settings


def test_a_folder_that_is_no_blip2_is_one_clear_line(tiny_models: Path) -> None:
    for folder in ("clip", "nothing-here"):
        names = ModelsConfig(captioner=str(tiny_models / folder))
        with pytest.raises(UserError) as caught:
            TransformersCaptioner(CaptionConfig(), names, "cpu").open()
        assert "\n" not in str(caught.value)
