"""A meter whose step is closed on one rank alone ends in an error or a warning with the remedy, and not in a hang."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import dptrain
from dptrain.errors import ObservationError
from dptrain.observe.checks import first_step
from dptrain.observe.checks.first_step import FirstStepCheck
from tests.replicas import run_replicas


class WentOnError(Exception):
    """Leaves a forward pass before DDP's own collectives, which would wait for rank 0."""


def step_on_rank_0_alone(rank, world_size):
    first_step.PATIENCE_S = 0.0
    model = DistributedDataParallel(nn.Linear(3, 1))
    meter = dptrain.attach(model, every=1)
    store = dist.distributed_c10d._get_default_store()
    model(torch.randn(4, 3)).mean().backward()
    if rank == 0:
        store.wait(["went on"])
        with pytest.raises(ObservationError) as caught:
            meter.step()
        return str(caught.value)

    def leave(*_):
        raise WentOnError

    model.register_forward_pre_hook(leave)  # behind the meter's
    model.zero_grad()
    with pytest.raises(WentOnError):
        model(torch.randn(4, 3))
    store.set("went on", "")
    return None


def test_a_step_on_rank_0_alone_is_an_error_with_the_remedy():
    """The other rank clears its gradients and goes on, which is known at the first step already."""
    assert "on all ranks, not under `if rank == 0`" in run_replicas(step_on_rank_0_alone, world_size=2)[0]


def rank_1_late(rank, world_size):
    first_step.PATIENCE_S = 0.0
    store = dist.distributed_c10d._get_default_store()
    if rank == 1:
        store.wait(["warned"])
        FirstStepCheck(None).meet()
        return []

    def heard(message, *_, **__):
        told.append(str(message))
        store.set("warned", "")

    told, warnings.showwarning = [], heard
    warnings.simplefilter("always")
    FirstStepCheck(None).meet()
    return told


def test_a_rank_that_comes_late_is_warned_of_and_waited_for():
    """Nothing says that it went on, so it may only be slow."""
    told, _ = run_replicas(rank_1_late, world_size=2)
    assert len(told) == 1
    assert "1 of 2 ranks" in told[0]


def first_passes_thrown_away(rank, world_size):
    first_step.PATIENCE_S = 0.0
    model = DistributedDataParallel(nn.Linear(3, 1))
    meters = [dptrain.attach(model, every=1) for _ in range(2)]
    with warnings.catch_warnings(record=True) as caught:
        for _ in range(3):
            for _ in range(2):
                model.zero_grad()
                model(torch.randn(4, 3)).square().mean().backward()
            dist.barrier()  # so that a rank without patience is not told of one that is only slow
            for meter in meters:
                meter.step()
        found = [meter.read().num_steps for meter in meters]
    return found, [str(w.message) for w in caught if "went on" in str(w.message)]


def test_passes_that_all_ranks_throw_away_are_no_reason():
    """SAM's first passes are thrown away by all ranks, before the first step as well; two meters are told apart."""
    assert run_replicas(first_passes_thrown_away, world_size=2) == [([3, 3], [])] * 2
