"""The goodput law: against the closed form, against every batch tried one by one, and in a closed loop."""

import math
from itertools import pairwise
from statistics import median
from types import SimpleNamespace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dptrain.control import ExchangeRateLaw, FastestLaw, GoodputLaw, Measurement, StepTimeModel
from dptrain.control.limit import BatchSizeGrid
from dptrain.errors import ConfigError
from tests.control.closed_loop import arrival, closed_loop, layout

times = st.floats(1e-3, 1e1)
phis = st.floats(1e-2, 1e7)


def model(per_step=0.0, per_pass=0.0, per_sample=0.0, *, full_at=0.0, world=1, is_split_known=True, error=0.0):
    return StepTimeModel(
        per_step_s=per_step,
        per_pass_s=per_pass,
        per_sample_s=per_sample,
        full_at_samples=full_at,
        world_size=world,
        is_split_known=is_split_known,
        error=error,
    )


def known(lower, upper=None):
    """A noise scale of which only the interval is known, at two standard errors."""
    upper = lower if upper is None else upper
    contrast = lambda phi: 2.0 * ((phi < lower) - (phi > upper))  # noqa: E731 - an attribute of the fake
    return SimpleNamespace(bounds=lambda _z: (lower, upper), contrast=contrast)


def decided(law, phi, *, batch=64, step_time=None, samples_seen=0):
    return law.decide(
        Measurement(samples_seen=samples_seen, global_batch_size=batch, noise_scale=phi, step_time=step_time)
    )


@settings(deadline=None)
@given(alpha=times, beta=times, lower=phis, width=st.floats(1, 1e3), batch=st.integers(1, 10**5))
@example(alpha=1.5, beta=1.0, lower=2.0, width=1.0000000000000002, batch=1)
@example(alpha=1.5, beta=1.0, lower=2.0, width=1.0000000000000002, batch=10)
def test_on_a_line_it_is_the_exchange_rate_law(alpha, beta, lower, width, batch):
    """With T = α + βB it asks for the batch that the exchange rate r = α/β asks for, from any batch and interval."""
    fastest = FastestLaw(seconds=lambda b: alpha + beta * b)
    exact = ExchangeRateLaw(samples_per_step=alpha / beta)
    phi = known(lower, lower * width)
    assert fastest.batch_for(lower) == pytest.approx(exact.batch_for(lower), rel=1e-6)
    assert fastest.noise_scale_for(batch) == pytest.approx(exact.noise_scale_for(batch), rel=1e-5)
    assert fastest.samples_per_step(batch) == pytest.approx(alpha / beta, rel=1e-5)
    asked = [decided(law, phi, batch=batch).global_batch_size for law in (fastest, exact)]
    assert asked[0] == pytest.approx(asked[1], rel=1e-6)


@settings(deadline=None)
@given(per_step=times, per_sample=times, ratio=st.floats(0.1, 10), phi=phis)
def test_a_critical_ratio_counts_the_noise_scale_so_often(per_step, per_sample, ratio, phi):
    """With κ it asks at φ for what it asks for at κφ without, and prices a step as it does without."""
    step_time = model(per_step, 0.0, per_sample)
    counted, plain = (GoodputLaw(largest_micro_batch_size=10**9, critical_ratio=kappa) for kappa in (ratio, 1.0))
    asked, expected = (
        decided(law, known(phi * k), batch=1, step_time=step_time) for law, k in ((counted, 1.0), (plain, ratio))
    )
    assert asked.global_batch_size == pytest.approx(expected.global_batch_size, rel=1e-6)
    assert asked.reason.split(" samples")[0] == expected.reason.split(" samples")[0]


@settings(deadline=None)
@given(per_step=times, per_pass=times, per_sample=times, knee=st.floats(0, 100), phi=phis, larger=phis)
def test_maps_rise_and_invert(per_step, per_pass, per_sample, knee, phi, larger):
    """For any times the batch rises with the noise scale, and the noise scale that it is right for inverts that."""
    law, step_time = GoodputLaw(largest_micro_batch_size=32), model(per_step, per_pass, per_sample, full_at=knee)
    fastest = FastestLaw(seconds=law.step_time(step_time, present=64))
    smaller, greater = sorted((phi, larger))
    assert fastest.batch_for(smaller) <= fastest.batch_for(greater) * (1 + 1e-8)
    batch = fastest.batch_for(phi)
    assert fastest.noise_scale_for(batch) >= phi * (1 - 1e-6)
    assert fastest.noise_scale_for(batch / 1.001) <= phi * (1 + 1e-6)


def test_a_decision_is_cheap():
    """It is made at each step: a dozen looks at the time of a step find the batch where halving took eighty."""
    law, step_time = GoodputLaw(largest_micro_batch_size=256), model(6e-3, 3e-4, 9e-6)
    seconds, looks = law.step_time(step_time, present=64), []

    def watched(batch):
        looks.append(batch)
        return seconds(batch)

    assert FastestLaw(seconds=watched).batch_for(80.0) > 1
    assert len(looks) <= 16


@settings(deadline=None)
@given(per_step=times, per_pass=times, per_sample=times, knee=st.sampled_from([0.0, 6.0, 16.0]), phi=phis)
def test_it_is_the_best_of_all_rungs(per_step, per_pass, per_sample, knee, phi):
    """Rounded to a ladder of powers of two, no rung makes more progress per second, layout and knee included."""
    law, step_time = GoodputLaw(largest_micro_batch_size=32), model(per_step, per_pass, per_sample, full_at=knee)
    grid_points = [2**k for k in range(40)]
    asked = FastestLaw(seconds=law.step_time(step_time, present=64)).batch_for(phi)
    grid_point = min(BatchSizeGrid(quantum=1).nearest(max(asked, 1.0)), grid_points[-1])
    goodput = {b: b / (b + phi) / step_time.seconds(layout(b)) for b in grid_points}
    assert goodput[grid_point] == pytest.approx(max(goodput.values()), rel=1e-6)


def settled(law, phi, *, step_time):
    """The batch at which the law stays, from a batch of 1 on, without limits."""
    batch = 1.0
    for _ in range(200):
        batch, before = decided(law, phi, batch=batch, step_time=step_time).global_batch_size, batch
        if batch == pytest.approx(before, rel=1e-9):
            break
    return batch


@settings(deadline=None)
@given(alpha=times, beta=st.floats(0, 1e-3), phi=st.floats(10, 1e7), error=st.floats(1e-3, 1))
def test_doubt_costs_as_much_as_the_model_is_off(alpha, beta, phi, error):
    """Where the batch ends, to doubt a model that is right by e costs e of the progress per second at most."""
    law = GoodputLaw(largest_micro_batch_size=10**12)
    batch = settled(law, known(phi), step_time=model(alpha, 0.0, beta, error=error))
    goodput = batch / (batch + phi) / (alpha + beta * batch)
    greatest = 1 / (math.sqrt(alpha) + math.sqrt(beta * phi)) ** 2
    assert goodput >= greatest / (1 + min(error, 0.5)) * (1 - 1e-6)


def test_on_a_flat_time_doubt_bounds_the_batch():
    """Where samples cost nothing, as far as the model tells, the batch ends at κφ over its error, not at infinity."""
    law, phi = GoodputLaw(largest_micro_batch_size=10**12, critical_ratio=2.0), known(10.0)
    assert settled(law, phi, step_time=model(1.0, error=0.1)) == pytest.approx(200)
    assert settled(law, phi, step_time=model(1.0, error=1e-4)) == pytest.approx(2e5)


@settings(deadline=None)
@given(per_step=times, per_pass=times, per_sample=times, phi=phis, batch=st.integers(1, 10**5))
def test_doubt_asks_for_less_and_never_more(per_step, per_pass, per_sample, phi, batch):
    """The larger the error the smaller the batch; from a half on, and where nothing was predicted yet, it stays."""
    law = GoodputLaw(largest_micro_batch_size=32)
    asked = [
        decided(law, known(phi), batch=batch, step_time=model(per_step, per_pass, per_sample, error=error))
        for error in (0.0, 0.1, 0.3, 0.5, 2.0, None)
    ]
    batches = [decision.global_batch_size for decision in asked]
    assert all(larger >= smaller * (1 - 1e-6) for larger, smaller in pairwise(batches))
    assert batches[3:] == pytest.approx([batches[3]] * 3)


def test_micro_batches_rise_before_accumulation():
    """Up to the largest micro-batch a pass more costs nothing; beyond, each costs its constant too."""
    law, step_time = GoodputLaw(largest_micro_batch_size=32, least_accumulation_steps=2), model(1.0, 10.0, 0.1, world=2)
    seconds = law.step_time(step_time, present=64)
    assert seconds(64) == pytest.approx(1 + 2 * (10 + 16 * 0.1))
    assert seconds(128) == pytest.approx(1 + 2 * (10 + 32 * 0.1))
    assert seconds(256) == pytest.approx(1 + 4 * (10 + 32 * 0.1))


@pytest.mark.parametrize("phi", [1e-2, 10.0, 1e6])
def test_where_steps_are_free_batches_do_not_grow(phi):
    """Where the time is proportional to the samples no noise scale is worth a larger batch than the one that fills."""
    fills = GoodputLaw(largest_micro_batch_size=32)
    step_time = model(per_step=0.0, per_pass=1.0, per_sample=0.0)
    for batch in (32, 64, 1024):
        asked = decided(fills, known(phi, math.inf), batch=batch, step_time=step_time).global_batch_size
        assert BatchSizeGrid(quantum=1).nearest(asked) <= batch
    assert decided(fills, known(phi), batch=1024, step_time=step_time).global_batch_size <= 32 * math.sqrt(2)


def test_where_samples_are_free_batches_grow():
    """Up to the micro-batch that fills the device a larger batch costs nothing, whatever the noise scale."""
    law, step_time = GoodputLaw(largest_micro_batch_size=256), model(0.0, 0.0, 1.0, full_at=128)
    assert decided(law, known(0.1), batch=8, step_time=step_time).global_batch_size >= 128 / math.sqrt(2)


@settings(deadline=None)
@given(alpha=times, beta=times, phi=phis, wrong=st.floats(1 / 6, 6))
def test_a_wrong_noise_scale_costs_little(alpha, beta, phi, wrong):
    """A noise scale that is wrong by a factor of six at most costs 18 % of the progress per second at most."""
    fastest = FastestLaw(seconds=lambda batch: alpha + beta * batch)
    best, asked = fastest.batch_for(phi), fastest.batch_for(wrong * phi)
    goodput = [batch / (batch + phi) / (alpha + beta * batch) for batch in (best, asked)]
    assert 0.82 * goodput[0] <= goodput[1] <= goodput[0] * (1 + 1e-6)


@pytest.mark.parametrize("step_time", [None, model(1.0, 1.0, 1.0, is_split_known=False)], ids=["none", "one batch"])
def test_before_the_split_is_known_it_goes_half_of_the_way(step_time):
    """Where one batch was timed at most, the batch goes to √(B·φ), and the reason says that r is assumed."""
    law = GoodputLaw(largest_micro_batch_size=32)
    up, down = (decided(law, known(phi), batch=64, step_time=step_time) for phi in (6400, 0.64))
    assert up.global_batch_size == pytest.approx(640)
    assert down.global_batch_size == pytest.approx(6.4)
    assert "worth 64 samples (assumed" in up.reason


def test_a_second_batch_is_timed():
    """Where the one timed batch looks right, by the assumption, the double is asked for, not sooner."""
    law, one = GoodputLaw(largest_micro_batch_size=32), model(1.0, 1.0, 1.0, is_split_known=False)
    seems_right = SimpleNamespace(bounds=lambda _z: (32.0, 128.0), contrast=lambda _phi: 0.5)
    unmeasured = SimpleNamespace(bounds=lambda _z: (0.0, math.inf), contrast=lambda _phi: 0.0)
    decision = decided(law, seems_right, batch=64, step_time=one)
    assert decision.global_batch_size == 128
    assert decision.reason.endswith("to time another, grow to 128")
    assert decided(law, seems_right, batch=64, step_time=None).global_batch_size == 64
    assert decided(law, unmeasured, batch=64, step_time=one).global_batch_size == 64


def test_where_it_may_not_shrink_it_times_a_larger_batch():
    """In the part of a run that only grows, the first guess is not downwards; after it, it may be."""
    one = model(0.0, 0.01, 0.0, is_split_known=False)
    law, small = GoodputLaw(largest_micro_batch_size=1024, grow_only_samples=100), known(1, 4)
    for samples_seen, expected in [(0, 128), (99, 128), (100, 16)]:
        decision = decided(law, small, batch=64, step_time=one, samples_seen=samples_seen)
        assert decision.global_batch_size == pytest.approx(expected)


def test_reason_has_the_split():
    """The reason names r, and the times that it comes from."""
    law = GoodputLaw(largest_micro_batch_size=1024)
    reason = decided(law, known(310, 500), step_time=model(8e-3, 2e-3, 1e-4)).reason
    assert reason == (
        "a step is worth 100 samples (8 ms a step, 2 ms a pass, 100 µs a sample, off by 0%); "
        "noise scale is above 310, the batch of 64 is right for 41 (z = +2.0): grow to 176.1"
    )


def test_reason_says_that_the_split_is_doubted():
    """Where the error bounds what a step is worth, the reason says so: a sample needs half of 256 µs, not 100 µs."""
    law = GoodputLaw(largest_micro_batch_size=1024)
    reason = decided(law, known(310, 500), step_time=model(8e-3, 2e-3, 1e-4, error=0.6)).reason
    split = "8 ms a step, 2 ms a pass, 100 µs a sample, off by 60%"
    assert reason.startswith(f"a step is worth 78 samples at most ({split}); noise scale is above")


@pytest.mark.parametrize("interval", [(math.nan, 3.0), (1.0, math.nan), (100.0, 2.0), (0.0, math.inf)])
def test_nonsense_and_ignorance_move_nothing(interval):
    """An interval that makes no sense, or says nothing, leaves the batch alone."""
    law, phi = GoodputLaw(largest_micro_batch_size=32), SimpleNamespace(bounds=lambda _z: interval)
    for sureness in (math.nan, 0.0, 0.9, -0.9):
        phi.contrast = lambda _phi, sureness=sureness: sureness
        assert decided(law, phi, step_time=model(1.0, 1.0, 1.0)).global_batch_size == 64


@pytest.mark.parametrize(
    "wrong",
    [
        {"largest_micro_batch_size": 0},
        {"largest_micro_batch_size": 8, "least_accumulation_steps": 0},
        {"largest_micro_batch_size": 8, "z": 0},
        {"largest_micro_batch_size": 8, "critical_ratio": 0},
    ],
)
def test_settings_out_of_range(wrong):
    """Settings that no run can have are refused."""
    with pytest.raises(ConfigError):
        GoodputLaw(**wrong)


@pytest.mark.parametrize(
    ("phi", "start", "share"),
    [(1024, 16, 0.9), (1024, 4096, 0.8), (8192, 32, 0.9), (1024, 1024, 0.9)],
    ids=["16 times too small", "16 times too large", "drowned", "at the noise scale"],
)
def test_finds_its_way_in_tens_of_steps(phi, start, share):
    """From 16 times off, with times measured on the way, the median run arrives within 80 steps.

    So it does from the noise scale, where nothing but the time of steps says that the batch is four times too large.

    Of the best fixed batch's progress per second it makes nine tenths in 500 steps, and eight from above, where the
    first ten steps alone are worth a hundred and sixty.
    """
    seconds = lambda s: 0.064 + s.accumulation_steps * (0.004 + 0.001 * s.micro_batch_size)  # noqa: E731 - short
    law, exact = GoodputLaw(largest_micro_batch_size=32), model(0.064, 0.004, 0.001)
    best = max((2**k for k in range(3, 17)), key=lambda b: b / (b + phi) / exact.seconds(layout(b)))
    runs = [
        closed_loop(law, phi_at=lambda _: phi, batch=start, seed=seed, seconds=seconds, steps=500) for seed in range(9)
    ]
    assert median(arrival(run, best) for run in runs) <= 80
    assert median(run[-1] for run in runs) == best
    goodput = [sum(b / (b + phi) for b in run) / sum(exact.seconds(layout(b)) for b in run) for run in runs]
    assert median(goodput) >= share * best / (best + phi) / exact.seconds(layout(best))
