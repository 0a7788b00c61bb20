"""Squared norms handed over by a loop that reduces by itself give what the meter gives."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from dptrain.errors import ObservationError
from dptrain.observe import Observer
from tests.observe.plain import (
    MICRO,
    RATE,
    STEPS,
    make_model,
    mean_loss,
    micro_batch,
    pair,
    reference,
    sq_norm,
    trained,
)
from tests.replicas import run_replicas


def sharded_by_hand(rank, world_size):
    """Average by reduce-scatter into shards, step on them, gather the parameters: no gradient is ever whole."""
    model, observer = make_model(), Observer()
    for step in range(STEPS):
        small = []
        total = None
        for micro_step in range(2):
            grads = torch.autograd.grad(mean_loss(model, *micro_batch(step, micro_step, rank)), trained(model))
            flat = torch.cat([g.flatten() for g in grads])
            small.append(flat.square().sum())
            total = flat / 2 if total is None else total + flat / 2
        padded = torch.nn.functional.pad(total, (0, -len(total) % world_size))
        shard = torch.empty(len(padded) // world_size)
        dist.reduce_scatter(shard, list(padded.chunk(world_size)), op=dist.ReduceOp.SUM)
        shard /= world_size
        reading = observer.observe(small, sizes=[MICRO] * 2, large_sq_norm=shard.square().sum())
        parts = [torch.empty_like(shard) for _ in range(world_size)]
        dist.all_gather(parts, shard)
        mean, offset = torch.cat(parts), 0
        with torch.no_grad():
            for p in trained(model):
                p.sub_(RATE * mean[offset : offset + p.numel()].view_as(p))
                offset += p.numel()
    restored = Observer()
    restored.load_state_dict(observer.state_dict())
    assert restored.read() == observer.read()
    return pair(reading.noise_scale), sorted(reading.as_metrics())


def test_shards_that_add_up_give_the_same_reading():
    """Own squares before and a shard's square after the reduction are enough."""
    results = run_replicas(sharded_by_hand, world_size=2)
    assert results[0] == results[1]
    assert results[0][0] == pytest.approx(reference(2), rel=1e-4)
    assert "noise_scale/trace" in results[0][1]


def test_one_process_with_plain_numbers():
    """Floats will do, and weights are those of the losses."""
    observer = Observer()
    reading = observer.observe([4.0, 2.0], sizes=[2, 2], large_sq_norm=2.0)
    # (3 − 2)/(1/2 − 1/4) and 2 − 4/4.
    assert pair(reading.noise_scale) == (4.0, 1.0)
    assert observer.steps_dropped == 0
    assert sq_norm([]) == 0
    with pytest.raises(ObservationError, match="one of each"):
        observer.observe([1.0], sizes=[1, 1], large_sq_norm=1.0)
    with pytest.raises(ObservationError, match="positive size"):
        observer.observe([1.0], sizes=[0], large_sq_norm=1.0)
