"""The goodput law: against every batch tried one by one, what it explores, and in a closed loop."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dptrain.batch import BatchPlan
from dptrain.control import BatchSizeGrid, CriticalRatio, Measurement, OnGrid, StepTimeModel, StepTimes
from dptrain.control.goodput import GoodputLaw
from dptrain.control.step_time_model import ShapeTime, fit
from tests.control.known import AtLeast, Known

times, phis = st.floats(1e-3, 1e1), st.floats(1e-2, 1e7)
ALL = tuple(1 << k for k in range(31))


def model(per_step=0.0, per_micro_batch=0.0, per_sample=0.0, *, sd=0.0, timed=ALL, full_at=0.0, world=1):
    parts = (per_step, per_micro_batch, per_sample)
    return StepTimeModel(
        per_step_s=per_step,
        per_micro_batch_s=per_micro_batch,
        per_sample_s=per_sample,
        covariance=tuple(tuple((sd * p) ** 2 if i == j else 0.0 for j in range(3)) for i, p in enumerate(parts)),
        full_at_samples=full_at,
        world_size=world,
        timed_batches=timed,
        recent_batches=timed,
        error=None,
    )


def law(**settings):
    return GoodputLaw(**{"largest_micro_batch_size": 32, "critical_ratio": CriticalRatio(spread=1.0), **settings})


def decided(law, phi, *, batch, step_time, seen=0, largest=1 << 30):
    control = OnGrid(law, BatchSizeGrid(quantum=1, largest=largest))
    measurement = Measurement(samples_seen=seen, global_batch_size=batch, noise_scale=phi, step_time=step_time)
    return control.update(control.init(), measurement)[1]


def settled(law, phi, *, batch, step_time, largest=1 << 30):
    """The batch at which the law stays, decision after decision."""
    before = None
    while batch != before:
        before = batch
        batch = decided(law, phi, batch=batch, step_time=step_time, largest=largest).global_batch_size
    return batch


@given(
    per_step=times, per_micro=times, per_sample=times, knee=st.sampled_from([0.0, 6.0, 16.0]), phi=phis,
    kappa=st.floats(0.2, 5), start=st.integers(0, 20),
)  # fmt: skip
def test_no_batch_of_the_grid_is_faster(per_step, per_micro, per_sample, knee, phi, kappa, start):
    """With everything known, from any batch it ends where no other one makes 2 % more progress per second.

    Neighbours are what it climbs over, so the grid must have one hill: it has with these times.
    """
    step_time = model(per_step, per_micro, per_sample, full_at=knee)
    own = law(critical_ratio=CriticalRatio(median=kappa, spread=1.0))
    found = settled(own, Known(phi), batch=1 << start, step_time=step_time)
    rate = {b: math.log(b / (b + kappa * phi) / step_time.step_s(*own.layout(b, 1))) for b in ALL}
    # Going up it stops at the first double that gains less than min_gain.
    assert rate[found] >= max(rate.values()) - 0.02 * 3


@given(alpha=times, beta=times, phi=phis)
def test_on_a_line_it_is_the_root(alpha, beta, phi):
    """With T = α + βB it ends near √(φ·α/β), or where that gains nothing."""
    own = law(largest_micro_batch_size=1 << 30, min_gain=1e-6)
    right = min(max(math.sqrt(phi * alpha / beta), 1.0), 1 << 30)
    rate = lambda b: math.log(b / (b + phi) / (alpha + beta * b))  # noqa: E731 - short
    found = settled(own, Known(phi), batch=64, step_time=model(alpha, 0.0, beta))
    assert 1 / 1.5 < found / right < 1.5 or rate(right) - rate(found) < 0.01


def test_micro_batches_rise_before_accumulation():
    """Up to the largest micro-batch a further sample costs no micro-batch; beyond, accumulation steps do."""
    own = law(least_accumulation_steps=2)
    assert own.layout(64, 2) == (16, 2)
    assert own.layout(128, 2) == (32, 2)
    assert own.layout(256, 2) == (32, 4)
    assert own.layout(2, 2) == (0.5, 2)


def test_a_neighbour_whose_time_is_not_known_is_tried_once():
    """Where twice the batch may be faster and was not timed, it is; once its time is known, it is judged by that."""
    guess = model(0.07, 0.001, 0.001, sd=0.5, timed=(32, 64))
    tried = decided(law(), Known(80.0, 1.05), batch=64, step_time=guess)
    assert tried.global_batch_size == 128
    assert tried.reason.startswith(
        "noise scale 80 [72.6, 88.2]; timing 128: its step time was not measured yet, up to +"
    )
    known = model(0.07, 0.001, 0.001, sd=0.01, timed=(32, 64, 128))
    assert decided(law(), Known(80.0, 1.05), batch=64, step_time=known).global_batch_size == 64


@pytest.mark.parametrize("per_micro_batch", [0.0, 0.3])
def test_the_first_batch_that_accumulates_is_tried_where_a_micro_batch_may_cost_nothing(per_micro_batch):
    """What a second micro-batch costs no step of one says. It is run once, and left where that was a loss."""
    times = StepTimes()
    for micro_batch_size, accumulation_steps in ((8, 1), (16, 1), (32, 1), (32, 2)):
        shape = BatchPlan(micro_batch_size=micro_batch_size, accumulation_steps=accumulation_steps, world_size=1)
        for _ in range(10):
            times = times.timed(
                shape, 0.3 + per_micro_batch * (accumulation_steps - 1) + 3e-5 * shape.global_batch_size
            )
        if shape.global_batch_size == 32:
            tried = decided(law(), Known(12.0, 1.05), batch=32, step_time=times.model())
    assert tried.global_batch_size == 64
    assert "timing 64: its step time was not measured yet" in tried.reason
    after = decided(law(), Known(12.0, 1.05), batch=64, step_time=times.model())
    assert (after.global_batch_size == 32) == (per_micro_batch > 0)


def test_a_second_batch_is_timed():
    """While one batch alone was timed, the neighbour that is expected to gain most is timed, even at a loss."""
    shape = BatchPlan(micro_batch_size=32, accumulation_steps=2, world_size=1)
    one = fit([ShapeTime(shape=shape, seconds=0.16, variance=0.0004)])
    decision = decided(law(), Known(64.0, 1.2), batch=64, step_time=one)
    assert decision.global_batch_size in (32, 128)
    assert "timing" in decision.reason


def test_a_batch_that_was_not_timed_is_not_judged():
    """Until the batch in force has a step time the law stays, and says for what it waits."""
    for step_time in (None, model(1.0, timed=(8, 16))):
        decision = decided(law(), Known(1e6), batch=64, step_time=step_time)
        assert decision.global_batch_size == 64
        assert decision.reason == "kept: step time of 64 not measured yet"


def test_open_above_twice_the_batch_is_tried():
    """Where the noise scale has no upper bound yet, twice the batch is tried if its expected gain is enough."""
    step_time = model(1.0, 0.0, 0.001)
    decision = decided(law(), AtLeast(60.0, 3.0, open_from=0.9), batch=64, step_time=step_time)
    assert decision.global_batch_size == 128
    assert "no upper bound yet" in decision.reason or "progress per second" in decision.reason


def test_kappa_counts_the_noise_scale():
    """At κ = 4 the law ends where it ends at four times the noise scale."""
    step_time = model(0.1, 0.0, 0.001)
    four = settled(law(critical_ratio=CriticalRatio(median=4.0, spread=1.0)), Known(64.0), batch=8, step_time=step_time)
    assert four == settled(law(), Known(256.0), batch=8, step_time=step_time)
    assert four > settled(law(), Known(64.0), batch=8, step_time=step_time)


@given(phi=phis, start=st.integers(5, 12))
def test_where_steps_are_free_batches_do_not_grow(phi, start):
    """Where the time is proportional to the samples, no noise scale is worth a larger batch than a full micro-batch."""
    step_time = model(per_micro_batch=1.0)
    decision = decided(law(), Known(phi), batch=1 << start, step_time=step_time)
    assert decision.global_batch_size <= 1 << start
