"""What is saved comes back to the bit, and retention keeps what it must; failing disks are in tests/faults/."""

from __future__ import annotations

import errno
import os
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dptrain.checkpoint import opened as opened_folders
from dptrain.checkpoint import store as module
from dptrain.checkpoint.manifest import MAX_JSON_BYTES
from dptrain.checkpoint.store import load_checkpoint, load_newest, save_checkpoint
from dptrain.errors import CheckpointError, ConfigError
from tests.checkpoints import assert_equal_bits, assert_holds, names, save

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]


def steps(folder):
    return [int(name.removeprefix("step-")) for name in names(folder) if name.startswith("step-")]


# --- round trip ---


@settings(max_examples=25)
@given(data=st.data())
def test_tensors_round_trip_bit_for_bit(data):
    """Any bits in any dtype and shape come back as they were; saving them again gives equal bytes in every file."""
    group = {}
    for index in range(data.draw(st.integers(0, 3))):
        dtype = data.draw(st.sampled_from(DTYPES))
        shape = data.draw(st.lists(st.integers(0, 3), max_size=3))
        size = torch.empty(shape, dtype=dtype).nbytes
        raw = data.draw(st.binary(min_size=size, max_size=size))
        raw = bytes(byte & 1 for byte in raw) if dtype is torch.bool else raw
        flat = torch.frombuffer(bytearray(raw), dtype=dtype) if raw else torch.empty(0, dtype=dtype)
        group[f"t{index}"] = flat.reshape(shape)
    with tempfile.TemporaryDirectory() as folder:
        first = save_checkpoint(Path(folder), step=1, tensors={"model": group}, state={})
        loaded = load_checkpoint(first).tensors("model")
        assert_equal_bits(loaded, group)
        second = save_checkpoint(Path(folder) / "again", step=1, tensors={"model": loaded}, state={})
        assert {path.name: path.read_bytes() for path in first.iterdir()} == {
            path.name: path.read_bytes() for path in second.iterdir()
        }


def test_special_floats_survive_in_tensors_and_state(tmp_path):
    """NaN, infinities, -0.0 and subnormals are values like others."""
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 1e-45])
    state = {"special": [float(value) for value in special]}
    path = save_checkpoint(tmp_path, step=0, tensors={"model": {"special": special}}, state=state)
    loaded = load_checkpoint(path)
    assert_equal_bits(loaded.tensors("model"), {"special": special})
    assert_equal_bits({"s": torch.tensor(loaded.state["special"])}, {"s": special})


def test_an_empty_or_missing_folder_has_no_checkpoint(tmp_path):
    """None is only for "there is none at all"; foreign names count for nothing."""
    assert load_newest(tmp_path / "missing") is None
    for name in ("step-7", "step-x", ".bad-000000000001-ab", "notes"):
        (tmp_path / name).mkdir()
    assert load_newest(tmp_path) is None


def test_a_folder_that_is_a_file_is_an_error(tmp_path):
    """What cannot be listed is not taken for empty, nor written to."""
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_newest(tmp_path / "file")
    with pytest.raises(CheckpointError, match="could not be written"):
        save(tmp_path / "file", 1)


def test_asking_for_tensors_that_are_not_there_names_those_that_are(tmp_path):
    """A wrong name gets the right one in the error."""
    with pytest.raises(CheckpointError, match=r"holds no gone\.safetensors: it holds model\.safetensors, optimizer"):
        load_checkpoint(save(tmp_path, 1)).tensors("gone")


@pytest.mark.parametrize("tensor", [torch.zeros(2, dtype=torch.complex128), torch.eye(2).to_sparse()])
def test_a_tensor_that_would_not_come_back_is_refused_before_anything_is_written(tmp_path, tensor):
    """A checkpoint that nobody could load is never acknowledged."""
    with pytest.raises(CheckpointError, match="cannot hold 'w'"):
        save_checkpoint(tmp_path, step=1, tensors={"model": {"w": tensor}}, state={})
    assert names(tmp_path) == []


def test_state_beyond_the_limit_is_refused_and_cleaned_up(tmp_path, monkeypatch):
    """The writer keeps the bounds that the reader enforces."""
    monkeypatch.setitem(MAX_JSON_BYTES, "state.json", 100)
    with pytest.raises(CheckpointError, match=r"state\.json has \d+ bytes, more than the 100"):
        save_checkpoint(tmp_path, step=1, tensors={}, state={"a": "x" * 100})
    assert names(tmp_path) == []


def test_a_file_that_changes_after_it_was_verified_is_not_parsed(tmp_path):
    """The bytes that become tensors are the bytes that were hashed, not what stood there a moment before."""
    path = save(tmp_path, 1)
    opened = load_checkpoint(path)
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    with pytest.raises(CheckpointError, match="has changed since it was verified"):
        opened.tensors("model")


# --- saving again ---


def test_an_intact_checkpoint_of_the_same_step_is_never_overwritten(tmp_path):
    """The second save of a step returns the first one, byte for byte as it was."""
    path = save(tmp_path, 1)
    before = {file.name: (file.read_bytes(), file.stat().st_ino) for file in path.iterdir()}
    assert save_checkpoint(tmp_path, step=1, tensors={}, state={"other": True}) == path
    assert {file.name: (file.read_bytes(), file.stat().st_ino) for file in path.iterdir()} == before


def test_a_damaged_checkpoint_of_the_same_step_is_set_aside_and_replaced(tmp_path):
    """Damage is kept as evidence until retention passes it; the step is saved all the same."""
    path = save(tmp_path, 1)
    (path / "state.json").unlink()
    assert save(tmp_path, 1) == path
    assert_holds(load_newest(tmp_path), 1)
    assert [name[:17] for name in names(tmp_path)] == [".bad-000000000001", "step-000000000001"]
    for step in (2, 3):
        save(tmp_path, step, keep=2)
    assert names(tmp_path) == ["step-000000000002", "step-000000000003"]


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_retention_keeps_the_newest(tmp_path, keep):
    """After every save the newest `keep` are there, and nothing else."""
    for step in range(1, 7):
        save(tmp_path, step, keep=keep)
        assert steps(tmp_path) == list(range(max(1, step - keep + 1), step + 1))


def test_retention_never_counts_a_damaged_checkpoint(tmp_path):
    """With keep=2 and the middle one damaged, the oldest intact one stays."""
    paths = [save(tmp_path, step) for step in (1, 2)]
    os.truncate(paths[1] / "model.safetensors", 5)
    save(tmp_path, 3, keep=2)
    assert steps(tmp_path) == [1, 2, 3]
    save(tmp_path, 4, keep=2)
    assert steps(tmp_path) == [3, 4]


def test_retention_leaves_later_steps_alone(tmp_path):
    """Training again from an earlier step must not delete what was just saved, nor what lies ahead."""
    for step in (10, 20, 30):
        save(tmp_path, step)
    save(tmp_path, 5, keep=1)
    assert steps(tmp_path) == [5, 10, 20, 30]


def test_retention_hashes_a_foreign_checkpoint_once_and_its_own_never(tmp_path, monkeypatch):
    """What this process wrote is known good; what it found is verified one time; a changed file is looked at again."""
    for step in (1, 2):
        save(tmp_path, step)
    opened_folders.verdicts.clear()  # as if another process had written them
    opened = []
    real = opened_folders.open_checkpoint
    monkeypatch.setattr(
        opened_folders, "open_checkpoint", lambda path: (opened.append(int(path.name[5:])), real(path))[1]
    )
    for step in (3, 4):
        save(tmp_path, step, keep=9)
    assert opened == [2, 1]
    os.utime(tmp_path / "step-000000000003" / "state.json", (0, 0))
    save(tmp_path, 5, keep=9)
    assert opened == [2, 1, 3]


def test_keep_below_one_is_a_config_error(tmp_path):
    """Retention that could remove everything is refused."""
    with pytest.raises(ConfigError, match="keep must be at least 1, got 0"):
        save(tmp_path, 1, keep=0)


# --- side by side ---


def test_a_failure_to_prune_is_a_warning_not_a_lost_checkpoint(tmp_path, monkeypatch):
    """The save that committed is acknowledged even where the old ones cannot be removed."""
    save(tmp_path, 1)

    def fails(_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(module, "_retire", fails)
    with pytest.warns(RuntimeWarning, match="is saved, but older ones"):
        save(tmp_path, 2, keep=1)
    assert_holds(load_newest(tmp_path), 2)


def test_two_saves_at_once_wait_for_each_other(tmp_path, monkeypatch):
    """A second thread does not take the first one's temporary folder for a leftover."""
    inside, real = threading.Event(), module.save_file

    def slow(*arguments):
        inside.set()
        time.sleep(0.1)
        real(*arguments)

    monkeypatch.setattr(module, "save_file", slow)
    first = threading.Thread(target=save, args=(tmp_path, 1))
    first.start()
    assert inside.wait(10)
    save(tmp_path, 2)
    first.join()
    assert steps(tmp_path) == [1, 2]
