"""A save costs the loop one copy; its result is reported and never raised."""

from __future__ import annotations

import threading

import pytest
import torch

from dptrain.checkpoint import store as files
from dptrain.checkpoint.async_writer import AsyncWriter, SaveStatus, check_finite
from dptrain.checkpoint.store import load_newest
from dptrain.errors import CheckpointError


def tensors(value=1.0):
    return {"model": {"w": torch.full((100,), value)}, "optimizer": {"exp_avg/w": torch.full((100,), value)}}


def steps(folder):
    return sorted(int(path.name[5:]) for path in folder.glob("step-*"))


@pytest.fixture
def held(monkeypatch):
    """Hold every write at its beginning until the event is set."""
    event, real = threading.Event(), files.save_file

    def save_file(*arguments):
        assert event.wait(60)
        real(*arguments)

    monkeypatch.setattr(files, "save_file", save_file)
    return event


def test_what_is_saved_is_the_moment_of_the_call(tmp_path, held):
    """Tensors and state may change as soon as `save` returns, and are written as they were."""
    live, state = tensors(), {"cursor": [1, (2, 3)], "x": float("inf")}
    with AsyncWriter(tmp_path) as writer:
        assert writer.save(step=5, tensors=live, state=state)
        live["model"]["w"].fill_(7.0)
        state["cursor"].append(9)
        assert load_newest(tmp_path) is None
        held.set()
        assert writer.wait()
    found = load_newest(tmp_path)
    assert (found.step, found.state) == (5, {"cursor": [1, (2, 3)], "x": float("inf")})
    assert found.tensors("model")["w"].tolist() == [1.0] * 100


def test_the_status_tells_of_each_save(tmp_path):
    """Committed steps, the times of copy and write, and what the run began from before there is any."""
    with AsyncWriter(tmp_path, keep=2, committed_step=40) as writer:
        assert writer.status() == SaveStatus(committed_step=40)
        for step in (41, 42, 43):
            assert writer.save(step=step, tensors=tensors(), state={})
            assert writer.wait()
            status = writer.status()
            assert (status.committed_step, status.failed, status.skipped, status.error) == (step, 0, 0, None)
            assert 0 < status.stall_s < status.write_s
    assert steps(tmp_path) == [42, 43]


def test_a_wait_can_be_bounded(tmp_path, held):
    """A disk that hangs does not hold a caller for ever."""
    with AsyncWriter(tmp_path) as writer:
        assert writer.wait(timeout_s=0)
        writer.save(step=1, tensors=tensors(), state={})
        assert not writer.wait(timeout_s=0.01)
        held.set()


def test_failures_in_a_row_are_counted_until_one_succeeds(tmp_path, monkeypatch):
    """Whatever goes wrong in the thread is a sentence in the status."""
    with AsyncWriter(tmp_path) as writer:
        for number, error in enumerate([OSError(28, "No space left on device"), ValueError("odd"), MemoryError()]):
            with monkeypatch.context() as patch:

                def fails(*_, error=error):
                    raise error

                patch.setattr(files, "save_file", fails)
                assert writer.save(step=1, tensors=tensors(), state={})
                writer.wait()
            assert writer.status().failed == number + 1
        assert writer.status().error == "saving failed: MemoryError: "
        writer.save(step=1, tensors=tensors(), state={})
        writer.wait()
        assert (writer.status().failed, writer.status().error) == (0, None)
        assert writer.status().committed_step == 1


def test_a_copy_that_fails_is_a_failed_save_too(tmp_path):
    """Nothing is raised on rank 0 alone; a state that is not JSON counts the same."""
    with AsyncWriter(tmp_path) as writer:
        assert not writer.save(step=1, tensors={"model": {"w": "no tensor"}}, state={})
        assert writer.status().failed == 1
        assert writer.save(step=1, tensors=tensors(), state={"a": {1, 2}})
        writer.wait()
        assert writer.status().failed == 2
        assert "state['a'] is a set" in writer.status().error
    assert steps(tmp_path) == []


def test_a_folder_that_cannot_be_written_is_found_before_training(tmp_path):
    """The probe leaves nothing behind where it succeeds."""
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"no checkpoint can be written to .*file: .*choose a folder"):
        AsyncWriter(tmp_path / "file")
    with AsyncWriter(tmp_path / "a" / "b"):
        assert list((tmp_path / "a" / "b").iterdir()) == []


def test_closing_twice_is_closing_once(tmp_path):
    """And no thread is left over."""
    before = threading.active_count()
    writer = AsyncWriter(tmp_path)
    writer.save(step=1, tensors=tensors(), state={})
    writer.close()
    writer.close()
    assert writer.status().committed_step == 1
    assert threading.active_count() == before


DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("value", "found"), [(float("nan"), "NaN"), (float("inf"), "inf"), (-float("inf"), "inf")])
def test_one_number_that_is_not_finite_is_found_anywhere(dtype, value, found):
    """In each dtype that has such numbers, at the first, a middle and the last place."""
    for place in (0, 3, 6):
        tensor = torch.ones(7).to(dtype)
        check_finite({"model": {"w": tensor}})
        tensor[place] = value
        with pytest.raises(CheckpointError, match=f"model/w holds {found}"):
            check_finite({"model": {"w": tensor}})


def test_integers_and_empty_tensors_are_finite():
    """They have no such numbers."""
    check_finite({"model": {"n": torch.tensor([2**62]), "b": torch.tensor([True]), "none": torch.empty(0, 3)}})


def test_infinities_on_purpose_are_saved_and_nan_never():
    """A mask may hold infinities where the caller says so."""
    masked = {"model": {"mask": torch.tensor([0.0, -float("inf")])}}
    with pytest.raises(CheckpointError, match="model/mask holds infinity"):
        check_finite(masked)
    check_finite(masked, infinite={"model/mask"})
    with pytest.raises(CheckpointError, match="model/mask holds NaN"):
        check_finite({"model": {"mask": torch.tensor([float("nan")])}}, infinite={"model/mask"})
