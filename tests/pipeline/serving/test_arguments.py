"""Settings of a service as `args` of a Ray Serve config."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.errors import UserError
from pipeline.serving.arguments import HOST, settings

LEAST = {"token_file": "/secret/token", "device": "cpu"}


def test_a_tree_and_dotted_keys_are_the_same_settings() -> None:
    tree = {
        "limits": {"side": 256, "steps": 7},
        "steps": 7,
        "models": {"revision": None},
        "page": False,
    }
    dotted = {
        "limits.side": 256,
        "limits.steps": 7,
        "steps": 7,
        "models.revision": None,
        "page": False,
    }
    cfg = settings(LEAST | tree)
    assert cfg == settings(LEAST | dotted)
    assert (cfg.limits.side, cfg.limits.steps, cfg.page) == (256, 7, False)
    assert cfg.models.revision is None


def test_a_preset_is_where_they_start_and_names_are_the_environments() -> None:
    args = LEAST | {"preset": "sd15-h800", "root": "$PLACE/${RUN}", "controlnet": "a$$b"}
    cfg = settings(args, {"PLACE": "s3://b", "RUN": "r"})
    assert (cfg.root, cfg.controlnet, cfg.dtype) == ("s3://b/r", "a$b", "float16")


def test_it_counts_as_reached_by_others() -> None:
    cfg = settings(LEAST)
    assert cfg.host == HOST and not cfg.on_loopback


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"bach": 8}, "unknown setting --bach; did you mean --batch"),
        ({"limits": {"sides": 8}}, "unknown setting --limits.sides"),
        ({"batch": "many"}, "--batch: bad value, got 'many'"),
        ({"batch": 0}, "serve.batch is 0"),
        ({"limits": 5}, "limits"),
        ({"token_file": None}, "args.token_file: is not given"),
        ({"device": "auto"}, "args.device: auto depends"),
        ({"host": "127.0.0.1"}, "args.host: is said http_options.host"),
        ({"port": 9}, "args.port: is said http_options.port"),
        ({"ray": {"address": "auto"}}, "args.ray.address: is said nowhere"),
        ({"print-config": True}, "args.print-config: is said at the command line"),
        ({"help": True}, "args.help: is said at the command line"),
        ({"root": "$NOWHERE"}, "args.root: the environment has no NOWHERE"),
        ({"root": "a$"}, "has a $ that names nothing"),
        ({"root": "--page"}, "args.root: '--page' is no value"),
        ({"root": []}, "--root needs a value"),
    ],
)
def test_what_cannot_be_is_one_line(args: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        settings(LEAST | args, {})
    assert said in str(caught.value) and "\n" not in str(caught.value)
