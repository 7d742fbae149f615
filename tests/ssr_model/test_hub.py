"""To the hub and back, by huggingface_hub's own client, from and to a hub on loopback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load, save

from ssr_model import SSREncoder, hub
from ssr_model.weights import load_adapter
from tests.ssr_model.conftest import make_ssr
from tests.ssr_model.loopback_hub import READ, WRITE, Hub, loopback_hub

REPOSITORY = Path(__file__).resolve().parents[2]
FILES = ["README.md", "config.json", "model.safetensors"]


@pytest.fixture(scope="module")
def server() -> Iterator[Hub]:
    with loopback_hub() as running:
        yield running


@pytest.fixture(scope="module")
def saved(tiny_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in a folder with things beside it that are nobody's business."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(tiny_models / "sd", subfolder="unet")
    ssr = make_ssr(tiny_models, unet)
    ssr.metadata.update(stage="multi_scale", step="100", note="a | b")
    folder = tmp_path_factory.mktemp("saved") / "model"
    ssr.save_pretrained(folder)
    (folder / "secret.txt").write_text("mine")
    (folder / "train").mkdir()
    return folder


def python(server: Hub, home: Path, *words: str, **variables: str) -> Any:
    environment = {k: v for k, v in os.environ.items() if k != "HF_TOKEN"} | {
        "HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(REPOSITORY), **variables,
    }  # fmt: skip
    return subprocess.run(
        [sys.executable, *words], env=environment, capture_output=True, text=True, timeout=280,
        cwd=REPOSITORY,
    )  # fmt: skip


def test_there_and_back(server: Hub, saved: Path, tiny_models: Path, tmp_path: Path) -> None:
    """Pushed twice and as a pull request; each revision is loaded as it was pushed."""
    script = f"""if True:
        import json, os, torch
        from ssr_model import SSREncoder
        from ssr_model.weights import fetch
        frozen = dict(vision={str(tiny_models / "clip")!r}, base={str(tiny_models / "sd")!r})
        ssr = SSREncoder.from_pretrained({str(saved)!r})
        said = []
        os.environ["HF_TOKEN"] = {WRITE!r}
        said.append(ssr.push_to_hub("owner/name", private=True))
        first = {{k: v.clone() for k, v in ssr.adapter.state_dict().items()}}
        with torch.no_grad():
            ssr.adapter.encoder.norm.weight.add_(1)
        ssr.metadata["base_model"] = "owner/base"
        said.append(ssr.push_to_hub("owner/name", revision="next", license="openrail",
                                    commit_message="better", dtype=torch.float16))
        said.append(ssr.push_to_hub("owner/name", create_pr=True))
        del os.environ["HF_TOKEN"]
        commit = said[0].rpartition("/")[2]
        for revision in (None, "main", commit, "next"):
            got = SSREncoder.from_pretrained("owner/name", **frozen, revision=revision)
            same = all(torch.equal(first[k], v) for k, v in got.adapter.state_dict().items())
            said.append([same, got.metadata["step"], got.metadata.get("base_model")])
        said.append(sorted(p.name for p in fetch("owner/name").iterdir()))
        for name, revision in (("owner/other", None), ("owner/name", "gone"), ("owner/a b", None)):
            try:
                fetch(name, revision)
            except ValueError as error:
                said.append(str(error))
        print(json.dumps(said))
    """
    ran = python(server, tmp_path, "-c", script)
    assert ran.stdout, ran.stderr
    first, second, asked, *loaded = json.loads(ran.stdout)
    repository = server.repositories["owner/name"]
    assert first == f"{server.url}/owner/name/commit/{repository.branches['main']}"
    assert second == f"{server.url}/owner/name/commit/{repository.branches['next']}"
    assert asked == f"{server.url}/owner/name/discussions/1" and len(repository.requests) == 1
    assert repository.private and repository.messages[repository.branches["next"]] == "better"
    for commit in repository.commits.values():  # those three, and what a new repository holds
        assert set(commit) <= {*FILES, ".gitattributes"}
    assert loaded[:4] == [[True, "100", None]] * 3 + [[False, "100", "owner/base"]]
    assert loaded[4] == FILES
    assert "owner/other: no such folder, and not found on the hub" in loaded[5]
    assert "owner/name: no such folder, and not found on the hub" in loaded[6]
    assert "not a hub id" in loaded[7] and not any("\n" in line for line in loaded[5:])

    main, later = (repository.commits[repository.branches[name]] for name in ("main", "next"))
    tensors = load(later["model.safetensors"])
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert len(main["model.safetensors"]) > 4096  # by LFS
    for files in (main, later):
        told = b"".join(files[name] for name in FILES)
        assert str(tiny_models).encode() not in told and b"mine" not in told
    cards = [yaml.safe_load(files["README.md"].decode().split("---")[1]) for files in (main, later)]
    assert cards[0]["license"] == "other" and "base_model" not in cards[0]
    assert cards[1]["license"] == "openrail" and cards[1]["base_model"] == "owner/base"
    assert cards[1]["library_name"] == "diffusers" and cards[1]["pipeline_tag"] == "text-to-image"
    told, branch = (files["README.md"].decode() for files in (main, later))
    assert 'from_pretrained("owner/name", vision=' in told
    assert 'from_pretrained("owner/name", revision="next", vision=' in branch
    assert "The base model and the vision model of training had no name on the hub" in told
    assert "The vision model of training had no name on the hub" in branch


def test_the_job_pushes(server: Hub, saved: Path, tmp_path: Path) -> None:
    words = ["jobs/train.py", "push", "--model", str(saved), "--repo", "owner/of-job"]
    ran = python(server, tmp_path, *words, "--private", "true", HF_TOKEN=WRITE)
    assert ran.returncode == 0, ran.stderr
    repository = server.repositories["owner/of-job"]
    where = f"{server.url}/owner/of-job/commit/{repository.branches['main']}"
    assert ran.stdout.strip().replace("\n", "") == f"pushed:   {saved} as owner/of-job: {where}"
    pushed = repository.commits[repository.branches["main"]]
    assert set(pushed) == {*FILES, ".gitattributes"} and repository.private
    ours, theirs = load_adapter(saved)[0].state_dict(), load(pushed["model.safetensors"])
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)

    tensors = load((saved / "model.safetensors").read_bytes())
    hostile = tmp_path / "hostile"
    hostile.mkdir()
    (hostile / "config.json").write_bytes((saved / "config.json").read_bytes())
    (hostile / "model.safetensors").write_bytes(save({"x": tensors.popitem()[1]}))
    words[3] = str(hostile)
    before = len(server.asked)
    ran = python(server, tmp_path, *words, HF_TOKEN=WRITE)
    assert ran.returncode == 2 and len(server.asked) == before
    assert ran.stderr.startswith(f"error: {hostile}/model.safetensors: format None"), ran.stderr


def test_every_refusal_is_one_line(server: Hub, saved: Path, tmp_path: Path) -> None:
    script = f"""if True:
        import json, os, socket
        from ssr_model import hub
        from ssr_model.weights import load_adapter
        adapter, said = load_adapter({str(saved)!r})
        lines = []
        def refused(name="owner/name", **options):
            try:
                lines.append("pushed " + hub.push(adapter, said, name, **options))
            except ValueError as error:
                lines.append(str(error))
        refused()
        refused("name")
        refused("../../etc/x y")
        refused(token="hf_unknown_token")
        refused(token={READ!r})
        refused("owner/none", token={WRITE!r}, create_pr=True)
        refused(token={WRITE!r}, create_pr=True, revision="next")
        nobody = socket.socket()  # bound and never listening: every connection is refused
        nobody.bind(("127.0.0.1", 0))
        os.environ["HF_ENDPOINT"] = away = f"http://127.0.0.1:{{nobody.getsockname()[1]}}"
        from huggingface_hub import constants, hf_api
        constants.ENDPOINT = away
        refused(token={WRITE!r})
        print(json.dumps(lines))
    """
    ran = python(server, tmp_path, "-c", script)
    assert ran.stdout, ran.stderr
    lines = json.loads(ran.stdout)
    expected = [
        "cannot push owner/name: no token; set HF_TOKEN, or run `hf auth login`.",
        "'name' is not a hub id; write owner/name.",
        "'../../etc/x y' is not a hub id; write owner/name.",
        "cannot push owner/name: the hub does not accept the token; set HF_TOKEN to a valid one",
        "cannot push owner/name: the token may not write there; take one with write access",
        "cannot push owner/none: no such model, branch or owner on the hub; see to the name",
        "a pull request goes to main, not to next",
        "cannot push owner/name: http://127.0.0.1:",
    ]
    assert len(lines) == len(expected)
    for line, begins in zip(lines, expected, strict=True):
        assert line.startswith(begins) and "\n" not in line, line
        assert "hf_unknown_token" not in line and WRITE not in line and READ not in line
    assert "is out of reach" in lines[-1]
    assert "owner/none" not in server.repositories


def test_offline_is_one_line(saved: Path) -> None:
    """These tests run with HF_HUB_OFFLINE set."""
    adapter, said = load_adapter(saved)
    with pytest.raises(ValueError, match=r"cannot push a/b: HF_HUB_OFFLINE is set.*unset it\.$"):
        hub.push(adapter, said, "a/b", token="hf_something")
    assert SSREncoder.push_to_hub.__doc__
