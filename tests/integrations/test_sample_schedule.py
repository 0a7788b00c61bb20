"""Schedules that count updates end with the samples that they were planned for, whatever the batch does."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, ReduceLROnPlateau

from dptrain.integrations.sample_schedule import SampleSchedule

PLANNED, BATCH = 96, 32
GROWING = [32] * 5 + [48] * 8 + [256] * 9 + [24] * 9
"""Samples of the updates; with the last one below they are 96 × 32."""
GROWING += [PLANNED * BATCH - sum(GROWING)]


def linear_with_warm_up(optimizer):
    return LambdaLR(optimizer, lambda n: min(n / 20, (PLANNED - n) / (PLANNED - 20)))


def run(make, updates, schedule=None):
    """Return (rates by samples seen, scheduler) of a loop that steps its scheduler once per update."""
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0)
    scheduler, seen, rates = make(optimizer), 0, {}
    if schedule is not None:
        schedule.follow([scheduler])
        schedule.follow([scheduler])  # a second time changes nothing
    for num_samples in updates:
        if schedule is not None:
            schedule.note(num_samples)
        optimizer.step()
        scheduler.step()
        seen += num_samples
        rates[seen] = scheduler.get_last_lr()[0]
    return rates, scheduler


@pytest.mark.parametrize("make", [linear_with_warm_up, lambda optimizer: CosineAnnealingLR(optimizer, PLANNED)])
def test_a_schedule_is_where_the_unadapted_one_is_at_the_same_samples(make):
    """Over updates of 24 to 256 samples, at each whole number of planned updates, and at the end."""
    plain, _ = run(make, [BATCH] * PLANNED)
    rates, scheduler = run(make, GROWING, SampleSchedule(reference_batch_size=BATCH))
    for seen, rate in rates.items():
        if seen % BATCH == 0:
            assert rate == pytest.approx(plain[seen], abs=1e-9), seen
    assert max(rates) == PLANNED * BATCH
    assert scheduler.last_epoch == PLANNED


def test_fractions_survive_a_resume():
    """Half-way through an update's worth of samples the carried part is in the state."""
    first = SampleSchedule(reference_batch_size=BATCH)
    _, scheduler = run(linear_with_warm_up, [40, 40, 40], first)
    assert scheduler.last_epoch == 3
    assert first.state() == [pytest.approx(0.75)]
    second = SampleSchedule(reference_batch_size=BATCH)
    second.restore(first.state())
    _, resumed = run(linear_with_warm_up, [8], second)
    assert resumed.last_epoch == 1


def test_a_schedulers_state_is_its_own():
    """Its state can be pickled and has no more in it than before; released, it counts updates again."""
    schedule = SampleSchedule(reference_batch_size=BATCH)
    _, scheduler = run(lambda optimizer: CosineAnnealingLR(optimizer, PLANNED), [256], schedule)
    _, bare = run(lambda optimizer: CosineAnnealingLR(optimizer, PLANNED), [BATCH])
    assert set(scheduler.state_dict()) == set(bare.state_dict())
    assert b"last_epoch" in pickle.dumps(scheduler.state_dict())
    assert scheduler.last_epoch == 8
    assert isinstance(scheduler, CosineAnnealingLR)
    schedule.release()
    assert type(scheduler) is CosineAnnealingLR
    scheduler.step()
    assert scheduler.last_epoch == 9


def test_a_schedule_that_follows_a_metric_is_left_alone():
    """ReduceLROnPlateau is stepped with a loss, at times of its own."""
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0)
    scheduler = ReduceLROnPlateau(optimizer)
    schedule = SampleSchedule(reference_batch_size=BATCH)
    schedule.follow([scheduler])
    assert type(scheduler) is ReduceLROnPlateau


def forced(adapter, windows):
    """Have an adapter take these numbers of accumulation steps, one after another."""
    from dataclasses import replace

    decide = adapter.decide
    remaining = iter(windows)

    def forced_decide(**kwargs):
        decide(**kwargs)
        steps = next(remaining, adapter.window.accumulation_steps)
        adapter.window = replace(adapter.window, accumulation_steps=steps)
        return adapter.window

    adapter.decide = forced_decide


WINDOWS = [2, 4, 4, 8, 8, 8, 8, 4]


def micro_step(accelerator, model, optimizer, scheduler, adapter):
    with accelerator.accumulate(model):
        accelerator.backward(model(torch.randn(3, 4)).square().mean())
        adapter.step()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()


def test_accelerates_schedulers_end_with_the_samples():
    """Accelerate in one process: windows of 2 to 8 micro-batches, and the schedule is at its end when the data is."""
    from accelerate import Accelerator

    from dptrain.integrations.accelerate import BatchAdapter

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, num_micro_batches = nn.Linear(4, 1), 64
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = LambdaLR(optimizer, lambda n: 1 - n / (num_micro_batches / 2))
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    adapter = BatchAdapter(accelerator, model, optimizer, micro_batch_size=3)
    forced(adapter.adapter, WINDOWS)
    updates = 0
    for _ in range(num_micro_batches):
        micro_step(accelerator, model, optimizer, scheduler, adapter)
        updates += accelerator.sync_gradients
    assert updates < 20
    assert scheduler.scheduler.last_epoch == num_micro_batches / 2
    assert len(accelerator._custom_objects) == 1
    adapter.remove()
    assert accelerator._custom_objects == []


@pytest.mark.parametrize("accumulation_steps", [4, 2])
def test_a_schedule_of_accelerates_keeps_its_pace_where_the_first_window_is_another_on_resume(accumulation_steps):
    """A checkpoint of windows of two, loaded where the loop is written with four: as many samples to a step of it."""
    from accelerate import Accelerator

    from dptrain.integrations.accelerate import BatchAdapter

    def begun(steps):
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=steps)
        model = nn.Linear(4, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scheduler = LambdaLR(optimizer, lambda n: 1 - n / 100)
        model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
        return accelerator, model, optimizer, scheduler, BatchAdapter(accelerator, model, optimizer, micro_batch_size=3)

    accelerator, _, _, _, adapter = begun(2)
    record = adapter.state_dict()
    adapter.remove()
    accelerator, model, optimizer, scheduler, adapter = begun(accumulation_steps)
    adapter.load_state_dict(record)
    forced(adapter.adapter, [2] * 8)
    for _ in range(16):
        micro_step(accelerator, model, optimizer, scheduler, adapter)
    assert scheduler.scheduler.last_epoch == 8
    adapter.remove()
