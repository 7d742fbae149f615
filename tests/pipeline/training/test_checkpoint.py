"""A checkpoint is whole or not there; what is loaded is bit for bit what was saved."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import torch

from pipeline.errors import StoreHiccup, UserError
from pipeline.storage import Storage
from pipeline.training.checkpoint import (
    Checkpoints,
    Snapshot,
    optimizer_tensors,
    restore_optimizer,
)


def snapshot(step: int) -> Snapshot:
    torch.manual_seed(step)
    return Snapshot(
        step=step,
        trainables={"encoder.to_q.weight": torch.randn(3, 4)},
        optimizer={"encoder.to_q.weight/step": torch.tensor(float(step))},
        rng={"0": torch.get_rng_state()},
        ema={},
        info={"settings": "abc", "world": 1},
    )


def test_round_trip_and_the_newest_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(Storage(tmp_path), keep=2)
    assert checkpoints.newest() is None
    for step in (10, 20, 30):
        checkpoints.save(snapshot(step))
    assert checkpoints.steps() == [20, 30] and checkpoints.newest() == 30
    loaded, saved = checkpoints.load(30), snapshot(30)
    assert loaded.info == saved.info and loaded.step == 30 and loaded.ema == {}
    for part in ("trainables", "optimizer", "rng"):
        ours, theirs = getattr(loaded, part), getattr(saved, part)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    folders = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert folders == ["step-00000020", "step-00000030"]


def test_kept_for_good_by_age(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One every three hours, counted from the last that stays, whoever wrote it; and the newest."""
    begun = datetime(2030, 1, 1, tzinfo=UTC)
    for step in range(1, 11):  # an hour each
        now = begun + timedelta(hours=step)
        monkeypatch.setattr("pipeline.training.checkpoint._now", lambda now=now: now)
        Checkpoints(Storage(tmp_path), keep=2, keep_hours=3).save(snapshot(step))
    assert Checkpoints(Storage(tmp_path)).steps() == [1, 4, 7, 9, 10]
    # of one whose marker is damaged nobody knows the age
    (tmp_path / "checkpoints/step-00000004/checkpoint.json").write_text("{}")
    Checkpoints(Storage(tmp_path), keep=2, keep_hours=6).save(snapshot(11))
    assert Checkpoints(Storage(tmp_path)).steps() == [1, 7, 10, 11]
    Checkpoints(Storage(tmp_path), keep=1).save(snapshot(12))
    assert Checkpoints(Storage(tmp_path)).steps() == [12]


def test_the_newest_whole_one_is_never_dropped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Though damaged ones of later steps are there, from which the run could not go on."""
    checkpoints = Checkpoints(Storage(tmp_path), keep=2)
    for step in (10, 20, 30):
        checkpoints.save(snapshot(step))
    for step in (20, 30):
        (tmp_path / f"checkpoints/step-000000{step}/trainables.safetensors").write_bytes(b"half")
    checkpoints.save(snapshot(15))
    assert checkpoints.newest() == 15 and checkpoints.steps() == [15, 20, 30]
    checkpoints.save(snapshot(20))
    assert checkpoints.newest() == 20 and checkpoints.steps() == [15, 20, 30]
    assert capsys.readouterr().out.count("warning: ") == 3


def test_a_half_written_one_is_ignored_and_replaced(tmp_path: Path) -> None:
    checkpoints = Checkpoints(Storage(tmp_path))
    checkpoints.save(snapshot(10))
    folder = tmp_path / "checkpoints" / "step-00000020"
    folder.mkdir()
    (folder / "trainables.safetensors").write_bytes(b"half")
    assert checkpoints.newest() == 10
    checkpoints.save(snapshot(20))
    assert checkpoints.newest() == 20
    assert torch.equal(
        checkpoints.load(20).trainables["encoder.to_q.weight"],
        snapshot(20).trainables["encoder.to_q.weight"],
    )


@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_damaged_one_is_named_and_passed_over(
    tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = Checkpoints(Storage(tmp_path))
    checkpoints.save(snapshot(10))
    checkpoints.save(snapshot(20))
    file = tmp_path / "checkpoints" / "step-00000020" / "trainables.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(bytes(data if damage == "flip" else data[:-8]))
    assert checkpoints.newest() == 10
    assert "step-00000020" in capsys.readouterr().out
    with pytest.raises(UserError, match="step-00000020"):
        checkpoints.load(20)
    (tmp_path / "checkpoints" / "step-00000010" / "optimizer.safetensors").unlink()
    with pytest.raises(UserError, match=r"every checkpoint under .* is damaged"):
        checkpoints.newest()


def test_a_full_store_leaves_the_last_good_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = Storage(tmp_path)
    checkpoints = Checkpoints(storage, keep=1)
    checkpoints.save(snapshot(10))
    write = Storage.write_bytes

    def full(self: Storage, path: str, data: bytes) -> None:
        if "optimizer" in path:
            raise UserError(f"cannot write {path}: the disk is full")
        write(self, path, data)

    monkeypatch.setattr(Storage, "write_bytes", full)
    with pytest.raises(UserError, match="the disk is full"):
        checkpoints.save(snapshot(20))
    assert checkpoints.steps() == [10] and checkpoints.newest() == 10


def test_the_optimizer_goes_on_bit_for_bit() -> None:
    def made() -> tuple[torch.nn.Linear, torch.optim.AdamW]:
        torch.manual_seed(0)
        layer = torch.nn.Linear(4, 3)
        return layer, torch.optim.AdamW(layer.parameters(), lr=1e-2, fused=True)

    def steps(layer: torch.nn.Linear, optimizer: torch.optim.AdamW, first: int, last: int) -> None:
        for step in range(first, last):
            torch.manual_seed(step)
            optimizer.zero_grad()
            layer(torch.randn(2, 4)).square().mean().backward()
            optimizer.step()

    whole, optimizer = made()
    steps(whole, optimizer, 0, 6)
    half, optimizer = made()
    steps(half, optimizer, 0, 3)
    tensors = optimizer_tensors(optimizer, dict(half.named_parameters()))
    assert "weight/exp_avg" in tensors and "bias/step" in tensors
    weights = {key: value.clone() for key, value in half.state_dict().items()}
    rest, optimizer = made()
    rest.load_state_dict(weights)
    restore_optimizer(optimizer, dict(rest.named_parameters()), tensors)
    steps(rest, optimizer, 3, 6)
    for ours, theirs in zip(whole.parameters(), rest.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_store_out_of_reach_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No older checkpoint is gone on from, and none is to be deleted."""
    kept = Checkpoints(Storage(tmp_path), keep=3)
    for step in (1, 2, 3):
        kept.save(snapshot(step))
    (tmp_path / "checkpoints/step-00000003/checkpoint.json").write_text("[1]")  # damaged
    (tmp_path / "checkpoints/step-00000002/trainables.safetensors").unlink()
    assert kept.newest() == 1
    said = capsys.readouterr().out
    assert "step-00000003 is damaged" in said and "step-00000002" in said

    def away(self: Storage, path: str) -> bytes:
        raise StoreHiccup("the store is out of reach")

    monkeypatch.setattr(Storage, "read_bytes", away)
    with pytest.raises(StoreHiccup):
        kept.newest()


def test_what_was_cut_short_is_swept(tmp_path: Path) -> None:
    kept = Checkpoints(Storage(tmp_path), keep=2)
    kept.save(snapshot(3))
    (tmp_path / "checkpoints/step-00000003/checkpoint.json").unlink()
    kept.save(snapshot(5))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000005"]
