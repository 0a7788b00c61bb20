"""The thin shell over torchrun: how many replicas, with which environment, and what comes back of them."""

from __future__ import annotations

import logging
import os
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from dptrain.cli.replicas import default_replicas, is_replica, is_silent_replica, start_replicas
from dptrain.errors import ConfigError
from dptrain.train.preemption import EXIT_RESUMABLE


@pytest.mark.parametrize(
    ("environment", "replica", "silent"),
    [
        ({}, False, False),
        ({"RANK": "1"}, False, False),
        ({"WORLD_SIZE": "2"}, False, False),
        ({"RANK": "0", "WORLD_SIZE": "1"}, True, False),
        ({"RANK": "1", "WORLD_SIZE": "2"}, True, True),
    ],
)
def test_a_replica_knows_that_it_is_one(environment, replica, silent):
    """By what every launcher sets; the first of them speaks for all."""
    assert is_replica(environment) is replica
    assert is_silent_replica(environment) is silent


@pytest.mark.parametrize(("num_gpus", "cpu", "expected"), [(0, False, 2), (4, False, 4), (1, False, 1), (4, True, 2)])
def test_the_default_is_all_gpus_or_two(monkeypatch, num_gpus, cpu, expected):
    """Two on the CPU: the least that has gradients to compare."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    assert default_replicas(cpu=cpu) == expected


@pytest.mark.parametrize("number", [0, -3])
def test_less_than_one_is_refused(number):
    """Before anything is started."""
    with pytest.raises(ConfigError, match=f"at least 1, got {number}"):
        start_replicas([], num_replicas=number)


@pytest.fixture
def launch(monkeypatch):
    """Take the place of torchrun; `launch.ends` is what the replicas come to."""
    noted = SimpleNamespace(ends=lambda: None, config=None, command=None)

    def elastic_launch(config, entrypoint):
        def begin(*arguments):
            noted.config, noted.command = config, (entrypoint, *arguments)
            noted.environment = dict(os.environ)
            noted.ends()

        return begin

    monkeypatch.setattr("torch.distributed.launcher.api.elastic_launch", elastic_launch)
    for name in ("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "")  # so that it is restored afterwards
        monkeypatch.delenv(name)
    return noted


def failing(codes):
    def end():
        failures = {
            rank: ProcessFailure(local_rank=rank, pid=0, exitcode=code, error_file="") for rank, code in codes.items()
        }
        raise ChildFailedError("dptrain", failures)

    return end


def test_each_replica_runs_this_command(launch):
    """Of this Python, with these arguments, on one node, without restarts, and with its share of the cores."""
    assert start_replicas(["train", "--seed", "1"], num_replicas=3) == 0
    assert launch.command == (sys.executable, "-m", "dptrain", "train", "--seed", "1")
    assert (launch.config.nproc_per_node, launch.config.max_nodes, launch.config.max_restarts) == (3, 1, 0)
    assert launch.environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    assert launch.environment["OMP_NUM_THREADS"] == str(max(1, os.cpu_count() // 3))


def test_what_the_user_set_stays(launch, monkeypatch):
    """Numbers of threads are somebody's measurement."""
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    start_replicas([], num_replicas=2)
    assert launch.environment["OMP_NUM_THREADS"] == "7"


@pytest.mark.parametrize(("codes", "expected"), [({0: 2}, 2), ({1: 74}, 74), ({0: -9}, 137), ({1: 75}, 75)])
def test_the_exit_code_is_that_of_the_replica(launch, codes, expected):
    """A replica that was killed by a signal counts as in a shell, 128 + its number."""
    launch.ends = failing(codes)
    assert start_replicas([], num_replicas=2) == expected


def test_a_stop_on_request_can_be_resumed(launch):
    """The launcher has passed the signal on and waited."""

    def end():
        raise SignalException("stopped", sigval=15)

    launch.ends = end
    assert start_replicas([], num_replicas=2) == EXIT_RESUMABLE


def test_the_launcher_is_silent(launch):
    """Its tables of exit codes would bury what the replicas say."""
    start_replicas([], num_replicas=2)
    for name in ("torch.distributed.elastic.agent.server.api", "torch.distributed.elastic.multiprocessing.api"):
        assert not logging.getLogger(name).isEnabledFor(logging.ERROR)
