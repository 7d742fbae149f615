"""Settings from presets, YAML files and the command line into a typed dataclass.

Later wins: the dataclass's defaults, `--preset NAME`, each `--config FILE`, `--dotted.key VALUE`.
A YAML file is either flat (what `--print-config` prints) or has a section per job and `shared`:

    extends: mini                 # optional: the preset that this file changes
    shared: {root: runs/mini}     # for every job that knows the key
    train: {semantic: {steps: 100}}
"""

from __future__ import annotations

import difflib
import json
import keyword
import os
import re
import sys
import typing
from argparse import SUPPRESS, ArgumentError
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from jsonargparse import ArgumentParser, set_parsing_settings

from pipeline.errors import UserError

T = TypeVar("T")
PRESETS = Path(__file__).parent / "presets"
_SECTIONS = ("shared", "curate", "train", "generate", "evaluate", "serve", "plan")
_OWN = ("preset", "config", "print-config", "help")


@dataclass(frozen=True)
class Command:
    """A sub-command of a job: `run` is given its settings and returns what to print."""

    help: str
    run: Callable[[Any], str]
    settings: type | None = None
    """Its dataclass of settings, which takes of a file what stands under `shared`; none = the
    job's."""


set_parsing_settings(docstring_parse_attribute_docstrings=True)


def parse(cls: type[T], argv: Sequence[str] | None = None, preset: str = "mini") -> T:
    """Settings of a job. Ends the process as a command line does: 0 after `--help` and
    `--print-config`, 2 after one line for an unknown key or a bad value.
    """
    try:
        return load(cls, sys.argv[1:] if argv is None else argv, preset)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)


def parse_command(
    cls: type[T], commands: Mapping[str, Command], argv: Sequence[str] | None = None
) -> tuple[Command | None, Any]:
    """`parse` for a job that has sub-commands: the one that the leading word names (None where
    there is no such word: the job itself), and its settings.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    name = words.pop(0) if words and not words[0].startswith("-") else ""
    try:
        if name and name not in commands:
            there = ", ".join(commands)
            near = _nearest(name, list(commands))
            raise UserError(f"unknown command {name!r}; {near} there are: {there}, or none")
        command = commands.get(name)
        if command is not None and command.settings is not None:
            return command, load(command.settings, words, commands={name: command})
        return command, load(cls, words, commands=commands)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)


def load(
    cls: type[T],
    argv: Sequence[str],
    preset: str = "mini",
    commands: Mapping[str, Command] | None = None,
) -> T:
    """`parse`, with faults raised as UserError."""
    own, rest = _split(cls, argv, commands or {})
    parser = _parser(cls, commands or {})
    # the preset's name, then the files: checked one by one, so that a fault names its file
    layers = [_preset(cls, own["preset"][-1] if own["preset"] else preset)]
    layers += [_section(cls, _read(Path(name)), name) for name in own["config"]]
    for source, values in layers:
        _check_keys(cls, values, source)
        parser.set_defaults(_flatten(_values(parser, cls, source, obj=values)))
    if own["help"]:
        parser.print_help()
        sys.exit(0)
    settings = _build(cls, _values(parser, cls, "", args=rest))
    _settle_paths(settings)
    if own["print-config"]:
        told = asdict(typing.cast(Any, settings), dict_factory=_by_setting)
        print(yaml.safe_dump(told, sort_keys=False), end="")
        sys.exit(0)
    return settings


def submitted() -> bool:
    """Whether this process is the driver of a job that `ray job submit` started."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def _settle_paths(settings: Any) -> None:
    """A submitted job runs in a copy of its working directory that Ray throws away: a relative
    path is meant from the home folder, where the next job finds what this one left.
    """
    if not submitted():
        return
    if hasattr(settings, "ablation"):
        _settle_paths(settings.ablation)
    for name in (
        "root", "data", "data_int8", "other", "out", "model", "init", "calibrate", "controlnet",
        "from_",
    ):  # fmt: skip
        path = getattr(settings, name, None)
        if not path or "://" in path or Path(path).expanduser().is_absolute():
            continue
        # weights may also be a hub id, or a folder of the working directory
        away = not Path(path).exists() and (Path.home() / path).exists()
        if name in ("root", "other", "out") or away:
            setattr(settings, name, str(Path.home() / path))


def presets() -> list[str]:
    """Names of the presets that ship with the package."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def setting(field: str) -> str:
    """What people call a field: `from_` is `from`, which Python keeps for itself."""
    bare = field.removesuffix("_")
    return bare if keyword.iskeyword(bare) else field


def _by_setting(fields: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    return {setting(name): value for name, value in fields}


def keys(cls: type) -> dict[str, Any]:
    """Every setting as a dotted key, with its type."""
    found: dict[str, Any] = {}
    for name, kind in _by_setting(list(typing.get_type_hints(cls).items())).items():
        if is_dataclass(kind):
            found |= {
                f"{name}.{key}": inner for key, inner in keys(typing.cast(type, kind)).items()
            }
        else:
            found[name] = kind
    return found


# --- the command line -------------------------------------------------------------------


def _split(
    cls: type, argv: Sequence[str], commands: Mapping[str, Command]
) -> tuple[dict[str, list[str]], list[str]]:
    """Our own options and the rest; unknown keys are refused here, lists made JSON."""
    known = keys(cls)
    own: dict[str, list[str]] = {name: [] for name in _OWN}
    values: dict[str, list[str]] = {}
    words = list(argv)
    while words:
        word = words.pop(0)
        if word == "-h":
            word = "--help"
        if word in commands:
            raise UserError(f"{word} is a command and comes first: {_program() or ''} {word} ...")
        if not word.startswith("--"):
            raise UserError(f"{word!r} is not a setting; write --key value, see --help")
        name, equals, value = word[2:].partition("=")
        name = name.replace("_", "-") if name.replace("_", "-") in _OWN else name.replace("-", "_")
        if name in ("print-config", "help"):
            own[name].append("")
            continue
        if name not in known and name not in _OWN:
            raise UserError(
                f"unknown setting --{name}; {_nearest(name, [*known, *_OWN], dashes=True)}"
            )
        given = [value] if equals else []
        many = typing.get_origin(known.get(name)) is list
        while words and not words[0].startswith("--") and (many or not given):
            given.append(words.pop(0))
        if not given:
            raise UserError(f"--{name} needs a value{_expected(known.get(name))}")
        if name in _OWN:
            own[name] += given
        elif many:
            values.setdefault(name, []).extend(_listed(given))
        else:
            values[name] = given[-1:]
    rest = []
    for name, given in values.items():
        many = typing.get_origin(known[name]) is list
        rest += [f"--{name}={json.dumps(given) if many else given[0]}"]
    return own, rest


def _listed(given: list[str]) -> list[str]:
    """A list in YAML's brackets; anything else, a glob such as [0-9]*, stands for itself."""
    if len(given) == 1 and given[0].startswith("[") and given[0].endswith("]"):
        try:
            return [str(item) for item in yaml.safe_load(given[0])]
        except yaml.YAMLError:
            pass
    return given


def _program() -> str | None:
    return f"python {sys.argv[0]}" if sys.argv and sys.argv[0].endswith(".py") else None


def _parser(cls: type, commands: Mapping[str, Command]) -> ArgumentParser:
    word = f"[{' | '.join(commands)}] " if commands else ""
    told = "; ".join(f"{name}: {command.help}" for name, command in commands.items())
    parser = ArgumentParser(
        prog=_program(),
        exit_on_error=False,
        usage=f"%(prog)s {word}[--preset NAME] [--config FILE] [--print-config] [--KEY VALUE ...]",
        description=f"{(cls.__doc__ or '').strip()} Lists take several values: --key one two."
        + (f" Commands, written before the settings: {told}." if told else ""),
    )
    parser.add_argument(
        "--preset", metavar="NAME", help=f"Settings to start from: {', '.join(presets())}."
    )
    parser.add_argument(
        "--config", metavar="FILE", help="YAML file of settings over the preset; repeatable."
    )
    parser.add_argument(
        "--print-config", action="store_true", help="Print the settings as YAML and end."
    )
    parser.add_class_arguments(cls)
    for action in parser._actions:
        group, dot, field = action.dest.rpartition(".")
        if setting(field) != field:
            action.dest = f"{group}{dot}{setting(field)}"
            action.option_strings = [f"--{action.dest}"]
            parser._option_string_actions[f"--{action.dest}"] = action
        if action.metavar == "CONFIG" or type(action).__name__ == "_ActionConfigLoad":
            action.help = SUPPRESS  # a YAML file per group: --config does that for all
    return parser


def _values(parser: ArgumentParser, cls: type, source: str, **given: Any) -> Any:
    try:
        if "args" in given:
            return parser.parse_args(given["args"])
        return parser.parse_object(given["obj"])
    except (ArgumentError, ValueError, TypeError, KeyError) as error:
        raise UserError(_bad_value(str(error), cls, source)) from None


def _bad_value(text: str, cls: type, source: str) -> str:
    key = re.search(r'key "([\w.]+)"', text)
    value = re.search(r"(?:Given|Got) value: (.*)", text)
    where = f"{source}: " if source else "--"
    if key is None:
        return f"{where}{' '.join(text.split())[:300]}"
    kind = keys(cls).get(key[1])
    got = f", got {value[1].strip()!r}" if value else ""
    return f"{where}{key[1]}: bad value{got}{_expected(kind)}"


def _expected(kind: Any) -> str:
    return f"; expected {_spell(kind)}" if kind is not None else ""


def _spell(kind: Any) -> str:
    if typing.get_origin(kind) is typing.Literal:
        return "one of " + ", ".join(map(str, typing.get_args(kind)))
    names = {
        int: "a whole number",
        float: "a number",
        str: "text",
        bool: "true or false",
        type(None): "null",
    }
    if kind in names:
        return names[kind]
    inner = [_spell(item) for item in typing.get_args(kind)]
    if typing.get_origin(kind) is list:
        return f"a list of {inner[0]}"
    return " or ".join(inner) or str(kind)


def _nearest(name: str, known: Sequence[str], dashes: bool = False) -> str:
    def likeness(key: str) -> float:
        whole = difflib.SequenceMatcher(None, name, key).ratio()
        last = difflib.SequenceMatcher(None, name.split(".")[-1], key.split(".")[-1]).ratio()
        return max(whole, 0.95 * last) + 0.05 * whole

    return f"did you mean {'--' if dashes else ''}{max(known, key=likeness)}?"


# --- YAML -------------------------------------------------------------------------------


def _preset(cls: type, name: str) -> tuple[str, dict[str, Any]]:
    if name not in presets():
        raise UserError(
            f"unknown preset {name!r}; {_nearest(name, presets())} "
            f"there are: {', '.join(presets())}"
        )
    return _section(cls, _read(PRESETS / f"{name}.yaml"), f"preset {name}", exact=True)


def _read(path: Path) -> dict[str, Any]:
    """A YAML file of settings, with what it extends merged in."""
    try:
        data = yaml.safe_load(path.read_text()) or {}
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; name a YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path} must hold settings (key: value), not {type(data).__name__}")
    parent = data.pop("extends", None)
    if parent is None:
        return data
    if parent not in presets():
        raise UserError(
            f"{path}: extends unknown preset {parent!r}; {_nearest(str(parent), presets())}"
        )
    return _merge(_read(PRESETS / f"{parent}.yaml"), data)


def _section(
    cls: type, data: dict[str, Any], source: str, exact: bool = False
) -> tuple[str, dict[str, Any]]:
    """What a file says to the job `cls`: the file itself where it is flat, else its section."""
    job = cls.__name__.removesuffix("Config").lower()
    if not data or not set(data) & set(_SECTIONS):
        return source, data
    for name in data:
        if name not in _SECTIONS:
            raise UserError(f"{source}: unknown section {name}; {_nearest(str(name), _SECTIONS)}")
    if exact and job in _SECTIONS and job not in data:
        having = [name for name in presets() if job in _read(PRESETS / f"{name}.yaml")]
        raise UserError(
            f"{source} has no settings for {job}; presets that have: {', '.join(having)}"
        )
    shared, own = data.get("shared") or {}, data.get(job) or {}
    for section, values in (("shared", shared), (job, own)):
        if not isinstance(values, Mapping):
            raise UserError(f"{source}: {section} must hold settings (key: value), got {values!r}")
    names, of_any_job = _top(cls), _of_any_job()
    for key in shared:
        if key not in of_any_job:
            near = _nearest(str(key), of_any_job)
            raise UserError(f"{source}: unknown setting shared.{key}; {near}")
    known = {key: value for key, value in shared.items() if key in names}
    return source, _merge(known, own)


def _of_any_job() -> list[str]:
    """First parts of the settings of all jobs: what a file's `shared` section may hold."""
    from pipeline import config  # which imports this module

    jobs = [getattr(config, f"{section.capitalize()}Config", None) for section in _SECTIONS]
    return list(dict.fromkeys(key for job in jobs if job for key in _top(job)))


def _top(cls: type) -> list[str]:
    """First parts of a job's settings."""
    return list(dict.fromkeys(key.partition(".")[0] for key in keys(cls)))


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        if isinstance(below, Mapping) and isinstance(value, Mapping):
            merged[key] = _merge(below, value)
        else:
            merged[key] = value
    return merged


def _check_keys(cls: type, values: Mapping[str, Any], source: str, prefix: str = "") -> None:
    known = keys(cls)
    groups = {key.rpartition(".")[0] for key in known} - {""}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if name in groups:
            if not isinstance(value, Mapping):
                raise UserError(f"{source}: {name} must hold settings of its own, got {value!r}")
            _check_keys(cls, value, source, f"{name}.")
        elif name not in known:
            raise UserError(f"{source}: unknown setting {name}; {_nearest(name, list(known))}")


def _flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in vars(values).items():
        if hasattr(value, "__dict__") and not isinstance(value, str):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _build(cls: type[T], values: Any) -> T:
    hints = typing.get_type_hints(cls)
    fields = {
        name: _build(typing.cast(type, kind), getattr(values, name))
        if is_dataclass(kind)
        else getattr(values, setting(name))
        for name, kind in hints.items()
    }
    return cls(**fields)
