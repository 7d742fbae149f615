"""The lavis backend for real: salesforce-lavis in its own environment, in workers of real Ray.

Needs that environment: `make lavis-env`, or LAVIS_PYTHON with the interpreter of another one.
"""

import io
import os
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.cluster import connect
from pipeline.config import CaptionConfig, ModelsConfig, RayConfig
from pipeline.curation.captioning.caption import SCHEMA, CaptionStage, interpreter
from pipeline.curation.captioning.phrases import noun_phrases
from pipeline.errors import UserError
from pipeline.progress import Progress
from pipeline.runner import StageSpec, run_stages
from pipeline.storage import Storage
from pipeline.units import Ledger

REPOSITORY = Path(__file__).resolve().parents[2]
TINY = REPOSITORY / "tests/pipeline/curation/captioning/tiny_lavis.py"
PYTHON = Path(os.environ.get("LAVIS_PYTHON", REPOSITORY / ".venv-lavis" / "bin" / "python"))
UNITS = ["train-00000", "train-00001"]
ROWS = 5

pytestmark = [
    pytest.mark.timeout(1200),
    pytest.mark.skipif(
        not PYTHON.is_file(), reason=f"no environment for LAVIS at {PYTHON}; run `make lavis-env`"
    ),
]
Config = Callable[..., CaptionConfig]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, bucket: str) -> Iterator[Config]:
    """Settings of the lavis backend with small random weights, that its environment wrote; and a
    cluster whose workers find the model's class, and the bucket.
    """
    folder = tmp_path_factory.mktemp("lavis")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(TINY.parent), str(REPOSITORY)]))
        subprocess.run([PYTHON, TINY, folder], check=True, timeout=600)
        with connect(RayConfig(object_store_mib=100)):
            yield partial(
                CaptionConfig,
                backend="lavis",
                lavis_python=str(PYTHON),
                lavis_model="tiny_lavis:tiny_blip2_opt",
                lavis_type="random",
                lavis_checkpoint=str(folder / "checkpoint.pth"),
                lavis_opt=str(folder / "opt"),
                max_new_tokens=6,
            )


def write_images(storage: Storage) -> None:
    """Two units of the same images, whose keys differ; one image of each does not decode."""
    rng = np.random.default_rng(0)
    blobs: list[bytes] = [b"no image"]
    for _ in range(ROWS):
        data = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (40, 32, 3), dtype=np.uint8)).save(data, "png")
        blobs.append(data.getvalue())
    for unit in UNITS:
        keys = [f"{unit}-{i}" for i in range(len(blobs))]
        table = pa.table({"key": keys, "alt_text": [f"alt {k}" for k in keys], "image": blobs})
        with storage.publish(f"images/{unit}.parquet") as sink:
            pq.write_table(table, sink)


def run(storage: Storage, cfg: CaptionConfig, **options: Any) -> dict[str, list[dict]]:
    """The captions stage by the runner; unit -> its rows."""
    stage = partial(CaptionStage, cfg, ModelsConfig(), "cpu")
    spec = StageSpec("captions", stage, py_executable=interpreter(cfg))
    with Progress(terminal=False) as progress:
        run_stages([spec], UNITS, storage, progress, **options)
    rows = {}
    for unit in UNITS:
        with storage.open_input(f"captions/{unit}.parquet") as file:
            table = pq.read_table(file)
        assert table.schema.equals(SCHEMA)
        rows[unit] = table.to_pylist()
    return rows


def test_the_stage_runs_in_the_environment_of_lavis(tmp_path: Path, config: Config) -> None:
    storage = Storage(tmp_path)
    write_images(storage)
    cfg = config(batch_size=2)
    made = run(storage, cfg)
    captions = {unit: [row["caption"] for row in rows] for unit, rows in made.items()}
    assert captions[UNITS[0]] == captions[UNITS[1]]  # the same images
    assert len(set(captions[UNITS[0]])) > 1
    for unit, rows in made.items():
        marker = Ledger(storage, "captions").get(unit)
        assert marker is not None and marker.settings["lavis"] == "1.0.2"
        assert (marker.tally.rows_in, marker.tally.kept) == (ROWS + 1, len(rows))
        assert marker.tally.failed == {"undecodable": 1}
        for row in rows:
            assert row["captions"] == [row["caption"]]
            assert row["subjects"] == (noun_phrases(row["caption"]) or [row["caption"]])
            assert row["alt_text"] == f"alt {row['key']}"
            assert row["backend"] == "lavis" and row["seed"] == 0 and row["prompt"] == ""
            assert row["model"] == "tiny_lavis:tiny_blip2_opt/random"
    before = {path: storage.read_bytes(path) for path in storage.list()}
    assert run(storage, cfg) == made
    assert {path: storage.read_bytes(path) for path in storage.list()} == before
    with pytest.raises(UserError, match=r"max_new_tokens \(was 6, now 5\)"):
        run(storage, config(max_new_tokens=5))


def test_draws_depend_neither_on_the_batch_nor_on_the_store(
    tmp_path: Path, config: Config, bucket: str
) -> None:
    made = []
    for size, root in ((2, str(tmp_path)), (5, f"{bucket}/run")):
        storage = Storage(root)
        write_images(storage)
        made.append(
            run(storage, config(temperature=1.0, captions_per_image=3, batch_size=size, seed=7))
        )
    assert made[0] == made[1]
    rows = [row for unit in made[0].values() for row in unit]
    assert max(len(row["captions"]) for row in rows) > 1
    assert all(row["seed"] == 7 and row["caption"] == row["captions"][0] for row in rows)
    first, second = (
        [row["captions"] for row in made[0][unit]] for unit in UNITS
    )  # the same images under other keys
    assert first != second


def test_captions_are_those_of_lavis_alone(tmp_path: Path, config: Config) -> None:
    """A script that uses LAVIS as its users do, against our captioner, in one environment."""
    cfg = config(num_beams=3, prompt="a dog")
    script = tmp_path / "alone.py"
    script.write_text(
        f"""
import numpy as np, torch
from PIL import Image
from pipeline.config import CaptionConfig, ModelsConfig
from pipeline.curation.captioning.caption_lavis import LavisCaptioner
from tiny_lavis import TinyBlip2OPT
from omegaconf import OmegaConf
from lavis.models import load_preprocess

config = OmegaConf.load(TinyBlip2OPT.default_config_path("random"))
config.model.opt_model = {cfg.lavis_opt!r}
config.model.finetuned = {cfg.lavis_checkpoint!r}
model = TinyBlip2OPT.from_config(config.model).float().eval()
processors, _ = load_preprocess(config.preprocess)
rng = np.random.default_rng(1)
images = [Image.fromarray(rng.integers(0, 256, (32, 40, 3), dtype=np.uint8)) for _ in range(4)]
pixels = torch.stack([processors["eval"](image) for image in images])
alone = model.generate({{"image": pixels, "prompt": "a dog"}}, num_beams=3, max_length=7)
made = LavisCaptioner({cfg!r}, ModelsConfig(), "cpu")(images, list("abcd"))
assert len(set(alone)) > 1, alone
for told, [caption] in zip(alone, made, strict=True):
    assert caption and told.startswith(caption), (told, caption)
    cut = told.split()[len(caption.split()) : 6]
    assert set(cut) <= {{"a", "on"}}, (told, caption)  # what led to the seventh word
"""
    )
    done = subprocess.run([PYTHON, script], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_model_that_lavis_does_not_have_is_refused_before_work(config: Config) -> None:
    with pytest.raises(UserError, match=r"lavis_type: .* no type 'large'; it has random"):
        interpreter(config(lavis_type="large"))
    with pytest.raises(UserError, match="no model 'blip9'"):
        interpreter(config(lavis_model="blip9"))


@pytest.mark.parametrize("kind", ["of another model", "does not load"])
def test_a_wrong_checkpoint_is_one_line(tmp_path: Path, config: Config, kind: str) -> None:
    checkpoint = tmp_path / "checkpoint.pth"
    if kind == "does not load":
        checkpoint.write_bytes(b"no weights")
    else:
        import torch

        torch.save({"model": {"head": torch.zeros(1)}}, checkpoint)
    storage = Storage(tmp_path / "root")
    write_images(storage)
    with pytest.raises(UserError, match=kind) as caught:
        run(storage, config(lavis_checkpoint=str(checkpoint)))
    assert "\n" not in str(caught.value)
