"""Sharded checkpoints: files of several ranks committed as one, and put together again."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import torch

from dptrain.checkpoint.async_writer import AsyncWriter
from dptrain.checkpoint.finite import StateNotFiniteError
from dptrain.checkpoint.shards import Assembly, Piece, Staging, announce_failure, collect_shards, write_shard
from dptrain.checkpoint.store import load_newest, save_checkpoint
from dptrain.errors import CheckpointError

WEIGHT = torch.arange(30.0).reshape(5, 6)
SCALE = torch.ones(3)
ROWS = (slice(0, 3), slice(3, 5))  # of each rank


def staging(folder: Path, *, rank: int, step: int, patience_s: float = 30.0) -> Staging:
    rows = ROWS[rank]
    piece = Piece(shape=(5, 6), offsets=(rows.start, 0), sizes=(rows.stop - rows.start, 6))
    return Staging(
        folder=folder / f".tmp-{step}-abc",
        rank=rank,
        num_ranks=2,
        layout={"model": {"weight": piece}},
        patience_s=patience_s,
    )


def pieces(rank: int, *, step: int) -> dict[str, dict[str, torch.Tensor]]:
    return {f"model-shard-{rank:05d}": {"weight": (WEIGHT + step)[ROWS[rank]].clone()}}


def save(folder: Path, *, step: int) -> None:
    """Save from two ranks at once, as two processes do."""
    folder.mkdir(exist_ok=True)
    other = threading.Thread(
        target=write_shard, args=(staging(folder, rank=1, step=step), pieces(1, step=step)), daemon=True
    )
    other.start()
    save_checkpoint(
        folder,
        step=step,
        tensors={"model": {"scale": SCALE}, **pieces(0, step=step)},
        state={"step": step},
        staging=staging(folder, rank=0, step=step),
    )
    other.join()


def test_each_rank_writes_its_pieces_and_the_whole_comes_back(tmp_path):
    """Two ranks write a file each, the manifest has both digests, and the tensors are whole again, bit for bit."""
    save(tmp_path, step=4)
    found = load_newest(tmp_path)
    assert found is not None
    assert sorted(path.name for path in found.path.iterdir()) == [
        "manifest.json",
        "model-shard-00000.safetensors",
        "model-shard-00001.safetensors",
        "model.safetensors",
        "shard-00000.json",
        "shard-00001.json",
        "state.json",
    ]
    tensors = found.tensors("model")
    assert tensors["weight"].equal(WEIGHT + 4)
    assert tensors["scale"].equal(SCALE)


@pytest.mark.parametrize("name", ["model-shard-00001.safetensors", "shard-00001.json"])
@pytest.mark.parametrize("damage", ["flipped", "missing", "cut"])
def test_a_damaged_or_missing_shard_gives_the_older_checkpoint(tmp_path, name, damage):
    """Where a file of any rank is not what the manifest promises, the checkpoint before it is taken, and named."""
    save(tmp_path, step=4)
    save(tmp_path, step=8)
    path = tmp_path / "step-000000000008" / name
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    else:
        content[-3] ^= 1
        path.write_bytes(bytes(content) if damage == "flipped" else bytes(content[:-1]))
    found = load_newest(tmp_path)
    assert found is not None
    assert found.step == 4
    assert name in found.passed_over[0][1]
    assert found.tensors("model")["weight"].equal(WEIGHT + 4)


def test_where_no_checkpoint_is_whole_none_is_taken(tmp_path):
    """The only checkpoint lacks a shard: the run is refused instead of begun anew."""
    save(tmp_path, step=4)
    (tmp_path / "step-000000000004" / "model-shard-00000.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model-shard-00000"):
        load_newest(tmp_path)


def test_a_rank_that_cannot_write_fails_the_save_and_leaves_the_older_checkpoints(tmp_path):
    """Rank 0 hears why, commits nothing, and removes what was written."""
    save(tmp_path, step=4)
    announce_failure(staging(tmp_path, rank=1, step=8), OSError("No space left on device"))
    with pytest.raises(CheckpointError, match=r"No space left on device \(rank 1\)"):
        save_checkpoint(
            tmp_path, step=8, tensors=pieces(0, step=8), state={}, staging=staging(tmp_path, rank=0, step=8)
        )
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000000004"]


def test_a_shard_with_numbers_that_are_not_finite_counts_as_divergence(tmp_path):
    """NaN on another rank ends the save as NaN on rank 0 does: no fault of the disk."""
    with AsyncWriter(tmp_path, commits=False) as writer:
        broken = {"model-shard-00001": {"weight": torch.full((2, 6), torch.nan)}}
        writer.save(step=8, tensors=broken, state={}, staging=staging(tmp_path, rank=1, step=8))
        writer.wait()
    with AsyncWriter(tmp_path) as writer:
        writer.save(step=8, tensors=pieces(0, step=8), state={}, staging=staging(tmp_path, rank=0, step=8))
        writer.wait()
        status = writer.status()
    assert status.is_diverged
    assert "model-shard-00001/weight holds NaN" in status.error
    assert "rank 1" in status.error


def test_a_rank_that_never_answers_is_named(tmp_path):
    """Rank 0 waits for a shard only so long, and the next save does not take the rest for its own."""
    with pytest.raises(CheckpointError, match="rank 1 of 2 did not write its shard in time"):
        save_checkpoint(
            tmp_path,
            step=8,
            tensors=pieces(0, step=8),
            state={},
            staging=staging(tmp_path, rank=0, step=8, patience_s=0),
        )
    assert list(tmp_path.iterdir()) == []
    save(tmp_path, step=8)
    assert load_newest(tmp_path).step == 8


def test_a_process_that_ends_does_not_wait_for_shards_that_will_not_come(tmp_path, monkeypatch):
    """Where a peer was killed, its rank 0 gives up on its shard within the grace, not after the patience of a save."""
    monkeypatch.setattr("dptrain.checkpoint.shards._GRACE_S", 0.0)
    writer = AsyncWriter(tmp_path)
    seat = staging(tmp_path, rank=0, step=8, patience_s=3600.0)
    writer.save(step=8, tensors=pieces(0, step=8), state={}, staging=seat)
    writer.close()
    assert "did not write its shard" in writer.status().error


def test_a_shard_of_another_size_than_announced_is_refused(tmp_path):
    """A file that changed between the rank's announcement and the commit is not committed."""
    seat = staging(tmp_path, rank=1, step=8)
    write_shard(seat, pieces(1, step=8))
    with (seat.folder / "model-shard-00001.safetensors").open("ab") as file:
        file.write(b"x")
    own = staging(tmp_path, rank=0, step=8)
    write_shard(own, pieces(0, step=8))
    with pytest.raises(CheckpointError, match="rank 1 wrote"):
        collect_shards(own)


def test_pieces_that_do_not_make_up_the_tensor_are_refused():
    """A gap, an overlap, a place outside, another shape or type, and a piece without a place are each an error."""
    place = Piece(shape=(4,), offsets=(0,), sizes=(2,))
    gap = Assembly()
    gap.add({"w": torch.zeros(2)}, {"w": place})
    with pytest.raises(CheckpointError, match="do not make up"):
        gap.tensors()
    for piece, where in (
        (torch.zeros(2), place),
        (torch.zeros(3), Piece(shape=(4,), offsets=(2,), sizes=(3,))),
        (torch.zeros(2), Piece(shape=(5,), offsets=(2,), sizes=(2,))),
        (torch.zeros(2, dtype=torch.int64), Piece(shape=(4,), offsets=(2,), sizes=(2,))),
        (torch.zeros(1), Piece(shape=(4,), offsets=(2,), sizes=(2,))),
    ):
        with pytest.raises(CheckpointError, match="does not fit"):
            gap.add({"w": piece}, {"w": where})
    with pytest.raises(CheckpointError, match="has a piece and no place"):
        gap.add({"other": torch.zeros(2)}, {"w": place})


def test_a_layout_that_is_no_layout_is_refused(tmp_path):
    """A manifest that vouches for nonsense ends in an error with the file's name, not in a tensor."""
    save(tmp_path, step=4)
    seat = staging(tmp_path, rank=1, step=8)
    write_shard(seat, pieces(1, step=8))
    path = seat.folder / "shard-00001.json"
    content = json.loads(path.read_bytes())
    content["layout"]["model"]["weight"]["offsets"] = [-1, 0]
    path.write_text(json.dumps(content), encoding="ascii")
    save_checkpoint(
        tmp_path,
        step=8,
        tensors={"model": {"scale": SCALE}, **pieces(0, step=8)},
        state={},
        staging=staging(tmp_path, rank=0, step=8),
    )
    with pytest.raises(CheckpointError, match=r"shard-00001\.json does not say where pieces stand"):
        load_newest(tmp_path).tensors("model")


def test_non_finite_is_its_own_kind_of_failure(tmp_path):
    """What a rank announces as divergence is raised as that."""
    announce_failure(staging(tmp_path, rank=1, step=8), StateNotFiniteError("model/weight holds NaN"))
    own = staging(tmp_path, rank=0, step=8)
    write_shard(own, pieces(0, step=8))
    with pytest.raises(StateNotFiniteError, match="rank 1"):
        collect_shards(own)
