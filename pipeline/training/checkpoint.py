"""Checkpoints: whole or not there, checked when read, enough to go on bit for bit.

    checkpoints/step-00000250/trainables.safetensors   what is learned
                              optimizer.safetensors    AdamW's moments, by parameter name
                              ema.safetensors          the moving average, if there is one
                              rng.safetensors          torch's generator states, by rank
                              checkpoint.json          the marker, written last: step, hashes

A folder without its marker does not exist. The learning rate and the position in the data are
functions of the step, so the step is all there is to say of them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from pipeline.errors import UserError
from pipeline.progress import say
from pipeline.storage import Storage

_FOLDER = "checkpoints"
MARKER = "checkpoint.json"
"""Of a whole checkpoint, in its folder."""
_FILE = re.compile(rf"^{_FOLDER}/step-(\d+)/")
_STEP = re.compile(rf"^{_FOLDER}/step-(\d+)/{re.escape(MARKER)}$")


class DamagedCheckpoint(UserError):
    """Its bytes are not those that were written, or not all there; the store itself is well."""


@dataclass
class Snapshot:
    """The state of a stage after `step` optimizer steps; tensors on the CPU, by name, copies."""

    step: int
    trainables: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    rng: dict[str, Tensor] = field(default_factory=dict)
    ema: dict[str, Tensor] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)
    """What else the marker says: settings' fingerprint, world size, the model's config."""


@dataclass
class Weights:
    """What a checkpoint is of use for beyond its own run: the trained tensors, by name."""

    step: int
    tensors: dict[str, Tensor]
    averaged: bool
    """Whether they are the moving average, which stands for the trainables where there is one."""
    info: dict[str, Any]
    """As in `Snapshot`."""


class Checkpoints:
    """The checkpoints of one stage under `storage`.

    The newest `keep` of them stay, and of those before them the oldest and every one that was
    written at least `keep_hours` after the last that stays; 0 = none of them.
    """

    def __init__(self, storage: Storage, keep: int = 2, keep_hours: float = 0.0) -> None:
        self.storage, self.keep, self.keep_hours = storage, max(1, keep), keep_hours

    def steps(self) -> list[int]:
        """Steps of the whole checkpoints, oldest first."""
        return self._listed()[0]

    def _listed(self) -> tuple[list[int], set[int]]:
        """Steps of the whole checkpoints, oldest first, and of those that were cut short."""
        paths = self.storage.list(_FOLDER)
        whole = {int(match[1]) for path in paths if (match := _STEP.match(path))}
        there = {int(match[1]) for path in paths if (match := _FILE.match(path))}
        return sorted(whole), there - whole

    def save(self, snapshot: Snapshot) -> str:
        """Write a snapshot, then its marker, then drop those before it that need not stay.

        Returns its folder, relative to the storage. What a killed run left there is replaced.
        """
        folder = _folder(snapshot.step)
        if self.storage.exists(f"{folder}/{MARKER}"):
            self._delete(folder)
        files = {}
        for name in ("trainables", "optimizer", "rng", "ema"):
            tensors: dict[str, Tensor] = getattr(snapshot, name)
            if tensors:
                data = save({key: value.contiguous() for key, value in tensors.items()})
                self.storage.write_bytes(f"{folder}/{name}.safetensors", data)
                files[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        marker = {
            "step": snapshot.step,
            "files": files,
            "info": snapshot.info,
            "written": _now().isoformat(timespec="seconds"),
        }
        self.storage.write_json(f"{folder}/{MARKER}", marker)
        # one of a later step is damaged, or this run would not be here: it counts as none
        whole, cut_short = self._listed()
        older = [step for step in whole if step <= snapshot.step][: -self.keep]
        swept = {step for step in cut_short if step < snapshot.step}
        for step in sorted((set(older) | swept) - self._for_good(older)):
            self._delete(_folder(step))
        return folder

    def load(self, step: int) -> Snapshot:
        """Read one checkpoint.

        Raises:
            UserError: it is not there, or its bytes are not those that were written.
        """
        folder = self.storage.sub(_folder(step))
        with _damage(folder):
            marker = _marker(folder)
            parts = {name: _part(folder, marker, name) for name in marker["files"]}
            return Snapshot(step=marker["step"], info=marker["info"], **parts)

    def weights(self, step: int) -> Weights:
        """Read the weights alone of one checkpoint. Raises as `load`."""
        return read_weights(self.storage.sub(_folder(step)))

    def newest(self) -> int | None:
        """Step of the newest checkpoint whose bytes are whole; None where there is none yet.

        Damaged ones are said and passed over. Raises UserError when all of them are damaged:
        to begin from nothing again is the user's choice.
        """
        steps = self.steps()
        for step in reversed(steps):
            try:
                self._verify(step)
                return step
            except DamagedCheckpoint as error:
                say(f"warning: {error}; trying the checkpoint before it")
        if steps:
            where = self.storage.url(_FOLDER)
            raise DamagedCheckpoint(
                f"every checkpoint under {where} is damaged; delete that folder to start again"
            )
        return None

    def _for_good(self, steps: list[int]) -> set[int]:
        """Those of the steps, which rise, that stay by their age."""
        stay: set[int] = set()
        if not self.keep_hours:
            return stay
        last: datetime | None = None
        markers = self.storage.read_many([f"{_folder(step)}/{MARKER}" for step in steps])
        for step, data in zip(steps, markers.values(), strict=True):
            with contextlib.suppress(ValueError, KeyError, TypeError):  # a damaged one may go
                written = datetime.fromisoformat(json.loads(data)["written"])
                if last is None or written - last >= timedelta(hours=self.keep_hours):
                    stay.add(step)
                    last = written
        return stay

    def _verify(self, step: int) -> None:
        folder = self.storage.sub(_folder(step))
        with _damage(folder):
            marker = _marker(folder)
            for name in marker["files"]:
                _read(folder, marker, name)

    def _delete(self, folder: str) -> None:
        # The marker first: a folder that is half gone must not count.
        self.storage.delete(f"{folder}/{MARKER}")
        self.storage.delete(folder)


def read_weights(folder: Storage) -> Weights:
    """Read the weights alone of the checkpoint in `folder`, which may lie anywhere.

    Raises:
        UserError: it is not there, or its bytes are not those that were written.
    """
    with _damage(folder):
        marker = _marker(folder)
        averaged = "ema" in marker["files"]
        tensors = _part(folder, marker, "ema" if averaged else "trainables")
        return Weights(marker["step"], tensors, averaged, marker["info"])


class Saver:
    """Writes snapshots in a thread of its own, one after the other: a slow store stalls no step.

    Of a snapshot that is being written the next one waits, so that at most one is held in memory.

    Args:
        checkpoints: where they go.
        before: called before each is written, in the thread; it raises to prevent it.
        saved: step of the newest whole checkpoint; 0 = there is none.
    """

    def __init__(
        self, checkpoints: Checkpoints, before: Callable[[], None], saved: int = 0
    ) -> None:
        self.checkpoints, self.before, self.saved = checkpoints, before, saved
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._write: Future[None] | None = None

    def save(self, snapshot: Snapshot) -> None:
        """Begin to write `snapshot`, whose tensors nobody changes any more. Raises as `wait`."""
        self.wait()
        self._write = self._thread.submit(self._save, snapshot)

    def check(self) -> None:
        """Raise what a write has failed of, if it is over."""
        if self._write is not None and self._write.done():
            self.wait()

    def wait(self) -> None:
        """Until the last snapshot is whole. Raises what writing it raised."""
        write, self._write = self._write, None
        if write is not None:
            write.result()

    def close(self) -> None:
        """End the thread, when what it writes is whole or has failed. Raises nothing."""
        self._thread.shutdown(wait=True)

    def _save(self, snapshot: Snapshot) -> None:
        self.before()
        self.checkpoints.save(snapshot)
        self.saved = snapshot.step


def copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, and nobody else's."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The optimizer's state as CPU tensors: `<parameter name>/<state name>`."""
    tensors = {}
    for name, parameter in names.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{name}/{key}"] = torch.as_tensor(value).detach().cpu().clone()
    return tensors


def restore_optimizer(
    optimizer: torch.optim.Optimizer, names: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
) -> None:
    """Give the optimizer the state that `optimizer_tensors` took; KeyError for a strange name."""
    for path, value in tensors.items():
        name, _, key = path.rpartition("/")
        parameter = names[name]
        # AdamW counts its steps on the CPU unless it is fused or capturable
        fused = optimizer.defaults.get("fused") or optimizer.defaults.get("capturable")
        device = parameter.device if key != "step" or fused else value.device
        optimizer.state[parameter][key] = value.to(device).clone()


@contextlib.contextmanager
def _damage(folder: Storage) -> Iterator[None]:
    """A marker or a file that is not what was written, in one line."""
    try:
        yield
    except UserError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise DamagedCheckpoint(str(error)) from None
        raise
    except (KeyError, TypeError, ValueError, AttributeError, SafetensorError) as error:
        raise DamagedCheckpoint(
            f"{folder.url()} is damaged ({error}); delete it to go on from the one before"
        ) from None


def _part(folder: Storage, marker: Mapping[str, Any], name: str) -> dict[str, Tensor]:
    return dict(load(_read(folder, marker, name)))


def _read(folder: Storage, marker: Mapping[str, Any], name: str) -> bytes:
    path = f"{name}.safetensors"
    data = folder.read_bytes(path)
    if hashlib.sha256(data).hexdigest() != marker["files"][name]["sha256"]:
        raise DamagedCheckpoint(f"{folder.url(path)} is not what was written there (sha256)")
    return data


def _marker(folder: Storage) -> Any:
    return json.loads(folder.read_bytes(MARKER))


def _now() -> datetime:
    return datetime.now(UTC)


def _folder(step: int) -> str:
    return f"{_FOLDER}/step-{step:08d}"
