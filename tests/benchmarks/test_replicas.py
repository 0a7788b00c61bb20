"""The launcher of the benchmarks: one result from several processes, and no silence where one of them fails."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing import ProcessRaisedException

from benchmarks.replicas import run_replicas


def total(rank, world_size, first):
    value = torch.tensor([float(first + rank)])
    dist.all_reduce(value)
    return [world_size, value.item(), torch.get_num_threads()]


def fail_on_one(rank, world_size):
    if rank == 1:
        raise RuntimeError("the second one fell")
    time.sleep(100)


def test_replicas_meet_and_rank_0_answers():
    """Three processes add up 10, 11 and 12, each with one thread."""
    assert run_replicas(total, world_size=3, args=(10,)) == [3, 33.0, 1]


def test_a_replica_that_fails_is_heard():
    """Its traceback comes up here at once, and the other one is ended."""
    start = time.monotonic()
    with pytest.raises(ProcessRaisedException, match="the second one fell"):
        run_replicas(fail_on_one, world_size=2)
    assert time.monotonic() - start < 60
