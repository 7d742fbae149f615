"""What a short run measured takes the place of what is assumed: from markers, manifest and records
that our own code writes, and from what an enemy would write in their place.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import PlanConfig
from pipeline.errors import UserError
from pipeline.planning import VAE, plan, step_gflop
from pipeline.planning.calibration import Calibration, calibrated
from pipeline.planning.costs import CLIP, columns
from pipeline.shards import Manifest, Shard
from pipeline.storage import Storage
from pipeline.training.record import Recorder
from pipeline.units import Ledger, Marker, Tally
from tests.sealed import write_features

ROWS, KEPT = 2000, 1300
BLIP = {"name": "Salesforce/blip2-opt-2.7b", "sha256": "a" * 64}


def write_run(
    root: Path | str,
    units: int = 4,
    codec: str = "float16",
    image_size: int = 512,
    device: str = "NVIDIA H800",
    kind: str = "cuda",
    model: Any = BLIP,
    rate: float = 320.0,
    wait: float = 0.02,
    batch: int = 32,
) -> Storage:
    """A run of Stable Diffusion 1.5's shapes, through the code that writes real ones."""
    storage = Storage(root)
    for unit in (f"train-{n:05d}" for n in range(units)):
        web = {"bytes": KEPT * 500_000, "host_count": 800}
        commit(storage, "images", unit, ROWS, KEPT, KEPT * 110_000, 52.0, web,
               {"image_size": image_size})  # fmt: skip
        commit(storage, "captions", unit, KEPT, KEPT, KEPT * 300, 20.0, {}, {"model": model})
        commit(storage, "features", unit, KEPT, KEPT, KEPT * 3_224_000, 13.0, {}, {})
    # a second try has other chances
    commit(storage, "images", "train-r1-00000", 700, 1, 10, 900.0, {}, {"image_size": image_size})
    specs = {c.name: {"shape": list(c.shape), "dtype": c.dtype} for c in columns(codec, 6)}
    size = sum(column.nbytes for column in columns(codec, 6))
    shard = Shard(path="features/train-00000.parquet", split="train", rows=KEPT, row_groups=[KEPT],
                  bytes=KEPT * (size + 150), sha256="0" * 64)  # fmt: skip
    Manifest([shard] * units, list(range(1, 7)), specs, {}, codec).save(storage)
    for stage, pace in (("semantic", rate), ("multi_scale", 0.8 * rate)):
        settings = {"queries": 1, "global_batch": batch}
        what = {"workers": 2, "kind": kind, "device": device, "settings": settings}
        recorder = Recorder(storage, stage, 0, what=what)
        recorder.log({"step": 0, "validation_loss": 1.0})
        for step in range(10, 60, 10):
            slow = pace / 50 if step == 10 else pace
            recorder.log({"step": step, "samples_per_s": slow, "data_wait": wait})
        recorder.progress(step=50)
        recorder.close()
    return storage


def commit(
    storage: Storage, stage: str, unit: str, rows: int, kept: int, size: int, seconds: float,
    extra: dict[str, Any], settings: dict[str, Any],
) -> None:  # fmt: skip
    tally = Tally(rows, kept, failed={"http_404": rows - kept} if rows > kept else {}, extra=extra)
    tally.check()
    when = "2026-11-29T00:00:00+00:00"
    marker = Marker(unit, stage, "f" * 16, settings, tally, size, "0" * 64, seconds, when)
    Ledger(storage, stage).commit(unit, marker)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_run(tmp_path / "run")
    return tmp_path / "run"


def found(root: Path | str, **settings: Any) -> Calibration:
    return calibrated(PlanConfig(calibrate=str(root), **settings))


def notes(root: Path | str, **settings: Any) -> str:
    return "\n".join(found(root, **settings).notes)


def test_what_was_measured_takes_the_place_of_what_is_assumed(run: Path) -> None:
    calibration = found(run)
    cfg = calibration.cfg
    assert cfg.answering == KEPT / ROWS
    assert (cfg.fetched_kb, cfg.stored_kb, cfg.hosts_per_link) == (500, 110, 0.4)
    assert cfg.downloads_per_core_s == KEPT / 52 == 25
    assert (cfg.captions_per_s, cfg.caption_bytes) == (65, 300)
    assert cfg.encoder_tflops == pytest.approx(100 * (VAE + CLIP) / 1e3)
    assert cfg.overhead_bytes == pytest.approx(150)
    # of each stage the pace of a GPU that does not wait; stage 2 took 1.25 times as long a sample
    one, six = step_gflop("float16", 1), step_gflop("float16", 6)
    pace = 160 / 0.98
    wanted = (one + 0.8 * six) / (1 / pace + 0.8 / (0.8 * pace)) / 1e3 / 989
    assert cfg.utilisation == pytest.approx(wanted)
    assert calibration.measured["answering"] == f"calibrated from {run}: 4 units of images"
    assert "8 records of training, 130.6 samples/s a GPU" in calibration.measured["utilisation"]
    assert set(calibration.measured) == {
        "answering", "hosts_per_link", "fetched_kb", "stored_kb", "downloads_per_core_s",
        "captions_per_s", "caption_bytes", "encoder_tflops", "overhead_bytes", "utilisation",
    }  # fmt: skip
    said = "\n".join(calibration.notes)
    assert "captions_per_s: 65 instead of 100, calibrated from" in said
    assert "not calibrated: scan_rows_per_core_s, redirects" in said
    assert "warning" not in said


def test_the_lines_say_that_they_are_calibrated(run: Path) -> None:
    calibration = found(run)
    made = plan(calibration.cfg, calibration.measured)
    line = next(line for line in made.phase("captions").lines if line.name == "GPUs allow")
    assert line.formula == "8 GPUs × 65 images/s"
    assert line.sources[1] == f"calibrated from {run}: 4 units of captions"
    assert made.phase("captions").gpu_hours == pytest.approx(10_000_000 / 65 / 3600)
    assert made.layout("int8").given.measured == calibration.measured
    assert plan(PlanConfig()).phase("captions").gpu_hours < made.phase("captions").gpu_hours


def test_nothing_is_read_where_nothing_is_asked_for() -> None:
    cfg = PlanConfig()
    assert calibrated(cfg) == Calibration(cfg)


def test_what_you_set_stays(run: Path) -> None:
    calibration = found(run, captions_per_s=42.0)
    assert calibration.cfg.captions_per_s == 42
    assert "captions_per_s" not in calibration.measured
    assert "captions_per_s: 42 as you set it; measured was 65" in calibration.notes


@pytest.mark.parametrize("codec", ["int8", "pixels"])
def test_a_run_of_another_codec_counts_what_it_did(tmp_path: Path, codec: str) -> None:
    write_run(tmp_path, codec=codec)
    cfg = found(tmp_path).cfg
    encoders = VAE + (0 if codec == "pixels" else CLIP)
    assert cfg.encoder_tflops == pytest.approx(100 * encoders / 1e3)
    assert cfg.overhead_bytes == pytest.approx(150)
    assert cfg.codec == "float16", "what is planned for stays"


def test_the_mini_models_calibrate_nothing_that_depends_on_them(
    tmp_path: Path, tiny_models: Path
) -> None:
    write_run(tmp_path, image_size=32, model={"name": "miniworld:blip2"})
    write_features(tmp_path, tiny_models, train=8, test=2)
    calibration = found(tmp_path)
    assert set(calibration.measured) == {"overhead_bytes"}
    said = "\n".join(calibration.notes)
    assert "images have 32 pixels, 512 are planned: another web, other decoding" in said
    assert "captions are of miniworld:blip2, planned is blip2-opt-2.7b" in said
    assert said.count("latent_mean is 16x8x8, planned is 4x64x64") == 2
    assert found(tmp_path, captioner="miniworld").cfg.captions_per_s == 65


def test_what_is_missing_or_of_another_kind_is_said(tmp_path: Path) -> None:
    other = write_run(tmp_path / "a100", device="NVIDIA A100-SXM4-80GB", rate=100.0, wait=0.3)
    said = notes(other.url())
    assert "warning: it trained on NVIDIA A100-SXM4-80GB, planned is h800" in said
    assert "waited for data 30% of the time" in said
    write_run(tmp_path / "cpu", kind="cpu", device="x86_64 CPU")
    assert "utilisation: it trained on cpu, not on GPUs" in notes(tmp_path / "cpu")
    write_run(tmp_path / "odd", device="Some Card 9000")
    assert "the peak of Some Card 9000 is not known; say --peak_tflops" in notes(tmp_path / "odd")
    assert "utilisation" in found(tmp_path / "odd", peak_tflops=500.0).measured
    fast = found(write_run(tmp_path / "fast", rate=3000.0).url())
    assert "utilisation" not in fast.measured
    assert "it must lie in (0, 1]" in "\n".join(fast.notes)
    large = write_run(tmp_path / "large", batch=128)
    assert "its GPUs had 64 samples a step each, planned are 16" in notes(large.url())
    few = write_run(tmp_path / "few", units=1)
    assert "1 unit of images: so few say little" in notes(few.url())
    few.delete("features/manifest.json")
    assert "features are not sealed" in notes(few.url())
    assert "no sealed features beside it" in notes(few.url())
    few.delete("train")
    few.delete("captions")
    assert "not calibrated: captions_per_s, caption_bytes: no unit of captions" in notes(few.url())
    assert "not calibrated: utilisation: no record of training" in notes(few.url())


def test_only_the_newest_attempt_counts(run: Path) -> None:
    before = found(run).cfg.utilisation
    attempt = json.loads((run / "train/semantic/attempts/0001.json").read_text())
    attempt |= {"start": 50, "workers": 1}
    (run / "train/semantic/attempts/0002.json").write_text(json.dumps(attempt))
    lines = [{"step": step, "samples_per_s": 160.0, "data_wait": 0.02} for step in (60, 70, 80)]
    with (run / "train/semantic/metrics.jsonl").open("a") as file:
        file.writelines(f"{json.dumps(line)}\n" for line in lines)
    assert found(run).cfg.utilisation == pytest.approx(before, rel=0.1)


def test_on_an_object_store(bucket: str) -> None:
    write_run(f"{bucket}/measured", units=3)
    calibration = found(f"{bucket}/measured")
    assert calibration.cfg.captions_per_s == 65 and len(calibration.measured) == 10
    told = calibration.measured["captions_per_s"]
    assert told == f"calibrated from {bucket}/measured: 3 units of captions"


# --- what is no run ---


def test_an_empty_root_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing was measured there; give the root of a run"):
        found(tmp_path)


IMAGES, FEATURES = "images/_done/train-00002.json", "features/manifest.json"
METRICS, ATTEMPT = "train/semantic/metrics.jsonl", "train/semantic/attempts/0001.json"


@pytest.mark.parametrize(
    ("path", "content", "said"),
    [
        (IMAGES, b'{"unit": "train-0', "is no commit marker"),
        (IMAGES, b"[" * 100_000, "nested without end"),
        (IMAGES, b"\xff\xfe", "is no commit marker"),
        (IMAGES, {"seconds": "fast"}, "seconds is fast, not a number from 0"),
        (IMAGES, {"seconds": -1}, "seconds is -1, not a number"),
        (IMAGES, {"seconds": float("nan")}, "seconds is nan, not a number"),
        (IMAGES, {"rows_in": 10**40}, "not a whole number from 0"),
        (IMAGES, {"kept": ROWS + 1}, "kept is 2001, not a whole number from 0 to 2,000"),
        (IMAGES, {"kept": 1.5}, "kept is 1.5, not a whole number"),
        (IMAGES, {"bytes": None}, "bytes is None, not a whole number"),
        (IMAGES, {"bytes": True}, "bytes is True, not a whole number"),
        (IMAGES, {"extra": []}, r"extra is \[\], not a JSON object"),
        (IMAGES, {"extra": {"bytes": "\x1b[2J"}}, "bytes fetched is ‹U"),
        (IMAGES, {"settings": 7, "fingerprint": []}, "a marker there is none of ours"),
        (IMAGES, {"fingerprint": "0" * 16}, "were made with other settings"),
        (FEATURES, b"{}", "schema version None"),
        (FEATURES, b"[1, 2", "is not JSON"),
        (FEATURES, {"codec": ["float16"]}, "not what sealing writes"),
        (FEATURES, {"depths": "x"}, "not what sealing writes"),
        (FEATURES, {"tensors": {"latent_mean": {"shape": ["x"]}}}, "not what sealing writes"),
        (FEATURES, {"tensors": 5}, "not what sealing writes"),
        (FEATURES, {"depths": [77]}, "not what sealing writes"),
        (METRICS, b"{}\n{\n{}\n", "line 2, is not JSON"),
        (METRICS, b"[]\n", r"line 1 is \[\], not a JSON object"),
        (METRICS, b'{"step": 20, "samples_per_s": "1e9"}\n', "samples_per_s is 1e9, not a number"),
        (METRICS, b'{"step": -1, "samples_per_s": 1}\n', "step is -1, not a whole number"),
        (METRICS, b'{"step": 20, "samples_per_s": 0}\n', "no pace in it"),
        (ATTEMPT, b"{", "is not JSON"),
        (ATTEMPT, b"7", "is 7, not a JSON object"),
        (ATTEMPT, {"workers": 0}, "no pace in it"),
        (ATTEMPT, {"settings": None}, "settings of its attempt is None"),
        (ATTEMPT, {"start": "0"}, "start is 0, not a whole number"),
    ],
)
def test_what_no_job_of_ours_writes_is_one_line(
    run: Path, path: str, content: bytes | dict[str, Any], said: str
) -> None:
    if isinstance(content, bytes):
        (run / path).write_bytes(content)
    else:
        data = json.loads((run / path).read_text())
        for key, value in content.items():
            (data["tally"] if key in data.get("tally", {}) else data)[key] = value
        (run / path).write_text(json.dumps(data))
    with pytest.raises(UserError, match=said) as refused:
        found(run)
    assert "\n" not in str(refused.value) and "\x1b" not in str(refused.value)


def test_a_record_that_is_half_written_is_left_out(run: Path) -> None:
    whole = found(run).cfg
    with (run / METRICS).open("a") as file:
        file.write('{"step": 60, "samp')
    assert found(run).cfg == whole


def test_names_of_an_enemy_are_shown_not_obeyed(tmp_path: Path) -> None:
    evil = "\x1b[2J\u202e" + "x" * 500
    write_run(tmp_path, device=evil, model={"name": evil})
    said = notes(tmp_path)
    assert "\x1b" not in said and "\u202e" not in said and "x" * 200 not in said
    assert "‹U+001B›" in said
