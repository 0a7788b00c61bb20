"""Running statistics of batch norms: those of one replica on any number, and untouched by what is not of a step."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dptrain.errors import TaskError
from dptrain.exchange.running_statistics import RunningStatistics
from tests.replicas import run_replicas

STEPS = ([4, 4, 4, 4], [4, 3, 3], [5], [2, 2, 2, 2, 2])
"""Samples in each micro-batch of some steps; most do not deal out evenly."""


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, momentum=0.2), nn.Linear(4, 2), nn.BatchNorm1d(2))


def micro_batches(step):
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(size, 3, generator=generator) for size in STEPS[step]]


def statistics_of(model):
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def plain():
    """What a loop in one process finds, micro-batch after micro-batch."""
    model = make_model()
    for step in range(len(STEPS)):
        for batch in micro_batches(step):
            model(batch)
    return statistics_of(model)


def shared(rank, world_size):
    """The same steps on replicas, which each have a filler where there are fewer micro-batches than replicas."""
    model = make_model()
    statistics = RunningStatistics(model, rank=rank, world_size=world_size)
    for step in range(len(STEPS)):
        batches = micro_batches(step)
        statistics.begin_step()
        for number in range(rank, -(-len(batches) // world_size) * world_size, world_size):
            is_real = number < len(batches)
            statistics.begin_micro_batch(number if is_real else None)
            model(batches[number] if is_real else 1e3 * torch.randn(4, 3))
        statistics.end_step(num_micro_batches=len(batches), finite=torch.tensor(True))
    found = {name: value.tolist() for name, value in statistics_of(model).items()}
    return found, [module.momentum for module in model if isinstance(module, nn.BatchNorm1d)]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_they_are_those_of_one_replica(world_size):
    """Mean, variance and counter after steps of uneven micro-batches, the same bits on each replica."""
    results = run_replicas(shared, world_size=world_size)
    for found, momenta in results:
        assert found == results[0][0]
        assert momenta == [0.2, 0.1]
    for name, value in plain().items():
        assert results[0][0][name] == pytest.approx(value.tolist(), rel=1e-5, abs=1e-6), name


def test_a_step_that_is_not_taken_leaves_them():
    """Neither a step that is skipped for its gradient nor one that is begun anew moves them."""
    model = make_model()
    before = statistics_of(model)
    statistics = RunningStatistics(model, rank=0, world_size=1)
    for discard in (True, False):
        statistics.begin_step()
        statistics.begin_micro_batch(0)
        model(torch.full((4, 3), float("inf")))
        if discard:
            statistics.discard_step()
        else:
            statistics.end_step(num_micro_batches=1, finite=torch.tensor(False))
        assert all(torch.equal(value, before[name]) for name, value in statistics_of(model).items())


def begun_anew(rank, world_size):
    """Two micro-batches a replica in each of two steps, which rank 1 begins anew after its second one."""
    model = make_model()
    statistics = RunningStatistics(model, rank=rank, world_size=world_size)
    batches = micro_batches(0)
    for _ in range(2):
        statistics.begin_step()
        for attempt in range(1 + (rank == 1)):
            if attempt:
                statistics.discard_step()
            for number in range(rank, len(batches), world_size):
                statistics.begin_micro_batch(number)
                model(batches[number])
        statistics.end_step(num_micro_batches=len(batches), finite=torch.tensor(True))
    return {name: value.tolist() for name, value in statistics_of(model).items()}


def test_a_step_begun_anew_on_one_replica_counts_once():
    """For want of memory there: the statistics are those of one process that saw each micro-batch once."""
    model = make_model()
    for batch in 2 * micro_batches(0):
        model(batch)
    for found in run_replicas(begun_anew, world_size=2):
        for name, value in statistics_of(model).items():
            assert found[name] == pytest.approx(value.tolist(), rel=1e-5, abs=1e-6), name


def frozen(rank, world_size):
    model = make_model()
    model[1].eval()
    statistics = RunningStatistics(model, rank=rank, world_size=world_size)
    statistics.begin_step()
    statistics.begin_micro_batch(rank)
    out = model[1](torch.randn(2, 4))
    statistics.end_step(num_micro_batches=2, finite=torch.tensor(True))
    return bool(out.isfinite().all()), float(model[1].running_var.sum()), float(model[3].running_var.sum())


def test_a_frozen_module_keeps_its_statistics_in_use():
    """A batch norm in eval mode divides by its statistics while others train: no replica may zero them."""
    assert [(finite, variance) for finite, variance, _ in run_replicas(frozen, world_size=2)] == [(True, 4.0)] * 2


def test_an_average_over_all_micro_batches_is_refused_on_several_replicas():
    """One replica may have it."""
    model = nn.Sequential(nn.BatchNorm1d(4, momentum=None))
    assert RunningStatistics(model, rank=0, world_size=1)
    with pytest.raises(TaskError, match="0 has momentum=None"):
        RunningStatistics(model, rank=0, world_size=2)


def test_a_model_without_batch_norms_has_none():
    """Layer norms and SyncBatchNorm are none of its business."""
    model = nn.Sequential(nn.LayerNorm(3), nn.SyncBatchNorm(3))
    statistics = RunningStatistics(model, rank=0, world_size=2)
    assert not statistics
    assert statistics.buffer_names() == []
    assert RunningStatistics(make_model(), rank=0, world_size=2).buffer_names()[:2] == [
        "1.running_mean",
        "1.running_var",
    ]
