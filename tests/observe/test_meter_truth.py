"""The meter on real replicas against gradients computed without any wrapper, and against training without it."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import dptrain
from dptrain.noise import PresentState, SquaredNorms, noise_scale, present_moments, present_updated, unbiased_moments
from tests.observe.tied import ACCUMULATION, MICRO, STEPS, make_model, mean_loss, micro_batch
from tests.replicas import run_replicas


def train(rank, world_size, method, scale=1.0, clip=False, bucket_view=False, broken_rank=None):
    """Train with a meter (or none) and return (parameters, noise scale pair, dropped)."""
    model = DistributedDataParallel(make_model(), find_unused_parameters=True, gradient_as_bucket_view=bucket_view)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    meter = None
    if method is not None:
        meter = dptrain.attach(model, method=method, every=1, loss_scale=None if scale == 1.0 else lambda: scale)
    for step in range(STEPS):
        for micro_step in range(ACCUMULATION):
            x, y = micro_batch(step, micro_step, rank)
            if broken_rank == rank and step == 2:
                x = x * math.nan
            last = micro_step == ACCUMULATION - 1
            with contextlib.nullcontext() if last else model.no_sync():
                (mean_loss(model, x, y) / ACCUMULATION * scale).backward()
        if meter is not None:
            meter.step()
        for p in model.parameters():
            if p.grad is not None:
                p.grad.div_(scale)
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        if broken_rank is None or step != 2:
            optimizer.step()
        optimizer.zero_grad()
    found = None if meter is None else (meter.read().noise_trace, meter.read().grad_sq_norm, meter.steps_dropped)
    return [p.detach().clone().tolist() for p in model.parameters()], found


def reference(world_size, *, accumulated, clip=False, skip=None):
    """Compute the same pair in one process from gradients of plain models."""
    model = make_model()
    trainable = [p for p in model.parameters() if p.requires_grad]
    sums = PresentState()
    for step in range(STEPS):
        gradients = {
            (rank, micro_step): torch.cat(
                [
                    g.flatten() if g is not None else torch.zeros(3)
                    for g in torch.autograd.grad(
                        mean_loss(model, *micro_batch(step, micro_step, rank)), trainable, allow_unused=True
                    )
                ]
            ).double()
            for rank in range(world_size)
            for micro_step in range(ACCUMULATION)
        }
        if step == skip:
            continue
        mean = torch.stack(list(gradients.values())).mean(0)
        small = [torch.stack([gradients[rank, m] for m in range(ACCUMULATION)]).mean(0) for rank in range(world_size)]
        if not accumulated:
            small = list(gradients.values())
        norms = SquaredNorms.of(
            [float(g @ g) for g in small],
            sizes=[MICRO * (ACCUMULATION if accumulated else 1)] * len(small),
            large_sq_norm=float(mean @ mean),
        )
        sums = present_updated(sums, unbiased_moments(norms))
        factor = min(1.0, 0.1 / (float(mean.norm()) + 1e-6)) if clip else 1.0
        offset = 0
        with torch.no_grad():
            for p in trainable:
                p.sub_(0.05 * factor * mean[offset : offset + p.numel()].view_as(p).float())
                offset += p.numel()
    pair = noise_scale(present_moments(sums))
    return pair.noise_trace, pair.grad_sq_norm


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("method", ["parameters", "hook"])
def test_agrees_with_gradients_of_a_plain_model(world_size, method):
    """Tied, frozen and unused parameters, no_sync, unequal replicas: the pair is that of plain gradients."""
    found = [result[1] for result in run_replicas(train, world_size=world_size, args=(method,))]
    # Decisions are taken from numbers that are equal on all ranks, to the last bit.
    assert found.count(found[0]) == len(found)
    trace, grad, dropped = found[0]
    expected = reference(world_size, accumulated=method == "hook")
    assert (trace, grad) == pytest.approx(expected, rel=1e-4)
    assert dropped == 0


@pytest.mark.parametrize("method", ["parameters", "hook"])
def test_measures_before_clipping_and_without_the_loss_scale(method):
    """Clipped and scaled by 1024, the pair is still that of the plain gradients along the clipped path."""
    trace, grad, _ = run_replicas(train, world_size=2, args=(method, 1024.0, True))[0][1]
    assert (trace, grad) == pytest.approx(reference(2, accumulated=method == "hook", clip=True), rel=1e-4)


def train_each_way(rank, world_size):
    return {
        bucket_view: [
            train(rank, world_size, method, bucket_view=bucket_view)[0] for method in (None, "parameters", "hook")
        ]
        for bucket_view in (False, True)
    }


@pytest.mark.parametrize("world_size", [2, 3])
def test_training_is_bit_identical_with_and_without_the_meter(world_size):
    """Neither hook changes a parameter in any bit, also where 1/world_size is not exact."""
    for bare, tapped, hooked in run_replicas(train_each_way, world_size=world_size)[0].values():
        assert bare == tapped
        assert bare == hooked


@pytest.mark.parametrize("method", ["parameters", "hook"])
def test_a_gradient_that_is_not_finite_on_one_replica_drops_the_step_on_all(method):
    """The step is counted as dropped everywhere and the mean is that of the other steps."""
    results = run_replicas(train, world_size=2, args=(method, 1.0, False, False, 1))
    assert [result[1][2] for result in results] == [1, 1]
    assert results[0][1][:2] == pytest.approx(reference(2, accumulated=method == "hook", skip=2), rel=1e-4)
