"""The interval at which steps are measured: from timings alone, and on replicas that read at different times."""

from __future__ import annotations

import time

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

import dptrain
from dptrain.observe.measurement_interval import LAG, MeasurementInterval
from tests.observe.plain import make_model, mean_loss, micro_batch
from tests.replicas import run_replicas


def run(interval_rule, *, cost_s, step_s, steps):
    """Drive a pace by made-up timings; return the steps that were measured."""
    measured, pending, since = [], [], None
    measure = interval_rule.next_is_measured()
    for step in range(steps):
        if measure:
            measured.append(step)
            num = 0 if since is None else step - since
            pending.append([cost_s, num * step_s + cost_s, num] if num else [0.0, 0.0, 0.0])
            since = step
            while len(pending) > LAG:
                interval_rule.note(pending.pop(0))
            interval_rule.close()
        measure = interval_rule.next_is_measured()
    return measured


@pytest.mark.parametrize(("cost_s", "budget"), [(0.004, 0.01), (0.2, 0.01), (0.03, 0.05), (1e-5, 0.01)])
def test_the_interval_is_the_smallest_within_the_budget(cost_s, budget):
    """With steps of 0.1 s the interval settles where cost/(interval · 0.1 s) is just within the budget."""
    interval_rule = MeasurementInterval(budget=budget)
    measured = run(interval_rule, cost_s=cost_s, step_s=0.1, steps=3000)
    assert cost_s / (interval_rule.every * 0.1) <= budget * (1 + 1e-9)
    assert interval_rule.every == 1 or cost_s / ((interval_rule.every - 1) * 0.1) > budget
    assert measured[-1] - measured[-2] == interval_rule.every
    assert measured[:3] == [0, 1, 2]
    # What was taken while the interval still grew counts as well.
    settled = cost_s / (0.1 * interval_rule.every)
    assert settled * (1 - 1e-9) <= interval_rule.share <= 2 * settled


def test_one_disturbed_timing_moves_nothing():
    """The median of the last timings takes no notice of a step that was a hundred times as long."""
    interval_rule = MeasurementInterval(budget=0.01)
    run(interval_rule, cost_s=0.01, step_s=0.1, steps=300)
    before = interval_rule.every
    for _ in range(LAG + 1):
        interval_rule.note([0.01, 10.0, 1.0])
        interval_rule.close()
        interval_rule.note([0.01, 0.11, 1.0])
        interval_rule.close()
    assert interval_rule.every == before


def test_a_fixed_interval_stays():
    """every=3 measures each third step, whatever it costs."""
    assert run(MeasurementInterval(every=3), cost_s=1.0, step_s=0.1, steps=10) == [0, 3, 6, 9]


def uneven_readers(rank, world_size):
    """One rank reads at each step, one is slow, one never looks; return what was measured where, and the share."""
    model = DistributedDataParallel(make_model())
    meter = dptrain.attach(model, budget=0.05)
    measured = []
    hooks = []
    for step in range(60):
        if rank == 1:
            time.sleep(0.001)
        mean_loss(model, *micro_batch(step, 0, rank)).backward()
        reading = meter.step()
        measured.append(reading.measured)
        if rank == 0:
            _ = reading.noise_scale
        hooks.append(sum(bool(p._backward_hooks) for p in model.parameters()) > 0)
        model.zero_grad()
    return measured, meter.read(), meter.every, meter.share, hooks


def test_all_ranks_measure_the_same_steps():
    """Ranks that read at different times agree on each interval, and a skipped step has no hooks."""
    results = run_replicas(uneven_readers, world_size=3)
    assert results.count(results[0]) == 3
    measured, scale, every, share, hooks = results[0]
    assert scale.num_steps == sum(measured) < 60
    assert every > 1
    assert 0 < share < 1
    # Hooks stand after a step exactly where the next one is measured.
    assert hooks[:-1] == measured[1:]


def test_skipped_steps_announce_nothing():
    """A step that is not measured takes in no micro-batch, so the next measured one has its own only."""
    model = make_model()
    with dptrain.attach(model, every=2) as meter:
        for step in range(4):
            for micro_step in range(2):
                (mean_loss(model, *micro_batch(step, micro_step, 0)) / 2).backward()
            assert meter.step().measured == (step % 2 == 0)
            model.zero_grad()
    assert meter.read().num_steps == 2
    assert meter.read().num_samples == 20
    assert meter.every == 2
    assert meter.share > 0
    assert torch.isfinite(torch.tensor(meter.read().noise_trace))
