"""Settings of the service as a Ray Serve config gives them: `args` of an application."""

from __future__ import annotations

import os
import string
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from pipeline.command_line import load
from pipeline.config.serve import ServeConfig
from pipeline.errors import UserError

HOST, PORT = "0.0.0.0", 8000
"""Where the proxies of a service on Kubernetes listen, each in its pod: what http_options of the
config say.
"""
IMPORT_PATH = "pipeline.serving.rayservice:build"
FRONT_CPUS = 1
"""Of the front: none would let it land on the head, which offers no CPU, so that nothing works
there.
"""
_ELSEWHERE = {
    "host": "http_options.host, beside applications",
    "port": "http_options.port, beside applications",
    "ray": "nowhere: the service runs on the cluster that was given this config",
    "help": "at the command line: python jobs/serve.py --help",
    "print_config": "at the command line: python jobs/serve.py --print-config",
}


def settings(args: Mapping[str, Any], environment: Mapping[str, str] = os.environ) -> ServeConfig:
    """What jobs/serve.py makes of the same words: preset, config, and its settings, as a tree or by
    dotted keys. `$NAME` in a text is the environment's.

    Raises UserError for what jobs/serve.py refuses, without a token_file, and for a device that is
    left open: pods with GPUs may come later than this is asked.
    """
    words = []
    for name, value in _flat(args):
        part = name.partition(".")[0].replace("-", "_")
        if part in _ELSEWHERE:
            raise UserError(f"args.{name}: is said {_ELSEWHERE[part]}; leave it out")
        words += [f"--{name}", *_texts(name, value, environment)]
    cfg = replace(load(ServeConfig, words), host=HOST, port=PORT)
    if cfg.token_file is None:
        raise UserError(
            "args.token_file: is not given, and other pods reach the service; mount a Secret, and "
            "name its file"
        )
    if cfg.device == "auto":
        raise UserError("args.device: auto depends on which nodes are there; say cuda or cpu")
    return cfg


def _flat(args: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in args.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _flat(value, f"{name}.")
        else:
            yield name, value


def _texts(name: str, value: Any, environment: Mapping[str, str]) -> list[str]:
    """As words of a command line, which is in YAML."""
    if isinstance(value, list):
        return [text for item in value for text in _texts(name, item, environment)]
    if value is None or isinstance(value, bool):
        return ["null" if value is None else str(value).lower()]
    try:
        text = string.Template(str(value)).substitute(environment)
    except KeyError as fault:
        raise UserError(
            f"args.{name}: the environment has no {fault.args[0]}; set it in every Ray pod"
        ) from None
    except ValueError:
        raise UserError(f"args.{name}: {value!r} has a $ that names nothing; write $$") from None
    if text.startswith("--"):
        raise UserError(f"args.{name}: {text!r} is no value")
    return [text]
