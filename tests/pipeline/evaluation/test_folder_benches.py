"""Benches read from folders: what they ask for, and what they refuse."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
from PIL import Image

from pipeline.config import EvaluateConfig
from pipeline.errors import UserError
from pipeline.evaluation.benches import Bench, open_bench
from pipeline.evaluation.benches.checking import check
from pipeline.evaluation.benches.folder import MAX_PROBLEMS
from pipeline.evaluation.benches.folders import LAYOUTS
from pipeline.storage import Storage
from tests.pipeline.evaluation import folders
from tests.pipeline.evaluation.dreambench_text import SHA256, published_text


def opened(folder: Path | str, **settings: Any) -> Bench:
    return open_bench(EvaluateConfig(bench=str(folder), **settings), side=32)


def everything(bench: Bench) -> list[Any]:
    return bench.requests(0, len(bench))


def refused(folder: Path, pattern: str) -> None:
    """It is not opened, the fault told in one short line, and the check lists this one."""
    with pytest.raises(UserError) as error:
        opened(folder)
    line = str(error.value)
    assert line.startswith(f"bench {folder}") and "\n" not in line and len(line) < 600
    problems = check(str(folder)).problems
    assert any(re.search(pattern, problem) for problem in problems), problems


# --- DreamBench ---


def test_dreambench_as_published(tmp_path: Path) -> None:
    text = published_text()
    assert hashlib.sha256(text.encode()).hexdigest() == SHA256
    bench = opened(folders.write_dreambench(tmp_path, text), seeds=4)
    assert bench.name == "dreambench" and bench.published
    assert bench.title == "DreamBench: 30 subjects, 25 prompts each, 4 seeds"
    assert len(bench) == 3000 and len(bench.references()) == 30
    assert bench.references()[:2] == [(0, 100), (100, 200)]
    first, last = bench.requests(7 * 4 + 2, 7 * 4 + 3)[0], bench.requests(2999, 5000)[-1]
    assert first.key == "backpack-07-2" and last.key == "wolf_plushie-24-3"
    assert first.prompt == "a backpack with a mountain in the background"
    assert last.prompt == "a cube shaped stuffed animal"
    assert first.about == {"asked": "A", "prompt_number": 7, "seed_number": 2}
    subject = first.reference.subjects[0]
    assert (subject.name, subject.phrase) == ("backpack", "a backpack")
    assert len(first.reference.images) == 4 and subject.masks == (None,) * 4
    outlines = bench.outlines()
    assert outlines[7 * 4 + 2].key == first.key and len({each.key for each in outlines}) == 3000
    assert not any(each.masked for each in outlines)
    sample = first.sample(Image.new("RGB", (8, 8)))
    assert len(sample.references) == 4 and not sample.subjects and not sample.others
    by_reference = [bench.requests(start, end)[40] for start, end in bench.references()[5:7]]
    assert [request.prompt for request in by_reference] == [
        "a candle with a wheat field in the background",
        "a cat wearing a red hat",
    ]


def test_dreambench_is_the_published_one_only_as_a_whole(tmp_path: Path) -> None:
    text = published_text()
    whole = folders.write_dreambench(tmp_path / "whole", text)
    assert not opened(whole).published and not opened(whole, seeds=8).published
    few = opened(whole, seeds=4, references=29)
    assert not few.published and few.name == "dreambench" and len(few) == 2900
    changed = text.replace("on the beach", "on a beach")
    other = opened(folders.write_dreambench(tmp_path / "other", changed), seeds=4)
    assert not other.published and other.name == "dreambench-other"
    assert other.title == "other: 30 subjects, 25 prompts each, 4 seeds"
    few_images = folders.write_dreambench(tmp_path / "few", text, images=3)
    assert not opened(few_images, seeds=4).published


def test_dreambench_of_ones_own(tmp_path: Path) -> None:
    folder = folders.write_dreambench(tmp_path, folders.OWN_TEXT)
    assert opened(folder).title.endswith(": 2 subjects, 1 or 2 prompts each, 1 seed")
    for home in (folder, folder / "dataset"):
        assert [r.prompt for r in everything(opened(home))] == [
            "a cup in the snow",
            "a red cup",
            "a dog that's wearing a hat",
        ]


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("'a red {0} {1}'", "'a red {1}'", "line 13: .* is not a prompt"),
        ("'a red {0} {1}'", "'a red thing'", "line 13: .* is not a prompt"),
        ("'a red {0} {1}'", "'a {0.__class__} {0} {1}'", "line 13: .* is not a prompt"),
        ("'a red {0} {1}'.format", "__import__('os').system('x')  #", "line 13: .* not a prompt"),
        ("my_cup,cup", "../my_cup,cup", "line 4: '../my_cup' is no key"),
        ("my_cup,cup", "my_cup", "line 4: 'my_cup' is not subject_name,class"),
        ("my_cup,cup", "my_cup,cup\nMY_CUP,mug", "line 5: the key 'MY_CUP' is there twice"),
        ("my_cup,cup\nmy_dog,dog\n", "", "names no subject"),
        ("Live Subject Prompts", "Living Prompts", "line 16: .* is not a prompt"),
        ("Classes\n", "", "line 3: 'my_cup,cup' stands under no heading"),
        ("my_cup", "my_mug", "my_mug/: has no pictures"),
    ],
)
def test_dreambench_texts_that_are_refused(tmp_path: Path, old: str, new: str, line: str) -> None:
    folder = folders.write_dreambench(tmp_path, folders.OWN_TEXT)
    (folder / "dataset/prompts_and_classes.txt").write_text(folders.OWN_TEXT.replace(old, new, 1))
    refused(folder, line)


# --- several subjects ---


def test_subjects_are_asked_alone_and_together(tmp_path: Path) -> None:
    bench = opened(folders.write_multi_subject(tmp_path / "my bench"))
    assert bench.name == "multi-subject-my-bench" and not bench.published
    assert bench.title == "my bench: 2 references, 4 prompts, 1 seed"
    alone, again, both, dog = everything(bench)
    assert [r.key for r in (alone, again, both, dog)] == [
        "kitchen-00-0",
        "kitchen-01-0",
        "kitchen-02-0",
        "dog.1-00-0",
    ]
    assert alone.reference is again.reference is both.reference
    assert [s.phrase for s in alone.left_out()] == ["a blue teapot", "an apple"]
    assert [s.subject.name for s in both.selections] == ["teapot", "cup"]
    assert [s.name for s in both.left_out()] == ["apple"] and both.about["asked"] == "BA"
    cup = alone.selections[0].subject
    assert cup.mask is not None and cup.mask.shape == (16, 24) and cup.mask[:, :4].all()
    assert cup.mask.sum() == 64 and alone.reference.subjects[2].masks == (None,)
    assert dog.reference.images[1].size == (24, 16) and dog.selections[0].subject.mask is None
    sample = dog.sample(Image.new("RGB", (8, 8)), [np.ones((8, 8), bool)])
    assert len(sample.subjects) == 1 and len(sample.references) == 2
    assert bench.requests(3, 4)[0].seed == dog.seed


def test_keys_and_noise_do_not_depend_on_counts(tmp_path: Path) -> None:
    folder = folders.write_multi_subject(tmp_path)
    one, three = opened(folder), opened(folder, seeds=3)
    few = opened(folder, seeds=3, references=1)
    assert three.settings == few.settings != one.settings
    assert few.requests(0, 9)[8].key == three.requests(0, 9)[8].key == "kitchen-02-2"
    assert one.requests(0, 2)[1].key != three.requests(0, 2)[1].key, "so settings have the seeds"
    assert len(few) == 9 and few.references() == [(0, 9)] and three.references()[1] == (9, 12)
    noise = {r.key: r.seed for r in everything(three)}
    assert len(set(noise.values())) == 12 and all(0 <= seed < 2**32 for seed in noise.values())
    for bench in (one, few):
        assert all(noise[r.key] == r.seed for r in everything(bench))
    other = opened(folder, seed=1)
    assert not {r.seed for r in everything(other)} & set(noise.values())
    assert other.settings != one.settings


def test_settings_change_with_any_file(tmp_path: Path) -> None:
    folder = folders.write_multi_subject(tmp_path)
    before = opened(folder).settings
    (folder / "bench.json").write_text(json.dumps(folders.BENCH, indent=4))
    (folder / "README.md").write_text("not the bench's")
    assert opened(folder).settings == before
    seen = [before]
    folders.write_picture(folder / "dog-2.jpg", colour=3)
    seen.append(opened(folder).settings)
    folders.write_mask(folder / "masks/cup.png", column=2)
    seen.append(opened(folder, references=1).settings)
    said = copy.deepcopy(folders.BENCH)
    said["references"][1]["requests"][0]["prompts"] = ["a dog on Mars"]
    (folder / "bench.json").write_text(json.dumps(said))
    seen.append(opened(folder).settings)
    assert len({json.dumps(each, sort_keys=True) for each in seen}) == 4


def test_pictures_are_read_late_and_do_not_travel(tmp_path: Path) -> None:
    folder = folders.write_multi_subject(tmp_path)
    bench = opened(folder)
    before = len(pickle.dumps(bench))
    everything(bench)
    sent = pickle.dumps(bench)
    assert len(sent) == before
    (folder / "dog-2.jpg").unlink()
    elsewhere = pickle.loads(sent)  # noqa: S301
    assert [r.key for r in elsewhere.requests(0, 3)] == [r.key for r in bench.requests(0, 3)]
    with pytest.raises(UserError, match=r"dog-2.jpg: no such file"):
        elsewhere.requests(3, 4)


def test_transparent_and_turned_pictures(tmp_path: Path) -> None:
    folder = folders.write_multi_subject(tmp_path)
    Image.new("RGBA", (24, 16), (255, 0, 0, 0)).save(folder / "dog-1.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (16, 24)).save(folder / "dog-2.jpg", exif=exif)
    reference = opened(folder).requests(3, 4)[0].reference
    assert reference.images[0].getpixel((3, 3)) == (255, 255, 255)
    assert reference.images[1].size == (24, 16)


def edited(edit: Callable[[Any], object]) -> Any:
    said = copy.deepcopy(folders.BENCH)
    edit(said)
    return said


REFUSED: list[tuple[Any, str]] = [
    (edited(lambda b: b.update(version=2)), "bench.json: version 2 is not known"),
    (edited(lambda b: b.update(version=True)), "version True is not known"),
    (edited(lambda b: b.pop("version")), "'version' is missing"),
    (edited(lambda b: b.update(title="x")), "unknown key 'title'; there are: version, references"),
    (edited(lambda b: b.update(references={})), "'references' is {}, not a list"),
    ([], r"bench.json: is \[\], not an object"),
    (None, "bench.json: is null, not an object"),
    (edited(lambda b: b["references"].append(7)), "reference 2: is 7, not an object"),
]


def _kitchen(line: str, **changes: Any) -> None:
    REFUSED.append((edited(lambda b: b["references"][0].update(changes)), line))


_kitchen("the key 'dog.1' is there twice", key="DOG.1")
_kitchen("'a/b' is no key", key="a/b")
_kitchen("is no key", key="-x")
_kitchen("is no key", key="x" * 101)
_kitchen("reference 0: unknown key 'promts'; there are", promts=[])
_kitchen("reference 0: unknown key 'image'; did you mean 'images'", image="kitchen.jpg")
_kitchen("image 0: '/etc/passwd' is not a path inside", images=["/etc/passwd"])
_kitchen("image 0: '../dog.jpg' is not a path inside", images=["../dog.jpg"])
_kitchen("is not a path inside", images=["masks/../kitchen.jpg"])
_kitchen("is not a path inside", images=["..\\kitchen.jpg"])
_kitchen("is not a path inside", images=["kitchen.jpg\x00"])
_kitchen("image 0: 'kitchen.png' is missing; there is 'kitchen.jpg'", images=["kitchen.png"])
_kitchen("image 0: 's3://other/x.jpg' is not a path inside", images=["s3://other/x.jpg"])
_kitchen("image 0: 3 is not the name of a file", images=[3])
_kitchen("'images' are 21; 20 are the most", images=["kitchen.jpg"] * 21)
_kitchen("cup: 1 mask for 2 images", images=["kitchen.jpg", "dog-1.png"])
_kitchen("subject 1: 'cup' is there twice", subjects=["cup", "cup", "teapot"])
_kitchen("'subjects' are 30; 26 are the most", subjects=[f"thing {n}" for n in range(30)])
_kitchen("subject 0: '' is not one line", subjects=[""])
_kitchen(r"subject 0: 'a\\nb' is not one line", subjects=["a\nb"])
_kitchen("mask 0: 'masks' is missing", subjects=[{"name": "cup", "masks": ["masks"]}])
_kitchen("there is no subject 'spoon'", requests=[{"subjects": ["spoon"], "prompts": ["x"]}])
_kitchen("different ones", requests=[{"subjects": ["cup", "cup"], "prompts": ["x"]}])
_kitchen("'prompts' is 'a cup', not a list", requests=[{"subjects": ["cup"], "prompts": "a cup"}])
_kitchen("prompt 0: '   ' is not one", requests=[{"subjects": ["cup"], "prompts": ["   "]}])


@pytest.mark.parametrize(("said", "line"), REFUSED, ids=[line for _, line in REFUSED])
def test_descriptions_that_are_refused(tmp_path: Path, said: Any, line: str) -> None:
    folder = folders.write_multi_subject(tmp_path, said)
    refused(folder, line)


@pytest.mark.parametrize(
    ("data", "line"),
    [
        (b"{", "is not JSON"),
        (b"\xff\xfe{}", "is not UTF-8"),
        (b"", "is empty"),
        (b'{"version": 1, "version": 1}', "the key 'version' is there twice"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"version": ' + b"1" * 5000 + b"}", "is not JSON"),
        (b'{"version": ' + b"[" * 900 + b"]" * 900 + b"}", "is not known"),
    ],
)
def test_json_that_is_none(tmp_path: Path, data: bytes, line: str) -> None:
    folder = folders.write_multi_subject(tmp_path)
    (folder / "bench.json").write_bytes(data)
    refused(folder, line)


def test_a_byte_order_mark_is_no_fault(tmp_path: Path) -> None:
    folder = folders.write_multi_subject(tmp_path)
    (folder / "bench.json").write_text(json.dumps(folders.BENCH), encoding="utf-8-sig")
    assert len(opened(folder)) == 4


def test_links_and_odd_files_are_not_followed(tmp_path: Path) -> None:
    folder = folders.write_multi_subject(tmp_path / "bench")
    secret = tmp_path / "secret.jpg"
    folders.write_picture(secret)
    target = folder / "kitchen.jpg"

    def refused_with(line: str) -> None:
        with pytest.raises(UserError, match=line):
            opened(folder)
        target.unlink()

    target.unlink()
    target.symlink_to(secret)
    refused_with("'kitchen.jpg' is a link that leaves")
    target.symlink_to("kitchen.jpg")
    refused_with("'kitchen.jpg' is not a file")
    target.symlink_to("masks")
    refused_with("'kitchen.jpg' is not a file")
    os.mkfifo(target)
    refused_with("'kitchen.jpg' is not a file")
    target.touch()
    refused_with("'kitchen.jpg' is empty")
    with target.open("wb") as file:
        file.truncate(65 * 2**20)
    refused_with("'kitchen.jpg' has 68,157,440 bytes")
    target.symlink_to("dog-1.png")  # within the folder
    assert len(opened(folder)) == 4
    (folder / "masks").rename(tmp_path / "masks")
    (folder / "masks").symlink_to(tmp_path / "masks")
    with pytest.raises(UserError, match=r"'masks/cup.png' is missing"):
        opened(folder)


def test_pictures_that_are_none(tmp_path: Path) -> None:
    """Found when they are drawn from, and by the check."""
    folder = folders.write_multi_subject(tmp_path)
    target = folder / "kitchen.jpg"
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    broken = target.read_bytes()[:-100]
    for data in (b"GIF89a", b"<svg/>", postscript, broken):
        target.write_bytes(data)
        how = "of no known format" if data is postscript else ""  # never given to Ghostscript
        with pytest.raises(UserError, match=rf"kitchen.jpg: not a readable image \({how}"):
            opened(folder).requests(0, 1)
        assert any("kitchen.jpg: not a readable" in line for line in check(str(folder)).problems)


# --- Break-A-Scene ---


def test_break_a_scene(tmp_path: Path) -> None:
    bench = opened(folders.write_break_a_scene(tmp_path / "examples"), seeds=2)
    assert bench.name == "break-a-scene-examples" and not bench.published
    beach, _, oil, _, owl, _ = everything(bench)
    assert beach.key == "creature-00-0" and beach.prompt == "a photo of a creature at the beach"
    assert [s.phrase for s in beach.left_out()] == ["a bowl", "an old stone"]
    assert oil.prompt == "an old stone and a bowl, in oil"
    assert [s.subject.name for s in oil.selections] == ["stone", "bowl"]
    masks = [s.mask for s in oil.reference.subjects]
    assert [int(np.argmax(m.any(0))) for m in masks if m is not None] == [0, 6, 12]
    assert owl.prompt == "a drawing of an owl" and owl.key == "birds-00-0"


@pytest.mark.parametrize(
    ("creature", "line"),
    [
        ({"subjects": ["a", "b"]}, "mask2.png is of none of its 2 subjects"),
        ({"subjects": ["a", "b", "c", "d"]}, "scene creature, d: 'creature/mask3.png' is missing"),
        ({"prompts": ["<asset7> at the beach"]}, "<asset7>: the scene has 3 subjects, from 0"),
        ({"prompts": ["a creature"]}, "'a creature' names no <asset0>"),
        ({"prompts": ["<asset0> <asset1> <asset2> <asset3>"]}, "or more than 3"),
        ({"subjects": [{"name": "a", "masks": ["x"]}, "b", "c"]}, "unknown key 'masks'"),
        ({"classes": []}, "unknown key 'classes'"),
    ],
)
def test_scenes_that_are_refused(tmp_path: Path, creature: Any, line: str) -> None:
    said = copy.deepcopy(folders.SCENES)
    said["scenes"]["creature"].update(creature)
    refused(folders.write_break_a_scene(tmp_path, said), line)


@pytest.mark.parametrize("name", ["..", "a/b", ""])
def test_scene_names_are_no_paths(tmp_path: Path, name: str) -> None:
    scene = {"subjects": ["a"], "prompts": ["<asset0>"]}
    folder = folders.write_break_a_scene(tmp_path, {"version": 1, "scenes": {name: scene}})
    refused(folder, f"'{name}' is no key")


# --- which bench is meant ---


def test_the_mini_bench(tmp_path: Path) -> None:
    assert len(opened("mini")) == 200 and len(opened("mini", references=3)) == 6
    with pytest.raises(UserError, match="seeds is 4; the mini bench"):
        opened("mini", seeds=4)
    with pytest.raises(UserError, match="references: 0 "):
        opened("mini", references=0)


def test_folders_that_are_no_bench(tmp_path: Path) -> None:
    folder = tmp_path / "bench"
    with pytest.raises(UserError, match="no such folder"):
        opened(folder)
    folder.mkdir()
    with pytest.raises(UserError, match="is empty"):
        opened(folder)
    (folder / "notes.txt").touch()
    with pytest.raises(UserError, match=r"holds no bench.json \(multi-subject\) or prompts_and"):
        opened(folder)
    with pytest.raises(UserError, match="is a file"):
        opened(folder / "notes.txt")
    folders.write_multi_subject(folder)
    with pytest.raises(UserError, match=r"holds no scenes.json \(break-a-scene\)"):
        opened(folder, layout="break-a-scene")
    folders.write_break_a_scene(folder)
    with pytest.raises(UserError, match=r"holds bench.json and scenes.json; say which"):
        opened(folder)
    assert len(opened(folder, layout="break-a-scene")) == 3


@pytest.mark.parametrize("references", [0, -1, 3])
def test_references_that_there_are_not(tmp_path: Path, references: int) -> None:
    with pytest.raises(UserError, match=f"references: {references} of the 2"):
        opened(folders.write_multi_subject(tmp_path), references=references)


def test_layouts_of_the_settings() -> None:
    named = get_args(get_type_hints(EvaluateConfig)["layout"])
    assert sorted(named) == sorted(["auto", *LAYOUTS])


def test_the_first_fault_and_where_to_see_the_others(tmp_path: Path) -> None:
    folder = folders.write_multi_subject(tmp_path)
    (folder / "kitchen.jpg").unlink()
    (folder / "masks/dog.png").unlink()
    line = f"'kitchen.jpg' is missing; 1 more: python -m pipeline.evaluation.benches {folder}"
    with pytest.raises(UserError, match=line):
        opened(folder)


def test_faults_without_end(tmp_path: Path) -> None:
    folder = folders.write_multi_subject(tmp_path, {"version": 1, "references": [0] * 100_000})
    assert len(check(str(folder)).problems) == MAX_PROBLEMS + 1


# --- object stores ---


@pytest.mark.parametrize(
    ("name", "count"), [("multi-subject", 4), ("break-a-scene", 3), ("dreambench", 3)]
)
def test_the_same_in_an_object_store(bucket: str, tmp_path: Path, name: str, count: int) -> None:
    written = {
        "multi-subject": folders.write_multi_subject,
        "break-a-scene": folders.write_break_a_scene,
        "dreambench": lambda folder: folders.write_dreambench(folder, folders.OWN_TEXT),
    }
    folder = written[name](tmp_path / name)
    Storage(bucket).upload_tree(folder, name)
    here, there = opened(folder), opened(f"{bucket}/{name}")
    assert here.settings == there.settings and here.name == there.name
    assert len(there) == count
    for ours, theirs in zip(everything(here), everything(there), strict=True):
        assert (ours.key, ours.prompt, ours.seed) == (theirs.key, theirs.prompt, theirs.seed)
        assert ours.reference.image.tobytes() == theirs.reference.image.tobytes()
        assert np.array_equal(ours.selections[0].subject.mask, theirs.selections[0].subject.mask)
    assert not check(f"{bucket}/{name}").problems


def test_no_bench_in_an_object_store(bucket: str) -> None:
    with pytest.raises(UserError, match="no such folder"):
        opened(f"{bucket}/nothing")
    said = edited(lambda b: b["references"][0].update(images=["../dreambench/secret.jpg"]))
    Storage(bucket).write_json("hostile/bench.json", said)
    with pytest.raises(UserError, match="is not a path inside"):
        opened(f"{bucket}/hostile")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_outlines_are_the_requests_without_their_pictures(tmp_path: Path, layout: str) -> None:
    writers = {
        "multi-subject": folders.write_multi_subject,
        "dreambench": lambda folder: folders.write_dreambench(folder, folders.OWN_TEXT),
        "break-a-scene": folders.write_break_a_scene,
    }
    bench = opened(writers[layout](tmp_path), seeds=2, seed=5)
    requests = everything(bench)
    for file in [*tmp_path.rglob("*.png"), *tmp_path.rglob("*.jpg")]:
        file.unlink()
    outlines = bench.outlines()
    assert len(outlines) == len(requests) > 4
    for outline, request in zip(outlines, requests, strict=True):
        other = request.outline
        assert (outline.key, outline.prompt, outline.seed) == (other.key, other.prompt, other.seed)
        assert outline.masked == other.masked
        for one, two in zip(outline.subjects, other.subjects, strict=True):
            assert (one.name, one.phrase, one.query) == (two.name, two.phrase, two.query)
    assert {outline.masked for outline in outlines} == {
        "multi-subject": {True, False},
        "dreambench": {False},
        "break-a-scene": {True},
    }[layout]
