"""Whether replicas are still the same: parameters and buffers, between steps, and before anything is saved."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dptrain.errors import DesyncError
from dptrain.runtime.replica_check import ReplicaCheck, compared_tensors
from tests.replicas import run_replicas


def model():
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    layers.register_buffer("codebook", torch.zeros(5))
    return layers


def test_all_is_compared_but_running_statistics():
    """Those each replica has of its own samples, and DDP overwrites them; a counter of batches is the same on all."""
    names = [name for name, _ in compared_tensors(model())]
    assert "codebook" in names
    assert "1.num_batches_tracked" in names
    assert not {"1.running_mean", "1.running_var"} & set(names)


def change(layers, what):
    if what == "buffer":
        layers.codebook[2] += 1
    elif what == "parameter":
        with torch.no_grad():
            layers[2].bias.add_(1)
    elif what == "running mean":
        layers[1].running_mean.add_(1)


def compare(rank, world_size, what):
    layers = model()
    found = []
    for every_steps in (100, 0):
        check = ReplicaCheck(compared_tensors(layers), every_steps=every_steps)
        check.check(3)
        if rank == 1:
            change(layers, what)
        try:
            check.check(4)
            found.append("")
        except DesyncError as error:
            found.append(str(error))
    return found


@pytest.mark.parametrize(
    ("what", "name"), [("buffer", "codebook"), ("parameter", "2.bias"), ("running mean", None), ("nothing", None)]
)
def test_a_difference_is_found_before_a_save_that_no_interval_falls_on(what, name):
    """At once, by name and on all replicas; never where the check is turned off."""
    for when_asked, never in run_replicas(compare, world_size=2, args=(what,)):
        assert never == ""
        if name is None:
            assert when_asked == ""
        else:
            assert f"drifted apart by step 4: {name} on both replicas" in when_asked
