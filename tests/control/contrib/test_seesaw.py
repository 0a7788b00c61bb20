"""Seesaw: rate and batch together do what the schedule alone would have done."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dptrain.config.learning_rate_schedule import LearningRateSchedule, StaircaseSchedule
from dptrain.control import RULES, Measurement
from dptrain.control.contrib.seesaw import SeesawLaw
from dptrain.errors import ConfigError

COSINE = LearningRateSchedule(kind="cosine", warmup_samples=1000, max_samples=101_000, final_fraction=0.1)
FALLING = [
    COSINE,
    LearningRateSchedule(kind="linear", max_samples=101_000),
    LearningRateSchedule(kind="wsd", max_samples=101_000, final_fraction=0.01),
]
positions = st.integers(0, 120_000)


def batch_at(law, position):
    measurement = Measurement(samples_seen=position, global_batch_size=1, noise_scale=None)
    return law.decide(measurement).global_batch_size


def rate(staircase, position, *, batch, first, rule="square_root"):
    return staircase.factor(position) * RULES[rule](None, batch=batch, reference_batch=first)


@pytest.mark.parametrize("schedule", FALLING, ids=lambda s: s.kind)
@given(position=positions)
def test_where_the_rate_would_be_halved(schedule, position):
    """At the k-th halving of the schedule the batch is 2^k times the first and the rate 2^(−k/2) of the base."""
    staircase = StaircaseSchedule(schedule=schedule)
    batch = batch_at(SeesawLaw(halvings=staircase.halvings, first=8), position)
    share = schedule.factor(position) if position >= schedule.warmup_samples else 1.0
    halvings = round(math.log2(batch / 8))
    if share > 1e-9:
        assert 2.0**-halvings >= share * (1 - 1e-6)
        assert 2.0 ** -(halvings + 1) <= share * (1 + 1e-6)
    if position >= schedule.warmup_samples:
        assert rate(staircase, position, batch=batch, first=8) == pytest.approx(2 ** (-halvings / 2))
        assert rate(staircase, position, batch=batch, first=8, rule="linear") == pytest.approx(1)


def test_known_answer():
    """A straight line to 0 over 1024 samples halves the rate at 512, 768 and 896."""
    staircase = StaircaseSchedule(schedule=LearningRateSchedule(kind="linear", max_samples=1024))
    law = SeesawLaw(halvings=staircase.halvings, first=8)
    assert [batch_at(law, p) for p in (0, 511, 512, 767, 768, 896)] == [8, 8, 16, 16, 32, 64]


@given(position=st.integers(0, 999))
def test_the_warm_up_is_the_schedule_s(position):
    """While the rate rises it is the schedule's own, and the batch is the first: half of the height is no halving."""
    staircase = StaircaseSchedule(schedule=COSINE)
    assert staircase.factor(position) == COSINE.factor(position)
    assert batch_at(SeesawLaw(halvings=staircase.halvings, first=8), position) == 8


@given(position=positions, largest=st.sampled_from([8, 16, 32]))
def test_a_batch_that_cannot_double_leaves_the_fall_to_the_rate(position, largest):
    """Where a bound holds the batch back, rate over √batch is what it would have been without the bound."""
    staircase = StaircaseSchedule(schedule=COSINE)
    batch = batch_at(SeesawLaw(halvings=staircase.halvings, first=8), position)
    held = min(batch, largest)
    free = rate(staircase, position, batch=batch, first=8) / math.sqrt(batch)
    assert rate(staircase, position, batch=held, first=8) / math.sqrt(held) == pytest.approx(free)


def test_the_end_of_a_fall_to_nothing():
    """Where the schedule ends at a rate of 0 the batch is still a number, and rises all the way."""
    law = SeesawLaw(halvings=StaircaseSchedule(schedule=FALLING[1]).halvings, first=1)
    batches = [batch_at(law, p) for p in range(0, 110_000, 1000)]
    assert all(after >= before for before, after in pairwise(batches))
    assert math.isfinite(float(batches[-1]))


def test_settings_out_of_range():
    """A schedule that never falls, and a batch of nothing, are refused."""
    with pytest.raises(ConfigError, match="choose one that falls"):
        StaircaseSchedule(schedule=LearningRateSchedule())
    with pytest.raises(ConfigError, match="got 0"):
        SeesawLaw(halvings=StaircaseSchedule(schedule=COSINE).halvings, first=0)
