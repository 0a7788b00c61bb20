"""Runs that were killed or stopped and resumed, against the run that was not: same parameters, same log."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from dptrain.checkpoint.store import load_newest
from dptrain.runtime.signals import EXIT_RESUMABLE
from dptrain.tracking.jsonl import read_rows
from dptrain.tracking.run_folder import write_config
from dptrain.train import ControlConfig, OptimizerConfig
from tests.replicas import run_replicas
from tests.runs import EVERY, Killed, assert_same, attempt, make_config, noisy, result_of, wait_for_step

__all__ = ["noisy"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What the run leaves that nobody interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    run_replicas(train_whole, world_size=2, args=(folder,))
    return result_of(folder)


def train_whole(rank, world_size, folder):
    attempt(folder)


def test_the_run_is_worth_interrupting(whole):
    """The batch changes twice, once on what was known at a checkpoint: resuming has something to get wrong."""
    assert {row["kind"] for row in whole["rows"]} == {"train", "eval"}
    rows = [row for row in whole["rows"] if row["kind"] == "train"]
    assert {4, 8, 16} <= {row["batch/global"] for row in rows}
    ends = {row["step"]: row["progress/samples"] for row in rows}
    saved = {step for step, end in ends.items() if end // EVERY > ends.get(step - 1, 0) // EVERY}
    decided = {row["step"] for row in whole["decisions"]}
    # Killed two steps after such a checkpoint, the decision is in the log already, and is taken again.
    assert any(step in saved and step + 1 not in saved for step in decided)


def test_killed_after_any_step_it_ends_the_same(whole, tmp_path):
    """For every second step a run that is killed in it, and resumed: same bits, no row lost, none twice, with any `keep`."""
    num_steps = whole["summary"]["steps"]
    run_replicas(kill_each_step_once, world_size=2, args=(tmp_path, num_steps))
    for step in range(1, num_steps + 1, 2):
        assert_same(result_of(tmp_path / str(step)), whole)
        kept = list((tmp_path / str(step) / "checkpoints").iterdir())
        assert len(kept) == keep_of(step)


def keep_of(step):
    return 1 if step % 4 == 1 else 3


def kill_each_step_once(rank, world_size, folder, num_steps):
    for step in range(1, num_steps + 1, 2):
        run, keep = Path(folder) / str(step), keep_of(step)
        with pytest.raises(Killed):
            attempt(run, kill_at=step, keep=keep)
        torch.distributed.barrier()  # the folder's lock is rank 0's to give free
        attempt(run, keep=keep)
        torch.distributed.barrier()


def test_killed_again_and_again_it_ends_the_same(whole, tmp_path):
    """Processes that die without a word at two steps in a row, the second before a checkpoint was made again."""
    for step in (5, 6):
        with pytest.raises(AssertionError, match="exit code 9"):
            run_replicas(die, world_size=2, args=(tmp_path, step))
    run_replicas(train_whole, world_size=2, args=(tmp_path,))
    assert_same(result_of(tmp_path), whole)


def die(rank, world_size, folder, step):
    attempt(folder, kill_at=step, kill=lambda: os._exit(9))


# The command itself


def start(folder, *more):
    """Start `dptrain train` on two replicas; slow, so that there is time to end it."""
    arguments = [sys.executable, "-m", "dptrain", "train", "--replicas", "2", "--run_dir", str(folder), *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TEST_MICRO_STEP_S": "0.05"}
    # A session of its own, so that a signal to the group reaches what a terminal's Ctrl-C would reach.
    return subprocess.Popen(
        arguments, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )


def test_the_command_survives_kill_and_obeys_signals(whole, tmp_path):
    """SIGKILL of all processes, SIGTERM to the command, Ctrl-C: each time resumed, the run ends the same."""
    folder, settings = tmp_path / "run", tmp_path / "settings.yaml"
    write_config(settings, make_config(folder))

    process = start(folder, "--config", str(settings))
    wait_for_step(folder, 3, process)
    tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    assert len(tree) >= 3
    for member in tree:
        member.kill()
    process.communicate()

    for stop in (
        lambda pid: os.kill(pid, signal.SIGTERM),
        lambda pid: os.killpg(pid, signal.SIGINT),
    ):
        reported = read_rows(folder / "metrics.jsonl")[-1]["step"]
        process = start(folder, "--resume")
        wait_for_step(folder, reported + 1, process)
        stop(process.pid)
        output, _ = process.communicate(timeout=240)
        assert process.returncode == EXIT_RESUMABLE, output
        last_row = read_rows(folder / "metrics.jsonl")[-1]["step"]
        assert load_newest(folder / "checkpoints").step == last_row, "what was told is saved"
        assert f"stopped on request after step {last_row}" in output
        assert "Traceback" not in output
        assert "Signal" not in output

    process = start(folder, "--resume")
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert_same(result_of(folder), whole)


@pytest.mark.parametrize("lengths", [{"max_samples": 300}, {"max_steps": 30}])
def test_a_run_at_its_end_is_extended(tmp_path, lengths):
    """With a constant rate and batch, longer in two parts is the same as long from the start, to the last bit."""
    constant = {
        "control": ControlConfig(law="constant"),
        "optimizer": OptimizerConfig(schedule="constant", warmup_samples=10),
        "global_batch_size": 10,
    }
    longer = make_config(tmp_path / "parts", **constant, **lengths)
    attempt(tmp_path / "parts", config=make_config(tmp_path / "parts", max_samples=200, **constant))
    attempt(tmp_path / "parts", config=longer)
    attempt(tmp_path / "whole", config=make_config(tmp_path / "whole", **constant, max_samples=300))
    parts, whole = (load_newest(tmp_path / name / "checkpoints") for name in ("parts", "whole"))
    assert parts.step == whole.step == 30
    for name, tensor in whole.tensors("model").items():
        assert torch.equal(parts.tensors("model")[name], tensor), name
    assert json.loads((tmp_path / "parts" / "summary.json").read_text())["samples_seen"] == 300
