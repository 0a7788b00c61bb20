"""Trainings side by side: which GPUs and threads each has, and a process of one from start to end."""

from __future__ import annotations

import signal
import time

import pytest

import dptrain
from dptrain.errors import ConfigError
from dptrain.sweep import child_runs as runs
from dptrain.sweep.child_runs import RunProcess, Site


@pytest.fixture
def machine(monkeypatch):
    def made(*, cores=8, gpus=0, visible=None):
        monkeypatch.setattr(runs.os, "sched_getaffinity", lambda _: set(range(cores)))
        monkeypatch.setattr(runs, "count_gpus", lambda *, cpu: 0 if cpu else gpus)
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    return made


def test_cores_are_filled(machine):
    """One training for each replica's worth of them, and the threads that they leave."""
    machine(cores=8)
    site = Site.here(num_parallel=None, num_replicas=2, cpu=True)
    assert (site.num_parallel, site.num_threads) == (4, 1)
    assert site.environment(3) == {"OMP_NUM_THREADS": "1"}
    assert Site.here(num_parallel=2, num_replicas=2, cpu=True).num_threads == 2
    assert Site.here(num_parallel=None, num_replicas=20, cpu=True).num_parallel == 1


def test_gpus_are_dealt_out(machine):
    """Each slot has its own, by the names that are in force."""
    machine(gpus=4, visible="2,3,6,7")
    site = Site.here(num_parallel=None, num_replicas=2, cpu=False)
    assert site.num_parallel == 2
    assert [site.environment(slot)["CUDA_VISIBLE_DEVICES"] for slot in range(2)] == ["2,3", "6,7"]
    machine(gpus=4)
    assert Site.here(num_parallel=1, num_replicas=1, cpu=False).environment(0)["CUDA_VISIBLE_DEVICES"] == "0"
    assert Site.here(num_parallel=None, num_replicas=1, cpu=True).gpus == []


def test_threads_that_somebody_chose_stay(machine, monkeypatch):
    """The variable is passed on as it is."""
    machine()
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert Site.here(num_parallel=None, num_replicas=1, cpu=True).environment(0) == {}


@pytest.mark.parametrize(
    ("num_parallel", "num_replicas", "said"),
    [(0, 1, "--parallel must be"), (None, 0, "--replicas must be"), (None, 3, "2 GPUs"), (3, 1, "room for 2")],
)
def test_more_than_there_is_room_for_is_refused(machine, num_parallel, num_replicas, said):
    """In a sentence with both numbers."""
    machine(gpus=2)
    with pytest.raises(ConfigError, match=said):
        Site.here(num_parallel=num_parallel, num_replicas=num_replicas, cpu=False)


def wait(process):
    deadline_s = time.monotonic() + 60
    while process.code is None:
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    return process.code


def test_a_process_prints_into_its_log(tmp_path):
    """Behind what is there, and its last line can be read; its exit code is that of the command."""
    log = tmp_path / "log.txt"
    log.write_text("before\n")
    assert wait(RunProcess(["--version"], log=log, environment={}, fork=True)) == 0
    refused = RunProcess(["nonsense"], log=log, environment={}, fork=True)
    assert wait(refused) == 2
    first, second, third = log.read_text().splitlines()
    assert (first, second) == ("before", f"dptrain {dptrain.__version__}")
    assert "unknown command 'nonsense'" in third
    assert refused.last_line() == third


def test_a_fresh_interpreter_does_the_same(tmp_path):
    """Where there are GPUs, a copy of a process would not do."""
    log = tmp_path / "log.txt"
    assert wait(RunProcess(["--version"], log=log, environment={}, fork=False)) == 0
    assert log.read_text() == f"dptrain {dptrain.__version__}\n"


def test_a_process_can_be_stopped_and_killed(tmp_path):
    """Both from outside; a stop is asked for once."""
    process = RunProcess(["train", "--task=quadratic"], log=tmp_path / "log.txt", environment={}, fork=True)
    process.kill()
    assert process.code == -signal.SIGKILL
    process.stop()
    assert not process.is_asked_to_stop
    assert RunProcess.last_line(process) == ""
