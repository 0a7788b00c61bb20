"""Decisions that rest on a clock: they go on record before they act, and who goes on follows the record to its end."""

from __future__ import annotations

import json
import shutil

import pytest

from dptrain.control import StepTimeModel
from dptrain.runtime.step_timer import StepTimer
from dptrain.tracking.jsonl import read_rows
from dptrain.tracking.run_folder import newest_step
from dptrain.train import CheckpointConfig, ControlConfig
from tests.runs import Killed, attempt, make_config, windows

KILLED_IN = 18


def pretend(monkeypatch, *, per_step_s):
    """Have every clock tell the same times, in which a step costs what `per_step_s` says beside its samples."""
    model = StepTimeModel(
        per_step_s=per_step_s,
        per_micro_batch_s=0.0,
        per_sample_s=1.0,
        covariance=((0.0, 0.0, 0.0),) * 3,
        full_at_samples=0.0,
        world_size=1,
        timed_batches=tuple(1 << k for k in range(10)),
        recent_batches=tuple(1 << k for k in range(10)),
        error=None,
    )
    monkeypatch.setattr(StepTimer, "model", model)


def config(folder):
    control = ControlConfig(law="goodput", min_gain=0.0, smallest=2, largest=32)
    checkpoint = CheckpointConfig(every_samples=8, keep=100)
    return make_config(folder, control=control, checkpoint=checkpoint, max_samples=600)


@pytest.fixture
def killed(tmp_path, monkeypatch):
    """A run with slow steps, so that its batch grew, killed when all but its first checkpoint are lost."""
    pretend(monkeypatch, per_step_s=1e6)
    with pytest.raises(Killed):
        attempt(tmp_path, kill_at=KILLED_IN, config=config(tmp_path))
    _, *later = sorted((tmp_path / "checkpoints").glob("step-*"))
    for path in later:
        shutil.rmtree(path)
    pretend(monkeypatch, per_step_s=1e-6)  # the resumed run finds fast steps, and would shrink the batch
    return tmp_path


def shape(folder):
    return windows(folder), read_rows(folder / "decisions.jsonl")


def test_what_is_on_record_is_followed_to_its_end(killed):
    """Each step that was logged is taken again with the same samples in the same batch; then the clock decides."""
    reported, decisions = shape(killed)
    assert decisions[-1]["batch/after"] > decisions[0]["batch/before"]
    attempt(killed, config=config(killed))
    again, more = shape(killed)
    assert again[: len(reported)] == reported
    assert more[: len(decisions)] == decisions
    assert more[-1]["batch/after"] < decisions[-1]["batch/after"]


def test_without_the_record_the_clock_would_have_decided(killed):
    """The test above can fail: with the log of decisions lost, the steps after the checkpoint are others."""
    reported, _ = shape(killed)
    (killed / "decisions.jsonl").unlink()
    (killed / "metrics.jsonl").unlink()
    attempt(killed, config=config(killed))
    again = {step: rest for step, *rest in windows(killed)}
    assert any(again[step] != rest for step, *rest in reported if step in again)


def test_a_second_attempt_that_is_killed_leaves_the_record_whole(killed):
    """The record outlives an attempt that did not come as far."""
    reported, decisions = shape(killed)
    with pytest.raises(Killed):
        attempt(killed, kill_at=newest_step(killed) + 2, config=config(killed))
    attempt(killed, config=config(killed))
    again, more = shape(killed)
    last = decisions[-1]["step"]
    assert [window for window in again if window[0] <= last] == [window for window in reported if window[0] <= last]
    assert more[: len(decisions)] == decisions


def test_advice_is_no_decision(killed):
    """Rows that were not acted upon are not followed."""
    rows = read_rows(killed / "decisions.jsonl")
    for row in rows:
        row["applied"] = False
    (killed / "decisions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    reported, _ = shape(killed)
    attempt(killed, config=config(killed))
    again, _ = shape(killed)
    assert again[: len(reported)] != reported


@pytest.mark.parametrize("batch", [0, "8", 2.5, True])
def test_a_damaged_record_is_not_followed(killed, batch):
    """A batch that is no count is not trained with: the run goes on, and no step has it."""
    rows = read_rows(killed / "decisions.jsonl")
    rows[-1]["batch/after"] = batch
    (killed / "decisions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    attempt(killed, config=config(killed))
    windows_again, _ = shape(killed)
    assert all(type(size) is int and size >= 1 for _, _, size, _ in windows_again)
