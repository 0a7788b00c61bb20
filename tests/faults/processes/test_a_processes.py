"""Section A of the faults, through the command itself: processes that die, hang, crash, or are asked to stop.

A2 is `test_killed_after_any_step_it_ends_the_same` in tests/train/runs/test_resume.py. Several faults share one launch
where each leaves its own trace, since a launch takes seconds.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import random
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from dptrain.checkpoint.store import load_newest
from dptrain.tracking.jsonl import read_rows
from dptrain.tracking.run_folder import RunFolder, newest_step, write_config
from tests.replicas import run_replicas
from tests.runs import Noisy, attempt, make_config, noisy, slow_loss, trained

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.timeout(300)


class Run:
    """`dptrain train` on two replicas, in a process of its own."""

    def __init__(self, log, *arguments, command=("-m", "dptrain"), micro_step_s=0.05, **environment):
        self.log = Path(log)
        # A session of its own, as that of a terminal.
        with self.log.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, *command, "train", "--replicas", "2", *map(str, arguments)],
                env={**os.environ, "OMP_NUM_THREADS": "1", "TEST_MICRO_STEP_S": str(micro_step_s), **environment},
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                start_new_session=True,
            )
        self.pid = self.process.pid

    def replicas(self):
        """The two of them, rank 0 first."""
        found = sorted(psutil.Process(self.pid).children(), key=lambda child: child.create_time())
        return found if len(found) == 2 else []

    def until(self, is_so):
        """Wait for something, which the run must live to see."""
        deadline = time.monotonic() + 60
        while not (found := is_so()):
            assert self.process.poll() is None, self.output()
            assert time.monotonic() < deadline, self.output()
            time.sleep(0.005)
        return found

    def until_step(self, folder, step):
        self.until(lambda: last_step(folder) >= step)

    def end(self):
        """Return exit code and output."""
        try:
            return self.process.wait(timeout=90), self.output()
        finally:
            self.close()

    def output(self):
        return self.log.read_text()

    def close(self):
        """End the launcher, and with it the replicas."""
        self.process.kill()
        self.process.wait()


@contextmanager
def running(*arguments, **settings):
    run = Run(*arguments, **settings)
    try:
        yield run
    finally:
        run.close()


def last_step(folder):
    path = Path(folder) / "metrics.jsonl"
    return max((row["step"] for row in read_rows(path)), default=0) if path.exists() else 0


def settings_file(folder, **changes):
    """Settings of a run in `folder / "run"`."""
    path = folder / "settings.yaml"
    write_config(path, replace(make_config(folder / "run"), **changes))
    return path


def train_whole(rank, world_size, folder):
    attempt(folder)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What the run leaves that nobody interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    run_replicas(train_whole, world_size=2, args=(folder,))
    return SimpleNamespace(folder=folder, **trained(folder))


def assert_undisturbed(folder, whole):
    for part, value in trained(folder).items():
        assert value == getattr(whole, part), part


def gone(process):
    """Whether a process runs no more; one that only waits to be buried does not."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def within(seconds, is_so):
    """Seconds until something is so, which must be less than given."""
    began_s = time.monotonic()
    while not is_so():
        assert time.monotonic() - began_s < seconds
        time.sleep(0.002)
    return time.monotonic() - began_s


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
            kill_and_wait(run, [chance.choice(run.replicas())])
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


# One run, stopped again and again


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, whole):
    """A run that loses its launcher, is asked to stop in three ways, is met by a second launch, and ends."""
    folder = tmp_path_factory.mktemp("stopped")
    run_dir, found = folder / "run", SimpleNamespace(run=folder / "run")

    with running(folder / "log", "--config", settings_file(folder)) as run:
        run.until_step(run_dir, 3)
        replicas = run.replicas()
        run.process.kill()
        found.orphans_s = within(5, lambda: all(gone(replica) for replica in replicas))
    before = contents(run_dir)
    time.sleep(0.3)
    found.written_by_orphans = contents(run_dir) != before

    resume = ("--run_dir", run_dir, "--resume")
    holder = RunFolder(run_dir, resume=True)
    with running(folder / "log", *resume) as run:
        found.refused = run.end()
    holder.close()

    with running(folder / "log", *resume) as run:
        run.until_step(run_dir, last_step(run_dir) + 2)
        found.by_launcher = stop(run, run_dir, lambda: os.kill(run.pid, signal.SIGTERM))

    with running(folder / "log", *resume, "--num_workers", "2") as run:
        run.until_step(run_dir, last_step(run_dir) + 2)
        found.workers = [worker for replica in run.replicas() for worker in replica.children()]
        # To the second replica alone, but to all of its processes: they have a session of their own.
        found.by_one = stop(run, run_dir, lambda: os.killpg(run.replicas()[1].pid, signal.SIGTERM))

    with running(folder / "log", *resume, micro_step_s=2.5) as run:  # no step ends while it is asked
        run.until_step(run_dir, last_step(run_dir) + 1)
        os.killpg(run.pid, signal.SIGINT)
        time.sleep(2.3)
        began_s = time.monotonic()
        os.killpg(run.pid, signal.SIGINT)
        found.twice = (*run.end(), time.monotonic() - began_s)
    found.after_twice = load_newest(run_dir / "checkpoints")

    with running(folder / "log", *resume, micro_step_s=0) as run:
        found.code, found.output = run.end()
    return found


def stop(run, run_dir, ask):
    """Ask a run to stop; return exit code, output, seconds, the newest checkpoint's step and the last one reported."""
    began_s = time.monotonic()
    ask()
    code, output = run.end()
    took_s = time.monotonic() - began_s
    return SimpleNamespace(
        code=code,
        output=output,
        took_s=took_s,
        saved=load_newest(run_dir / "checkpoints").step,
        reported=last_step(run_dir),
    )


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def assert_stopped_well(stop):
    assert stop.code == 75, stop.output
    assert stop.saved == stop.reported, "no step is lost"
    assert f"stopped on request after step {stop.reported}" in stop.output
    assert "Traceback" not in stop.output
    assert stop.took_s < 5 + 2  # five seconds, and what a busy machine takes on top


def test_a4_without_launcher_there_are_no_replicas(stopped):
    """They are gone within a second, and write nothing more."""
    assert stopped.orphans_s < 1
    assert not stopped.written_by_orphans


def test_a6_sigterm_finishes_the_step_and_saves(stopped):
    """Exit code 75, no step lost, a sentence that tells how to go on."""
    assert_stopped_well(stopped.by_launcher)


def test_a7_sigterm_to_one_replica_stops_all(stopped):
    """They agree on the step after which they stop."""
    assert_stopped_well(stopped.by_one)


def test_a9_sigterm_to_loading_processes_loses_nothing(stopped):
    """Schedulers send it to all processes, these too: the step under way still gets its samples."""
    assert len(stopped.workers) == 4
    assert_stopped_well(stopped.by_one)
    assert all(gone(worker) for worker in stopped.workers)


def test_a11_a_second_ctrl_c_means_it(stopped):
    """The run ends within two seconds, where it stands, no file is broken, and what was saved before stays."""
    code, output, took_s = stopped.twice
    assert code == 75, output
    assert took_s < 2
    assert "stopped on request before a further step was saved; step " in output
    assert stopped.after_twice.passed_over == ()


def test_a16_a_second_launch_is_refused_by_name(stopped):
    """With process and host of the holder; and the lock of a holder that was killed is free."""
    code, output = stopped.refused
    assert code == 2
    first, second = output.splitlines()
    assert first.startswith("run ")
    assert second.startswith("dptrain train: ")
    assert f"is in use by process {os.getpid()} on {platform.node()} since 20" in output


def test_what_was_stopped_ends_as_if_it_had_not_been(stopped, whole):
    """After all of this."""
    assert stopped.code == 0, stopped.output
    assert_undisturbed(stopped.run, whole)


def test_a10_a_peer_that_hangs_does_not_hold_up_a_stop(tmp_path):
    """Within the grace: who waits for it says where it stands, it is killed itself, and what was saved stays."""
    run_dir = tmp_path / "run"
    with running(tmp_path / "log", "--config", settings_file(tmp_path), "--grace", "3") as run:
        run.until(lambda: newest_step(run_dir) >= 2)
        run.replicas()[1].send_signal(signal.SIGSTOP)
        time.sleep(0.5)  # now rank 0 waits for it
        began_s = time.monotonic()
        os.kill(run.pid, signal.SIGTERM)
        code, output = run.end()
        took_s = time.monotonic() - began_s
    assert code == 71, output
    assert took_s < 3 + 2  # the grace, and what a busy machine takes on top
    assert "replica 0 of 2 was asked to stop and could not within 2.5 s; it stands here:" in output
    assert "replica 0 of 2 was asked to stop and could not" in output
    assert load_newest(run_dir / "checkpoints").passed_over == ()


def test_a17_the_last_step_is_saved_wherever_it_falls(whole):
    """The run does not end on a multiple of the interval, and its last checkpoint is of its last step."""
    summary = json.loads((whole.folder / "summary.json").read_text())
    assert summary["samples_seen"] % 25
    assert newest_step(whole.folder) == summary["steps"]
