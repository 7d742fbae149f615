"""python -m pipeline.evaluation.benches, as a user runs it."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

from tests.pipeline.evaluation import folders

REPOSITORY = Path(__file__).parents[3]


def checked(*args: object) -> tuple[int, list[str], str]:
    """Exit status, the lines of stdout, stderr."""
    command = [sys.executable, "-m", "pipeline.evaluation.benches", *map(str, args)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=280)
    return done.returncode, done.stdout.splitlines(), done.stderr


def test_a_sound_bench(tmp_path: Path) -> None:
    folder = folders.write_multi_subject(tmp_path)
    status, lines, errors = checked(folder)
    assert (status, errors) == (0, "")
    assert lines == [
        f"multi-subject bench {folder}: 2 references, 3 pictures, 4 subjects, 3 masks, 4 prompts",
        "note: masks/cup.png: the subject lies outside the picture's central square, which is all "
        "that encoders see: ssr-mask will refuse it",
        "note: 1 of 4 subjects have no mask, which ssr-mask and DINO-M need",
        f"nothing is wrong; next: python jobs/evaluate.py --bench {folder}",
    ]


def test_everything_that_is_wrong_is_listed(tmp_path: Path) -> None:
    said = copy.deepcopy(folders.BENCH)
    said["refrences"] = []
    said["references"][0]["subjects"][0]["phrse"] = "the cup"
    said["references"][0]["requests"][0]["prompts"] = ["a mug on snow"]
    said["references"][1]["images"][0] = "../dog-1.png"
    said["references"][1]["requests"][0]["subjects"] = ["cat"]
    folder = folders.write_multi_subject(tmp_path, said)
    (folder / "kitchen.jpg").write_bytes(b"not a picture")
    folders.write_mask(folder / "masks/cup.png", column=30)
    folders.write_mask(folder / "masks/dog.png", size=(16, 24))
    (folder / "masks/teapot.png").unlink()
    status, lines, errors = checked(folder, "--layout", "multi-subject")
    assert (status, errors) == (1, "")
    wrong = [line.removeprefix("wrong: ") for line in lines if line.startswith("wrong: ")]
    assert len(wrong) == 8 and lines[-1].startswith("8 wrong; ")
    for part in (
        "bench.json: unknown key 'refrences'; did you mean 'references'?",
        "reference kitchen, subject 0: unknown key 'phrse'; did you mean 'phrase'?",
        "reference kitchen, teapot, mask 0: 'masks/teapot.png' is missing",
        "reference dog.1, image 0: '../dog-1.png' is not a path inside of the bench's folder",
        "reference dog.1, request 0: there is no subject 'cat'; the reference has: dog",
        f"{folder}/kitchen.jpg: not a readable image",
        f"{folder}/masks/cup.png: the mask is black all over",
        f"{folder}/masks/dog.png: the mask is 16x24, its image 24x16",
    ):
        assert sum(line.startswith(part) for line in wrong) == 1, part
    assert any("'a mug on snow' does not say 'cup'" in line for line in lines if "note" in line)


def test_no_bench(tmp_path: Path) -> None:
    status, lines, _ = checked(tmp_path / "none")
    assert status == 1 and lines == [
        f"wrong: bench {tmp_path}/none: no such folder; name a bench's folder, or mini"
    ]
    assert checked(tmp_path, "--layout", "coco")[0] == 2


def test_what_is_left_out_is_noted(tmp_path: Path) -> None:
    folder = folders.write_break_a_scene(tmp_path / "scenes")
    folders.write_picture(folder / "sheep/img.jpg")
    other = folders.write_dreambench(tmp_path / "own", folders.OWN_TEXT)
    folders.write_picture(other / "dataset/hamster/00.jpg")
    for home, note in (
        (folder, "note: sheep/: is not in scenes.json; left out"),
        (other, "note: hamster/: is not among the classes; left out"),
    ):
        status, lines, _ = checked(home)
        assert status == 0 and note in lines
    assert lines[-1].endswith(f"--bench {other} --seeds 4")
    assert any("are not the published ones" in line for line in lines)
