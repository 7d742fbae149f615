"""What the driver says of an environment that is not fit for LAVIS; tests/system has a fit one."""

import json
import platform
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from pipeline.config import CaptionConfig, ModelsConfig
from pipeline.curation.captioning.caption import CaptionStage, interpreter
from pipeline.curation.captioning.lavis_environment import LAVIS
from pipeline.errors import UserError

REQUIREMENTS = Path(__file__).parents[4] / "pipeline/curation/captioning/lavis-requirements.txt"


def cfg(**given: object) -> CaptionConfig:
    return CaptionConfig(backend="lavis", **given)  # type: ignore[arg-type]


def refusal(python: Path | str) -> str:
    with pytest.raises(UserError) as caught:
        interpreter(cfg(lavis_python=str(python)))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def fake(folder: Path, **told: str) -> Path:
    """An interpreter that answers like that of an environment with these versions."""
    minor = ".".join(platform.python_version_tuple()[:2])
    found = {"python": minor, "ray": version("ray"), "salesforce-lavis": LAVIS, **told}
    script = folder / "python"
    script.write_text(f"#!/bin/sh\necho noise\necho '{json.dumps(found)}'\n")
    script.chmod(0o755)
    return script


def test_the_transformers_backend_asks_for_no_environment() -> None:
    assert interpreter(CaptionConfig(lavis_python="not/there")) is None


def test_an_environment_that_is_not_there(tmp_path: Path) -> None:
    line = refusal(tmp_path / "bin" / "python")
    assert "is not there" in line and "make lavis-env" in line


def test_an_environment_without_lavis() -> None:
    line = refusal(sys.executable)  # ours: its transformers could not be LAVIS's
    assert "cannot run LAVIS" in line and "lavis" in line and "make lavis-env" in line


def test_a_file_that_is_no_interpreter(tmp_path: Path) -> None:
    (tmp_path / "python").write_text("hello")
    assert "does not run" in refusal(tmp_path / "python")


@pytest.mark.parametrize("said", ["", "hello", "12", '{"python": "3.12"}', "[1]"])
def test_a_program_that_tells_no_versions(tmp_path: Path, said: str) -> None:
    """Like /bin/true, which ends well and says nothing."""
    script = tmp_path / "python"
    script.write_text(f"#!/bin/sh\necho '{said}'\n")
    script.chmod(0o755)
    line = refusal(script)
    assert "is no python" in line and "instead of versions" in line and "make lavis-env" in line


@pytest.mark.parametrize("found", ["1.0.0", None])
def test_a_worker_compares_the_version_that_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: str | None
) -> None:
    """A node whose environment is older than the driver's would caption with other code."""
    if found is not None:
        folder = tmp_path / f"salesforce_lavis-{found}.dist-info"
        folder.mkdir()
        lines = ["Metadata-Version: 2.1", "Name: salesforce-lavis", f"Version: {found}"]
        (folder / "METADATA").write_text("\n".join(lines) + "\n")
        monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError) as caught:
        CaptionStage(cfg(), ModelsConfig(), "cpu").open()
    line = str(caught.value)
    assert f"has salesforce-lavis {found or 'not at all'}, but {LAVIS} is needed" in line
    assert sys.executable in line and "make lavis-env" in line and "\n" not in line


@pytest.mark.parametrize(
    ("name", "found"), [("ray", "2.1.0"), ("python", "3.8"), ("salesforce-lavis", "1.0.0")]
)
def test_other_versions_are_refused(tmp_path: Path, name: str, found: str) -> None:
    line = refusal(fake(tmp_path, **{name: found}))
    assert f"has {name} {found}" in line and "make lavis-env" in line


def test_a_fitting_environment_is_named_by_its_absolute_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "real").mkdir()
    real = fake(tmp_path / "real")
    (tmp_path / "python").symlink_to(real)
    monkeypatch.chdir(tmp_path)
    # a link stays one: an environment's interpreter is known by where it stands
    assert interpreter(cfg(lavis_python="python")) == str(tmp_path / "python")


def test_the_pins_are_complete_and_fit_ours() -> None:
    lines = [line.split("#")[0].strip() for line in REQUIREMENTS.read_text().splitlines()]
    pins = dict(line.split("==") for line in lines if line)
    assert pins["salesforce-lavis"] == LAVIS and pins["ray"] == version("ray")
    for name in ("pyarrow", "numpy"):  # what passes between the two is theirs to read
        assert pins[name].split(".")[0] == version(name).split(".")[0]


def test_what_a_lavis_model_is_made_of_is_in_its_settings(tmp_path: Path) -> None:
    checkpoint, opt = tmp_path / "weights.pth", tmp_path / "opt"
    checkpoint.write_bytes(b"one")
    opt.mkdir()
    (opt / "config.json").write_text("{}")
    (opt / "pytorch_model.bin").write_bytes(b"opt")
    given = {"lavis_checkpoint": str(checkpoint), "lavis_opt": str(opt)}

    def settings(**more: object) -> dict:
        return CaptionStage(cfg(**given, **more), ModelsConfig(), "cpu").settings

    first = settings()
    assert first["lavis"] == LAVIS and first["backend"] == "lavis"
    assert first["model"] == "blip2_opt" and first["type"] == "caption_coco_opt2.7b"
    assert len(first["checkpoint"]) == 64 and len(first["opt"]["sha256"]) == 64
    assert settings(batch_size=2, lavis_python="elsewhere") == first
    assert settings(lavis_type="pretrain_opt2.7b") != first and settings(top_p=0.5) != first
    checkpoint.write_bytes(b"two")
    assert settings()["checkpoint"] != first["checkpoint"]
    (opt / "pytorch_model.bin").write_bytes(b"other")
    assert settings()["opt"] != first["opt"]


@pytest.mark.parametrize("field", ["lavis_checkpoint", "lavis_opt"])
def test_weights_that_are_not_there_are_one_line(tmp_path: Path, field: str) -> None:
    stage = CaptionStage(cfg(**{field: str(tmp_path / "none")}), ModelsConfig(), "cpu")
    with pytest.raises(UserError, match=f"caption.{field}: .* is not there"):
        _ = stage.settings
