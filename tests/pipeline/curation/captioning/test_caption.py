import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from pipeline.config import CaptionConfig, ModelsConfig
from pipeline.curation.captioning.caption import SCHEMA, CaptionStage
from pipeline.curation.captioning.caption_transformers import TransformersCaptioner
from pipeline.curation.captioning.decoding import mended
from pipeline.curation.captioning.phrases import noun_phrases
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


def keyed(count: int) -> list[str]:
    return [f"k{i}" for i in range(count)]


def write_images(storage: Storage, blobs: list[bytes | None]) -> None:
    keys = keyed(len(blobs))
    table = pa.table({"key": keys, "alt_text": [f"alt of {k}" for k in keys], "image": blobs})
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
    made = captioner(names)(images, keyed(5))
    assert made == [[text] for text in expected]
    assert any(text for [text] in made)


def test_a_prompt_steers_and_is_not_part_of_the_caption(names: ModelsConfig) -> None:
    images = pictures(3)
    plain = captioner(names)(images, keyed(3))
    steered = captioner(names, prompt="a photo of")(images, keyed(3))
    assert steered != plain
    assert all(not text.startswith("a photo of a photo of") for [text] in steered)
    assert all(len(text.split()) <= 6 for [text] in steered)


def test_decoding_settings_reach_the_search(names: ModelsConfig, tiny_models: Path) -> None:
    from transformers import AutoTokenizer, Blip2ForConditionalGeneration, BlipImageProcessorPil

    folder = tiny_models / "blip2"
    model = Blip2ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    processor = BlipImageProcessorPil.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    images = pictures(3)
    pixels = processor(images=images, return_tensors="pt")["pixel_values"]
    plain = captioner(names)(images, keyed(3))
    for given in (
        {"no_repeat_ngram_size": 1},
        {"repetition_penalty": 3.0},
        {"num_beams": 4, "length_penalty": -5.0},
    ):
        expected = model.generate(pixels, max_new_tokens=7, do_sample=False, **given)
        prompt = model.config.num_query_tokens + 1
        texts = tokenizer.batch_decode(expected[:, prompt : prompt + 6], skip_special_tokens=True)
        made = captioner(names, **given)(images, keyed(3))
        # a text that reached the limit may have lost the words that led to what was cut
        assert all(text.startswith(told) for text, [told] in zip(texts, made, strict=True)), given
        assert made != plain, given


def test_a_shortest_length_is_kept(names: ModelsConfig) -> None:
    stage = captioner(names)
    model, _, tokenizer = stage._loaded
    head = model.language_model.lm_head.weight
    with torch.no_grad():  # a model that has nothing to say: the end is its likeliest token
        head[tokenizer.eos_token_id] = 0.9 * head[4:].sum(0) + head[4:].abs().max()
    brief = [text for [text] in stage(pictures(4), keyed(4))]
    stage.cfg.min_new_tokens = 5
    longer = [text for [text] in stage(pictures(4), keyed(4))]
    assert min(len(text.split()) for text in brief) < 5
    assert all(len(text.split()) >= 5 for text in longer)


def test_several_captions_come_from_beams_or_draws(names: ModelsConfig) -> None:
    images, keys = pictures(3), keyed(3)
    beams = captioner(names, num_beams=4, captions_per_image=3)(images, keys)
    assert [len(set(texts)) for texts in beams] == [3, 3, 3]
    assert [texts[:1] for texts in beams] == captioner(names, num_beams=4)(images, keys)
    drawn = captioner(names, temperature=1.0, top_p=1.0, captions_per_image=3)(images, keys)
    assert [len(set(texts)) for texts in drawn] == [3, 3, 3]


def test_draws_are_an_images_own_whatever_its_batch(names: ModelsConfig) -> None:
    images, keys = pictures(6), keyed(6)
    sampler = captioner(names, temperature=1.5, captions_per_image=2, seed=3)
    together = sampler(images, keys)
    order = [5, 1, 3]
    apart = captioner(names, temperature=1.5, captions_per_image=2, seed=3)(
        [images[i] for i in order], [keys[i] for i in order]
    )
    assert apart == [together[i] for i in order]
    assert sampler(images, keys) == together  # nothing is left over from the batch before
    other = captioner(names, temperature=1.5, captions_per_image=2, seed=4)(images, keys)
    assert other != together
    assert sampler(images[:1] * 6, keys) != [together[0]] * 6  # nor is it the image's alone


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_chosen_precision_is_the_models(names: ModelsConfig, dtype: str) -> None:
    lean = captioner(names, dtype=dtype)
    assert lean._loaded[0].language_model.dtype == getattr(torch, dtype)
    assert captioner(names)._loaded[0].language_model.dtype == torch.float32
    assert len(lean(pictures(2), keyed(2))) == 2
    assert lean.settings["dtype"] == dtype


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
    made = captioner(names)(pictures(5), keyed(5))
    assert [row["captions"] for row in rows] == [[mended(text)[0]] for [text] in made]
    for row in rows:
        assert list(row) == SCHEMA.names
        assert row["caption"] == row["captions"][0]
        assert row["subjects"] == (noun_phrases(row["caption"]) or [row["caption"]])
        assert row["backend"] == "transformers" and row["prompt"] == "" and row["seed"] == 0
        assert row["model"] == names.captioner
        assert row["alt_text"] == f"alt of {row['key']}"


def test_a_unit_with_several_captions_of_each_image(names: ModelsConfig, tmp_path: Path) -> None:
    """The same file whatever the batch; and, of a unit of fewer images, the same rows."""
    blobs = [encoded(image) for image in pictures(5)]
    files = []
    for size in (2, 5):
        storage = Storage(str(tmp_path / str(size)))
        write_images(storage, blobs)
        cfg = CaptionConfig(
            max_new_tokens=6, temperature=1.0, captions_per_image=3, seed=7, batch_size=size
        )
        run_unit(CaptionStage(cfg, names, "cpu"), UNIT, storage, "f" * 16)
        files.append(captions(storage))
    assert files[0] == files[1]
    for row in files[0]:
        assert row["seed"] == 7 and row["caption"] == row["captions"][0]
        told = [phrase for text in row["captions"] for phrase in noun_phrases(text)]
        assert row["subjects"] == (list(dict.fromkeys(told)) or [row["caption"]])
    assert max(len(row["captions"]) for row in files[0]) == 3


class Told:
    """A captioner that says what it is told to: texts of the images, in turn."""

    model, settings = "told", {}

    def __init__(self, *texts: list[str]) -> None:
        self.texts = texts

    def open(self) -> None: ...

    def __call__(self, images: list, keys: list) -> list[list[str]]:
        return [self.texts[i % len(self.texts)] for i in range(len(images))]


def test_what_describes_nothing_is_left_out_or_dropped(names: ModelsConfig, tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    write_images(storage, [encoded(image) for image in pictures(5)])
    stage = CaptionStage(CaptionConfig(), names, "cpu")
    stage.captioner = Told(
        [""],
        ["a fish on sand"],
        ["cup cup cup", "..."],
        ["!!", "a cup and a fish", "a fish", "a cup and a fish"],
        ["a fish fish fish fish"],
    )
    marker = run_unit(stage, UNIT, storage, "f" * 16)
    assert marker.tally.dropped == {"empty_caption": 1, "repeated_word": 1}
    assert marker.tally.kept == 3
    rows = captions(storage)
    assert [row["captions"] for row in rows] == [
        ["a fish on sand"], ["a cup and a fish", "a fish"], ["a fish"]
    ]  # fmt: skip
    assert [row["subjects"] for row in rows] == [["a fish"], ["a cup", "a fish"], ["a fish"]]


def test_an_empty_unit_gives_an_empty_file(names: ModelsConfig, tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    columns = {"key": pa.string(), "alt_text": pa.string(), "image": pa.binary()}
    table = pa.table({name: pa.array([], kind) for name, kind in columns.items()})
    with storage.publish(f"images/{UNIT}.parquet") as sink:
        pq.write_table(table, sink)
    marker = run_unit(CaptionStage(CaptionConfig(), names, "cpu"), UNIT, storage, "f" * 16)
    assert marker.tally.rows_in == 0 and captions(storage) == []


def test_settings_name_what_shapes_a_caption(names: ModelsConfig) -> None:
    settings = CaptionStage(CaptionConfig(prompt="a photo of"), names, "cpu").settings
    assert settings["prompt"] == "a photo of" and len(settings["model"]["sha256"]) == 64
    larger = CaptionStage(CaptionConfig(prompt="a photo of", batch_size=2), names, "cpu").settings
    assert larger == settings
    for field, value in (
        ("prompt", "a"), ("max_new_tokens", 9), ("min_new_tokens", 2), ("num_beams", 2),
        ("length_penalty", 2.0), ("repetition_penalty", 1.5), ("no_repeat_ngram_size", 3),
        ("temperature", 0.7), ("top_p", 0.5), ("seed", 1), ("dtype", "bfloat16"),
    ):  # fmt: skip
        cfg = CaptionConfig(**{field: value})  # type: ignore[arg-type]
        assert CaptionStage(cfg, names, "cpu").settings[field] == value


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"captions_per_image": 2}, "captions_per_image is 2"),
        ({"captions_per_image": 3, "num_beams": 2}, "more beams"),
        ({"temperature": 0.7, "num_beams": 2}, "num_beams to 1"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ({"min_new_tokens": 25}, "min_new_tokens is 25"),
        ({"backend": "lavis", "dtype": "float16"}, "leave it at auto"),
    ],
)
def test_decoding_that_cannot_be_is_refused(given: dict, told: str) -> None:
    with pytest.raises(UserError, match=told):
        CaptionConfig(**given)


def test_a_folder_that_is_no_blip2_is_one_clear_line(tiny_models: Path) -> None:
    for folder in ("clip", "nothing-here"):
        names = ModelsConfig(captioner=str(tiny_models / folder))
        with pytest.raises(UserError) as caught:
            TransformersCaptioner(CaptionConfig(), names, "cpu").open()
        assert "\n" not in str(caught.value)
