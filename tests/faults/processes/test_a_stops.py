"""Section A of the faults, through the command itself: a run that loses its launcher, or is asked to stop."""

from __future__ import annotations

import json
import os
import platform
import signal
import time
from types import SimpleNamespace

import pytest

from dptrain.checkpoint.store import load_newest
from dptrain.tracking.run_folder import RunFolder, newest_step
from tests.faults.processes.launched import assert_undisturbed, gone, last_step, running, settings_file

BUSY_S = 2
"""Seconds that a machine with other work may take longer for what is promised on a quiet one."""


def within(seconds, is_so):
    """Seconds until something is so, which must be less than given."""
    began_s = time.monotonic()
    while not is_so():
        assert time.monotonic() - began_s < seconds
        time.sleep(0.002)
    return time.monotonic() - began_s


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
    assert stop.took_s < 5 + BUSY_S  # five seconds, and what a busy machine takes on top


def test_a4_without_launcher_there_are_no_replicas(stopped):
    """They are gone within a second, and write nothing more."""
    assert stopped.orphans_s < 1 + BUSY_S
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
    assert took_s < 2 + BUSY_S
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
