"""Section A of the faults, through the command itself: replicas that are killed, or crash.

A2 is `test_killed_after_any_step_it_ends_the_same` in tests/train/runs/test_resume.py. Several faults share one launch
where each leaves its own trace, since a launch takes seconds.
"""

from __future__ import annotations

import ctypes
import os
import random
import re
import signal
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest

from dptrain.tracking.run_folder import newest_step
from tests.faults.processes.launched import assert_undisturbed, gone, running, settings_file
from tests.runs import Noisy, noisy, slow_loss

# Replicas that are killed: one run with six of them


@pytest.fixture(scope="module")
def battered(tmp_path_factory, whole):
    """A run in which replicas are killed at random, both at once, one while it starts, and one's loading process."""
    folder = tmp_path_factory.mktemp("battered")
    chance = random.Random(5)
    with running(folder / "log", "--config", settings_file(folder, num_workers=1)) as run:
        for step in (3, 6, 8):
            run.until_step(folder / "run", step)
            time.sleep(chance.uniform(0, 0.2))
            kill_and_wait(run, [chance.choice(run.until(run.replicas))])
        run.until_step(folder / "run", 10)
        kill_and_wait(run, run.replicas())
        # Each third restart in a row must find a newer checkpoint, or the launcher gives up.
        run.until(lambda: newest_step(folder / "run") > 10)
        kill_and_wait(run, run.replicas()[1:])
        kill_and_wait(run, [run.until(run.replicas)[1]])  # it is being started
        run.until_step(folder / "run", 14)
        workers = run.replicas()[1].children()
        kill_and_wait(run, workers[:1])
        code, output = run.end()
    return SimpleNamespace(run=folder / "run", code=code, output=output, workers=workers)


AS_WITH_GPUS = """
from dptrain.cli import main, train
train.count_gpus = lambda *, cpu: 2
raise SystemExit(main.main())
"""


def test_a1_holds_for_replicas_that_are_no_copies(tmp_path, whole):
    """Where there are GPUs each replica is an interpreter of its own, and loads for itself."""
    with running(tmp_path / "log", "--config", settings_file(tmp_path), command=("-c", AS_WITH_GPUS)) as run:
        run.until_step(tmp_path / "run", 8)
        assert all("-m" in replica.cmdline() for replica in run.replicas())
        kill_and_wait(run, run.replicas()[1:])
        code, output = run.end()
    assert code == 0, output
    assert output.count("replica 1 of 2 was killed by SIGKILL; starting again from") == 1
    assert_undisturbed(tmp_path / "run", whole)


def kill_and_wait(run, processes):
    """Kill, and wait until the replicas are others."""
    before = {process.pid for process in run.replicas()}
    for process in processes:
        process.kill()
    run.until(lambda: run.replicas() and not before & {process.pid for process in run.replicas()})


def test_a1_replicas_killed_at_random_change_nothing(battered, whole):
    """One restart for each of the kills, no more; parameters, optimizer, noise scale, log: as of the run without."""
    assert battered.code == 0, battered.output
    assert battered.output.count("starting again") == 7
    assert_undisturbed(battered.run, whole)


def test_a3_both_replicas_killed_at_once_are_one_failure(battered):
    """In all, six failures by a kill; which of two that die at once is named is arbitrary."""
    assert battered.output.count("was killed by SIGKILL; starting again from") == 6


def test_a5_a_replica_killed_while_it_starts_holds_nobody_up(battered):
    """The other, which waits for it, is started again with it: restarts = kills, and no address of the dead is read."""
    assert battered.code == 0
    steps = [line.rpartition(" ")[2] for line in battered.output.splitlines() if "starting again" in line]
    assert steps[4] == steps[5]  # nothing was trained in between


def test_a15_a_killed_loading_process_is_named(battered):
    """The error says so, and the run goes on after a restart; afterwards none of them is left."""
    (line,) = [line for line in battered.output.splitlines() if "failed with" in line]
    # Torch tells the signal ("is killed by signal: Killed") or only that it is gone, whichever it sees first.
    assert re.search(r"DataLoader worker \(pid.* (Killed|exited unexpectedly)", line), line
    assert all(gone(worker) for worker in battered.workers)


# Crashes: one run in which each attempt ends in another way

FAULTS = ["dataset", "model", "loss", "segv", "abort", "oom", "early"]
armed = {"fault": None, "calls": 0}


class Rotten(Noisy):
    """Raises when it is armed, or at one sample for ever."""

    def __getitem__(self, index):
        if armed["fault"] == "dataset" or (os.environ.get("TEST_FAULTS") == "poison" and index == 17):
            raise ValueError(f"sample {index} is rotten")
        return super().__getitem__(index)


def faulty():
    """Build a task in which rank 1 ends after some micro-steps, in each attempt in another way."""
    task = noisy()
    task.model.register_forward_pre_hook(fail_in_model)
    return replace(task, train_data=Rotten(), loss=faulty_loss)


def fail_in_model(*_):
    if armed["fault"] == "model":
        raise ValueError("the model is rotten")


def faulty_loss(model, batch):
    """Be slow_loss for so long that two saves are due: the second waits until the first is written, however slow."""
    attempt_number = int(os.environ["DPTRAIN_ATTEMPT"])
    armed["calls"] += model.training
    if os.environ["TEST_FAULTS"] == "each" and os.environ["RANK"] == "1" and armed["calls"] > 17:
        armed["fault"] = FAULTS[attempt_number] if attempt_number < len(FAULTS) else None
        fail_in_loss(armed["fault"])
    return slow_loss(model, batch)


def fail_in_loss(fault):
    if fault == "loss":
        raise ValueError("the loss is rotten")
    if fault == "segv":
        ctypes.string_at(0)
    if fault == "abort":
        os.abort()
    if fault == "oom":  # as the kernel does it
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "early":
        os._exit(0)


def crash(folder, faults):
    config = settings_file(folder, task=f"{__file__}:faulty", max_samples=600)
    with running(folder / "log", "--config", config, micro_step_s=0.01, TEST_FAULTS=faults) as run:
        return run.end()


@pytest.fixture(scope="module")
def crashed(tmp_path_factory):
    """The output of a run in which rank 1 crashes in seven ways, in as many attempts, and then goes on to the end."""
    code, output = crash(tmp_path_factory.mktemp("crashed"), "each")
    assert code == 0, output
    assert output.count("starting again") == len(FAULTS), output
    return output


@pytest.mark.parametrize("where", ["sample", "the model", "the loss"])
def test_a12_an_exception_is_reported_once_with_its_replica(crashed, where):
    """As traceback, whatever the other replica says about its lost peer; and the run goes on."""
    lines = [line for line in crashed.splitlines() if "is rotten" in line]
    own = [line for line in lines if where in line]
    assert (
        sum("ValueError" in line and line.startswith("dptrain train: replica 1 of 2 failed with") for line in own) == 1
    )
    assert crashed.count("Traceback (most recent call last)") >= 3
    assert "another replica ended" not in crashed


@pytest.mark.parametrize(("name", "words"), [("SIGSEGV", "Segmentation fault"), ("SIGABRT", "Aborted")])
def test_a14_a_signal_is_named_and_its_trace_kept(crashed, name, words):
    """With the line of Python at which the process was."""
    assert crashed.count(f"replica 1 of 2 was killed by {name}; starting again from step") == 1
    assert f"Fatal Python error: {words}" in crashed
    assert "in fail_in_loss" in crashed


def test_a14_a_replica_that_takes_too_much_memory_is_started_again(crashed):
    """The kernel ends it by SIGKILL."""
    assert crashed.count("replica 1 of 2 was killed by SIGKILL; starting again from step") == 1


def test_e9_a_replica_that_ends_early_has_failed(crashed):
    """Though its exit code is 0."""
    assert crashed.count("replica 1 of 2 ended with exit code 0 before its trainer had reported an end") == 1


def test_a13_a_crash_that_comes_again_ends_the_run(tmp_path):
    """At its second time at the same step; the sample is named each time."""
    code, output = crash(tmp_path, "poison")
    assert code == 1, output
    assert output.count("starting again") == 1
    (line,) = [line for line in output.splitlines() if "the same error at the same step" in line]
    assert "sample 17 is rotten" in line
    assert line.endswith("correct it, then continue with --resume")
