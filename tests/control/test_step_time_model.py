"""The step-time posterior: what it recovers, how sure it is, and that no part of it is ever nothing."""

import json
import math
import random
from dataclasses import asdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dptrain.batch import BatchPlan
from dptrain.control.step_time_model import ShapeTime, StepTimeModel, fit

seconds = st.floats(1e-4, 1e2)


def shape(micro, accumulation, world=1):
    return BatchPlan(micro_batch_size=micro, accumulation_steps=accumulation, world_size=world)


def line(per_step, per_micro_batch, per_sample, full_at=0):
    return lambda s: per_step + s.accumulation_steps * (per_micro_batch + per_sample * max(s.micro_batch_size, full_at))


def fitted(truth, shapes, *, sd=0.01, rng=None):
    noise = lambda: math.exp(rng.gauss(0, sd)) if rng else 1.0  # noqa: E731 - short
    return fit([ShapeTime(shape=s, seconds=truth(s) * noise(), variance=sd**2) for s in shapes])


WALK = [shape(4, 1), shape(8, 1), shape(16, 1), shape(32, 1), shape(32, 2), shape(32, 4)]


@settings(max_examples=40)
@given(seconds, seconds, seconds)
def test_recovers_a_line(per_step, per_micro_batch, per_sample):
    """From exact times trusted to 3 %, other shapes are predicted within 3 % and two deviations, whatever the parts."""
    truth = line(per_step, per_micro_batch, per_sample)
    model = fitted(truth, WALK[2:], sd=0.03)
    for pair in ((24, 2), (24, 4), (16, 8), (32, 3), (32, 8)):
        mean, variance = model.log_ratio(pair, (32, 4))
        exact = math.log(truth(shape(*pair)) / truth(shape(32, 4)))
        assert abs(mean - exact) < 0.03 + 2 * math.sqrt(variance)


@settings(max_examples=60)
@given(
    times=st.lists(st.floats(1e-6, 1e4), min_size=1, max_size=6),
    sd=st.floats(0.01, 0.5),
)
def test_no_part_is_nothing_and_the_variance_is_one(times, sd):
    """For any times, however noisy, each part is positive and finite, and the covariance has no negative direction."""
    model = fit([ShapeTime(shape=s, seconds=t, variance=sd**2) for s, t in zip(WALK, times, strict=False)])
    for part in (model.per_step_s, model.per_micro_batch_s, model.per_sample_s):
        assert 0 < part < math.inf
    for one in WALK:
        mean, variance = model.log_ratio((one.micro_batch_size, one.accumulation_steps), (64, 8))
        assert math.isfinite(mean)
        assert 0 <= variance < math.inf


def test_one_shape_leaves_the_split_open():
    """With one shape its time is right, the split is the prior's third each, and twice the batch is known to 20 %."""
    model = fitted(line(1, 1, 1), [shape(4, 2)])
    assert model.seconds(shape(4, 2)) == pytest.approx(11, rel=1e-6)
    assert not model.is_split_known
    assert model.per_step_s / 11 == pytest.approx(1 / 3, abs=0.01)
    mean, variance = model.log_ratio((8, 2), (4, 2))
    assert mean == pytest.approx(math.log(4 / 3), abs=0.01)
    assert 0.1 < math.sqrt(variance) < 0.3


def test_timing_a_shape_makes_its_ratio_known():
    """The deviation of the ratio of two timed shapes is that of their times; a third not timed is less sure."""
    model = fitted(line(1, 0.1, 0.1), [shape(8, 1), shape(4, 1)], sd=0.02)
    assert math.sqrt(model.log_ratio((8, 1), (4, 1))[1]) == pytest.approx(0.02 * math.sqrt(2), rel=0.3)
    assert model.log_ratio((4, 2), (4, 1))[1] > 4 * model.log_ratio((8, 1), (4, 1))[1]


def test_the_interval_covers_the_truth():
    """Over 200 random machines with noise, the truth of an untimed double lies within two deviations in over 90 %."""
    rng, inside = random.Random(0), 0
    for _ in range(200):
        shares = sorted(rng.random() for _ in range(2))
        parts = shares[0], shares[1] - shares[0], (1 - shares[1]) / 16
        truth = line(*parts)
        model = fitted(truth, [shape(8, 1), shape(32, 1), shape(16, 1)], sd=0.03, rng=rng)
        mean, variance = model.log_ratio((32, 2), (16, 1))
        inside += abs(mean - math.log(truth(shape(32, 2)) / truth(shape(16, 1)))) < 2 * math.sqrt(variance)
    assert inside >= 180


def test_a_knee_is_seen_only_where_there_is_one():
    """A time flat up to 16 samples has its knee at 16; a straight line with 3 % of noise has none in most fits."""
    rng = random.Random(1)
    assert fitted(line(1, 0, 0.1, full_at=16), WALK, sd=0.03).full_at_samples == 16
    knees = [fitted(line(1, 1, 0.1), WALK, sd=0.03, rng=rng).full_at_samples for _ in range(20)]
    assert knees.count(0) >= 16


@settings(max_examples=30)
@given(seconds, st.lists(st.floats(0.1, 10), min_size=6, max_size=6))
def test_the_unit_does_not_matter(unit, times):
    """Times in another unit have the same split and the same relative deviations."""
    one, other = (
        fit([ShapeTime(shape=s, seconds=t * u, variance=0.01) for s, t in zip(WALK, times, strict=True)])
        for u in (1.0, unit)
    )
    assert other.per_sample_s == pytest.approx(unit * one.per_sample_s, rel=1e-6)
    assert other.log_ratio((32, 8), (4, 1)) == pytest.approx(one.log_ratio((32, 8), (4, 1)), rel=1e-6, abs=1e-9)


def test_survives_json():
    """A model is the same after JSON text."""
    model = fitted(line(1, 1, 1), WALK)
    assert StepTimeModel.from_json(json.loads(json.dumps(asdict(model)))) == model
