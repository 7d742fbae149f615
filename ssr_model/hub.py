"""A saved SSR-Encoder on the Hugging Face hub: its three files, and nothing besides."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ssr_model.card import is_hub_id, model_card
from ssr_model.encoder import SSRAdapter
from ssr_model.weights import CARD, CONFIG, WEIGHTS, save_adapter, write_whole

MESSAGE = "Upload an SSR-Encoder"
_MODELS = ("base_model", "vision_model")
_MAIN = "main"
_STATUS = {
    401: "the hub does not accept the token; set HF_TOKEN to a valid one, or run `hf auth login`",
    403: "the token may not write there; take one with write access to the owner",
    404: "no such model, branch or owner on the hub; see to the name",
}


def push(
    adapter: SSRAdapter,
    metadata: Mapping[str, Any],
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    commit_message: str = MESSAGE,
    create_pr: bool = False,
    license: str | None = None,
    dtype: torch.dtype | None = None,
) -> str:
    """Commit config.json, model.safetensors and the model card to the hub, all in one commit.

    Args:
        metadata: as `save_adapter` takes it. A base or vision model that is a folder is not named:
            others have no such folder, and its path is nobody's business.
        repo_id: owner/name; made where it is missing, and then `private` says who sees it.
        revision: branch, made where it is missing; None = main.
        token: None = $HF_TOKEN, or what `hf auth login` saved.
        create_pr: open a pull request on a model that is there, in place of a commit.
        license: for the card, as the hub names it; None = that of the base model.
        dtype: of the stored weights; None = as they are.

    Returns:
        Address of the commit, or of the pull request.

    Raises:
        ValueError: one line: the name is none, there is no token, the hub refuses (401, 403, 404),
            is out of reach, or is switched off (HF_HUB_OFFLINE).
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    if not is_hub_id(repo_id):
        raise ValueError(f"{repo_id!r} is not a hub id; write owner/name.")
    if create_pr and revision not in (None, _MAIN):
        raise ValueError(f"a pull request goes to main, not to {revision}: give one of the two.")
    if not (token or get_token()):
        raise ValueError(f"cannot push {repo_id}: no token; set HF_TOKEN, or run `hf auth login`.")
    said, branch = _public(metadata, license), None if revision == _MAIN else revision
    with tempfile.TemporaryDirectory(prefix="ssr-hub-") as folder, _one_line(repo_id, token):
        save_adapter(folder, adapter, said, dtype)
        write_whole(Path(folder, CARD), model_card(adapter, said, repo_id, branch).encode())
        files = [CommitOperationAdd(name, str(Path(folder, name))) for name in FILES]
        api = HfApi(token=token)
        if not create_pr:
            api.create_repo(repo_id, private=private, exist_ok=True)
            if branch is not None:
                api.create_branch(repo_id, branch=branch, exist_ok=True)
        done = api.create_commit(
            repo_id, files, commit_message=commit_message, revision=revision, create_pr=create_pr
        )
    return str(done.pr_url if create_pr else done.commit_url)


FILES = (CONFIG, WEIGHTS, CARD)
"""What is pushed."""


def _public(metadata: Mapping[str, Any], license: str | None) -> dict[str, str]:
    said = {key: str(value) for key, value in metadata.items() if value is not None}
    for name in _MODELS:
        if name in said and (not is_hub_id(said[name]) or Path(said[name]).is_dir()):
            del said[name]
    return {**said, **({"license": license} if license else {})}


@contextlib.contextmanager
def _one_line(repo_id: str, token: str | None) -> Iterator[None]:
    """What the hub's client raises, as a ValueError of one line that holds no token."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

    try:
        yield
    except OfflineModeIsEnabled:
        why = "HF_HUB_OFFLINE is set, which keeps from every hub; unset it"
    except HfHubHTTPError as error:
        status = error.response.status_code
        told = _first_line(error.server_message or str(error), token)
        why = f"{_STATUS[status]} ({told})" if status in _STATUS else f"the hub answers: {told}"
    except HTTPError as error:
        told = _first_line(str(error) or type(error).__name__, token)
        why = f"{constants.ENDPOINT} is out of reach ({told}); try again"
    except (LookupError, TypeError) as error:
        why = f"the hub's answer is none that its client understands ({error})"
    except (OSError, ValueError, RuntimeError) as error:
        why = _first_line(str(error) or type(error).__name__, token)
    else:
        return
    raise ValueError(f"cannot push {repo_id}: {why.rstrip('.')}.")


def _first_line(text: str, token: str | None) -> str:
    from huggingface_hub import get_token

    for secret in (token, get_token()):
        if secret:
            text = text.replace(secret, "***")
    return " ".join(text.split())[:300]
