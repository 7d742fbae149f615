"""Settings: presets, files, overrides, and refusals in one line that names the nearest key."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from pipeline.command_line import Command, keys, load, presets
from pipeline.config import (
    CompareConfig,
    CurateConfig,
    EvaluateConfig,
    ExportConfig,
    GenerateConfig,
    ServeConfig,
    TrainConfig,
    parse,
    parse_command,
)
from pipeline.errors import UserError

JOBS = [
    CurateConfig, TrainConfig, GenerateConfig, EvaluateConfig, ExportConfig, CompareConfig,
    ServeConfig,
]  # fmt: skip


def refusal(cls: type, argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that `argv` ends in."""
    with pytest.raises(SystemExit) as ended:
        parse(cls, argv)
    assert ended.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.mark.parametrize("cls", JOBS)
@pytest.mark.parametrize("preset", ["mini", "mini-short"])
def test_every_job_parses_without_arguments(cls: type, preset: str) -> None:
    settings = parse(cls, [], preset=preset)
    assert isinstance(settings, cls)
    assert settings.root == f"runs/{preset}"


def test_the_reference_presets_hold_the_papers_settings() -> None:
    curate = parse(CurateConfig, ["--preset", "laion-sd15"])
    assert (curate.filter.min_aesthetic, curate.download.image_size) == (6.0, 512)
    assert (curate.features.scales, curate.download.encode_format) == (6, "jpg")
    assert curate.models.vision == "openai/clip-vit-large-patch14"
    train = parse(TrainConfig, ["--preset", "sd15-h800"])
    assert (train.semantic.steps, train.multi_scale.steps) == (1_000_000, 100_000)
    assert (train.workers, train.global_batch) == (8, 128)
    assert (train.semantic.lr, train.tau, train.precision) == (5e-5, 0.01, "bf16")
    assert (train.queries, train.start_token, train.drop_article) == (1, True, 0.0)
    assert train.root == curate.root


def test_later_layers_win(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("shared: {root: there}\ntrain: {semantic: {steps: 7, lr: 1e-3}, tau: 1}\n")
    settings = parse(TrainConfig, ["--config", str(file), "--semantic.steps=9"])
    assert settings.root == "there"
    assert (settings.semantic.steps, settings.semantic.lr, settings.tau) == (9, 1e-3, 1.0)
    assert isinstance(settings.tau, float)
    assert settings.lanes == parse(TrainConfig, []).lanes


def test_lists_and_null() -> None:
    argv = ["--image", "a.png", "b.png", "--query", "cup", "", "--image", "c.png", "--prompt=null"]
    settings = parse(GenerateConfig, argv)
    assert settings.image == ["a.png", "b.png", "c.png"]
    assert settings.query == ["cup", ""]
    assert settings.prompt is None
    assert parse(CurateConfig, ['--redo=["units","images"]']).redo == ["units", "images"]


def test_dashes_are_underscores_and_negative_values_are_values() -> None:
    settings = parse(TrainConfig, ["--global-batch", "64", "--tau", "-1"])
    assert (settings.global_batch, settings.tau) == (64, -1.0)


@pytest.mark.parametrize("cls", JOBS)
def test_what_is_printed_can_be_read_back(
    cls: type, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(cls, ["--preset", "mini-short", "--root", "elsewhere", "--print-config"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert yaml.safe_load(text)["root"] == "elsewhere"
    (tmp_path / "printed.yaml").write_text(text)
    again = parse(cls, ["--config", str(tmp_path / "printed.yaml")])
    assert again == parse(cls, ["--preset", "mini-short", "--root", "elsewhere"])


@dataclass
class Inner:
    """A group of settings."""

    lambda_: float = 1.0
    """A weight."""


@dataclass
class Keywords:
    """Settings whose names Python keeps for itself."""

    root: str = "runs/mini"
    """A folder."""
    from_: str | None = None
    """Where it comes from."""
    is_: list[int] = field(default_factory=list)
    """Numbers."""
    inner: Inner = field(default_factory=Inner)


def test_names_that_are_keywords(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A field `from_` is the setting `from`: on the command line, in files, help and errors."""
    argv = ["--from", "a.png", "--is", "1", "2", "--inner.lambda", "0.5"]
    given = load(Keywords, argv)
    assert given == Keywords(from_="a.png", is_=[1, 2], inner=Inner(lambda_=0.5))
    with pytest.raises(SystemExit):
        load(Keywords, [*argv, "--print-config"])
    (tmp_path / "printed.yaml").write_text(text := capsys.readouterr().out)
    assert yaml.safe_load(text)["inner"] == {"lambda": 0.5} and "from: a.png" in text
    assert load(Keywords, ["--config", str(tmp_path / "printed.yaml")]) == given
    assert load(Keywords, ["--config", str(tmp_path / "printed.yaml"), "--from", "b"]).from_ == "b"
    with pytest.raises(SystemExit):
        load(Keywords, ["--help"])
    assert "--from FROM " in (text := capsys.readouterr().out) and "from_" not in text
    assert "--inner.lambda LAMBDA" in text and "lambda_" not in text
    for argv, line in (
        (["--from_", "a"], "unknown setting --from_; did you mean --from?"),
        (["--form", "a"], "did you mean --from?"),
        (["--from"], "--from needs a value; expected text or null"),
        (["--inner.lambda", "x"], "--inner.lambda: bad value, got 'x'; expected a number"),
        (["--is", "x"], "--is: bad value"),
    ):
        with pytest.raises(UserError) as caught:
            load(Keywords, argv)
        assert line in str(caught.value)
    (tmp_path / "wrong.yaml").write_text("{from_: a}")
    with pytest.raises(UserError, match="unknown setting from_; did you mean from"):
        load(Keywords, ["--config", str(tmp_path / "wrong.yaml")])


@pytest.mark.parametrize("cls", JOBS)
def test_help_documents_every_setting(cls: type, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(cls, ["--help"])
    assert ended.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for key in keys(cls):
        _, found, after = text.partition(f"--{key} ")
        assert found, key
        assert "(type: " in after[:400], f"{key} has no default in --help"
        described = after[:400].partition("(type: ")[0]
        assert described.rstrip().endswith("."), f"{key} has no sentence in --help: {described}"


def test_help_shows_the_presets_values(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(TrainConfig, ["--preset", "sd15-h800", "--help"])
    assert "default: 1000000" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("cls", "argv", "said"),
    [
        (CurateConfig, ["--filter.min_astetic", "5"], "did you mean --filter.min_aesthetic?"),
        (TrainConfig, ["--stpes", "5"], "did you mean --semantic.steps?"),
        (TrainConfig, ["steps=5"], "'steps=5' is not a setting"),
        (TrainConfig, ["--semantic.steps"], "needs a value; expected a whole number"),
        (TrainConfig, ["--semantic.steps", "many"], "got 'many'; expected a whole number"),
        (TrainConfig, ["--workers", "x"], "expected a whole number or null"),
        (TrainConfig, ["--precision", "fp8"], "got 'fp8'; expected one of fp32, bf16"),
        (TrainConfig, ["--preset", "mimi"], "unknown preset 'mimi'; did you mean mini?"),
        (TrainConfig, ["--preset", "laion-sd15"], "has no settings for train"),
        (TrainConfig, ["--config", "/no/such.yaml"], "cannot read /no/such.yaml"),
    ],
)
def test_refusals(
    cls: type, argv: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in refusal(cls, argv, capsys)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("semantic: {stps: 5}", "unknown setting semantic.stps; did you mean semantic.steps?"),
        ("train: {semantic: {stps: 5}}", "unknown setting semantic.stps"),
        ("trian: {}\ntrain: {}", "unknown section trian; did you mean train?"),
        ("semantic: 5", "semantic must hold settings of its own, got 5"),
        ("semantic: {steps: many}", "semantic.steps: bad value, got 'many'"),
        ("extends: minni", "unknown preset 'minni'; did you mean mini?"),
        ("shared: {rooot: /x}", "unknown setting shared.rooot; did you mean root?"),
        ("shared: {sed: 3}", "unknown setting shared.sed; did you mean seed?"),
        ("shared: 3", "shared must hold settings (key: value), got 3"),
        ("train: [1]", "train must hold settings (key: value), got [1]"),
        ("- 1", "must hold settings"),
        ("a: [", "is not YAML"),
    ],
)
def test_refusals_in_files(
    text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    line = refusal(TrainConfig, ["--config", str(file)], capsys)
    assert said in line
    assert str(file) in line


def test_every_preset_is_valid_for_the_jobs_it_names(capsys: pytest.CaptureFixture[str]) -> None:
    absent = {
        ("laion-sd15", TrainConfig), ("laion-sd15", GenerateConfig), ("laion-sd15", EvaluateConfig),
        ("sd15-h800", CurateConfig), ("sd15-h800", EvaluateConfig),
        ("finetune-sd15", EvaluateConfig), ("sd15-bench", CurateConfig),
        ("sd15-bench", TrainConfig), ("sd15-bench", GenerateConfig),
        ("laion-sd15", ServeConfig), ("sd15-bench", ServeConfig),
    }  # fmt: skip
    for name in presets():
        for cls in JOBS:
            if (name, cls) in absent:
                assert "has no settings for" in refusal(cls, ["--preset", name], capsys)
            else:
                assert parse(cls, ["--preset", name]).root


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (["--download.threads", "0"], "download.threads is 0; it must be at least 1"),
        (["--caption_workers.cpus", "-1"], "caption_workers.cpus is -1.0; it must be at least 0"),
        (["--caption.batch_size", "-3"], "caption.batch_size is -3; it must be at least 1"),
        (["--website.port", "99999"], "website.port is 99999; a port is at most 65535"),
        (["--filter.max_rows", "0"], "filter.max_rows is 0; it must be at least 1"),
    ],
)
def test_what_cannot_be_is_refused(
    option: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in refusal(CurateConfig, option, capsys)


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (["--steps", "0"], "steps: 0 is not within 1 to 100, limits.steps"),
        (["--limits.steps", "20"], "steps: 30 is not within 1 to 20, limits.steps"),
        (["--guidance", "-1"], "guidance: -1.0 is not within 0 to 100"),
        (["--guidance_rescale", "7"], "guidance_rescale: 7.0 is not within 0 to 1"),
        (["--limits.side", "0"], "limits.side is 0; it must be at least 1"),
        (["--port", "65536"], "port: 65536 is not within 0 to 65535"),
    ],
)
def test_a_service_whose_defaults_nobody_could_ask_for_is_refused(
    option: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in refusal(ServeConfig, option, capsys)


def test_a_glob_is_no_list() -> None:
    assert parse(CurateConfig, ["--filter.inputs", "[0-9]*.parquet"]).filter.inputs == [
        "[0-9]*.parquet"
    ]
    assert parse(CurateConfig, ["--filter.inputs", "[a, b]"]).filter.inputs == ["a", "b"]


def test_what_any_job_knows_may_be_shared(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("shared: {seed: 3, references: 4, root: /data}")
    for cls in JOBS:
        settings = parse(cls, ["--config", str(file)])
        assert settings.root == "/data"
        assert getattr(settings, "seed", 3) == 3
    assert parse(GenerateConfig, ["--config", str(file)]).references == 4


def test_a_submitted_job_means_its_home_by_a_relative_root(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", "/home/ray")
    assert parse(TrainConfig, []).root == "runs/mini"
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert parse(TrainConfig, []).root == "/home/ray/runs/mini"
    for root in ("/data/run", "s3://bucket/run"):
        assert parse(TrainConfig, ["--root", root]).root == root
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "runs").mkdir()
    (tmp_path / "copy").mkdir()
    monkeypatch.chdir(tmp_path / "copy")  # where the checkout has a runs/ of its own
    for model, meant in (("runs", str(tmp_path / "runs")), ("owner/name", "owner/name")):
        assert parse(GenerateConfig, ["--model", model]).model == meant


COMMANDS = {"status": Command("how far it is", str), "report": Command("write the page", str)}


def test_a_leading_word_is_a_command() -> None:
    command, cfg = parse_command(CurateConfig, COMMANDS, ["status", "--root", "elsewhere"])
    assert command is COMMANDS["status"] and cfg.root == "elsewhere"
    command, cfg = parse_command(CurateConfig, COMMANDS, ["--root", "status"])
    assert command is None and cfg.root == "status"
    assert parse_command(CurateConfig, COMMANDS, [])[0] is None


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["statsu"], "unknown command 'statsu'; did you mean status? there are: status, report"),
        (["Report", "--root", "x"], "did you mean report?"),
        (["--root", "x", "status"], "status is a command and comes first: "),
        (["status", "report"], "report is a command and comes first: "),
        (["status", "--rot", "x"], "unknown setting --rot; did you mean --root?"),
    ],
)
def test_a_misspelt_or_misplaced_command_is_one_line(
    argv: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_command(CurateConfig, COMMANDS, argv)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and line in said and said.count("\n") == 1


def test_a_command_may_have_settings_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    commands = {"export": Command("write it", str, ExportConfig)}
    command, cfg = parse_command(
        TrainConfig, commands, ["export", "--preset", "sd15-h800", "--stage", "2"]
    )
    assert command is commands["export"] and cfg.stage == 2
    assert isinstance(cfg, ExportConfig) and cfg.root == "runs/laion-sd15"  # as `shared` says
    assert isinstance(parse_command(TrainConfig, commands, [])[1], TrainConfig)
    for argv, line in (
        (["export", "--stge", "1"], "unknown setting --stge; did you mean --stage?"),
        (["export", "--stage", "3"], "stage: bad value, got '3'; expected one of 1, 2 or null"),
    ):
        with pytest.raises(SystemExit):
            parse_command(TrainConfig, commands, argv)
        assert line in capsys.readouterr().err


def test_help_names_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["--help"], ["status", "--help"]):
        with pytest.raises(SystemExit) as ended:
            parse_command(CurateConfig, COMMANDS, argv)
        assert ended.value.code == 0
        text = " ".join(capsys.readouterr().out.split())
        assert "[status | report]" in text
        assert "status: how far it is; report: write the page." in text
    with pytest.raises(SystemExit):
        parse(TrainConfig, ["--help"])
    assert "Commands" not in capsys.readouterr().out


def test_files_that_workers_read_are_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    cfg = parse(
        CurateConfig,
        ["--scores.weights", "w.pth", "--caption.lavis_checkpoint", "~/c.pth",
         "--caption.lavis_opt", "opt", '--download.block_lists=["a.txt","s3://bucket/b.txt"]'],
    )  # fmt: skip
    assert cfg.scores.weights == str(tmp_path / "w.pth")
    assert cfg.caption.lavis_checkpoint == str(tmp_path / "home" / "c.pth")
    assert cfg.caption.lavis_opt == str(tmp_path / "opt")
    assert cfg.download.block_lists == [str(tmp_path / "a.txt"), "s3://bucket/b.txt"]
    away = "s3://bucket/w.safetensors"
    assert parse(CurateConfig, ["--scores.weights", away]).scores.weights == away
    assert CurateConfig().scores.weights is CurateConfig().caption.lavis_opt is None
