"""The noise law on the grid and in a closed loop, and what the measuring laws share: cool-down, warm-up, reasons."""

import math
import re
from dataclasses import replace
from statistics import median

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dptrain.batch import BatchPlan
from dptrain.control import BatchSizeGrid, Measurement, OnGrid, StepTimeModel, StepTimes
from dptrain.control.contrib.pollux import PolluxLaw
from dptrain.control.goodput import GoodputLaw
from dptrain.control.noise_law import NoiseLaw, SinceChange
from dptrain.noise import Resolution, SmoothedMoments, noise_scale
from tests.control.known import AtLeast, Known, Unknown
from tests.control.simulated.closed_loop import arrival, closed_loop

positive = st.floats(1e-2, 1e6)


def settled(law, phi, *, batch=64, largest=1 << 30):
    """The batch at which a law stays, decision after decision."""
    control, before = OnGrid(law, BatchSizeGrid(quantum=1, largest=largest)), None
    while batch != before:
        before = batch
        measurement = Measurement(samples_seen=0, global_batch_size=batch, noise_scale=phi)
        _, decision = control.update(control.init(), measurement)
        batch = decision.global_batch_size
    return batch


@given(phi=positive, ratio=st.floats(0.05, 20), start=st.integers(0, 20))
def test_the_batch_is_the_ratio_times_the_noise_scale(phi, ratio, start):
    """From any batch it ends at a grid point within √2 of ratio · φ, and 20 % for the least gain."""
    right = max(ratio * phi, 1.0)
    assert 1 / 1.7 <= settled(NoiseLaw(ratio=ratio, min_gain=1e-3), Known(phi), batch=1 << start) / right <= 1.7


@given(phi=positive, rate=positive, start=st.integers(0, 20))
def test_samples_per_step_makes_it_the_root(phi, rate, start):
    """With r samples per step it ends within √2 of √(r · φ)."""
    law = NoiseLaw(samples_per_step=rate, min_gain=1e-4)
    right = max(math.sqrt(rate * phi), 1.0)
    batch = settled(law, Known(phi), batch=1 << start)
    # Where steps or samples are nearly free the gain is flat over many batches.
    cost = lambda b: math.log((b + phi) / b * (rate + b))  # noqa: E731 - short
    assert 1 / 1.7 <= batch / right <= 1.7 or cost(batch) - cost(right) < 0.02


def test_the_norm_test_is_a_ratio():
    """A tolerance of 0.5 asks for 4 φ: 512 at φ = 128."""
    assert settled(NoiseLaw(ratio=1 / 0.5**2), Known(128.0)) == 512


def test_open_above_twice_the_batch_is_tried():
    """A lower bound that is sure grows the batch; one that is not doubles it, where that is expected to gain."""
    assert settled(NoiseLaw(), AtLeast(64.0, 2.0), batch=64, largest=128) == 128
    assert settled(NoiseLaw(), AtLeast(1.0, 2.0, open_from=0.9), batch=64) <= 64


def test_nothing_known_moves_nothing():
    """Where the noise scale is not resolved the batch stays, and the reason says so."""
    control = OnGrid(NoiseLaw(), BatchSizeGrid(quantum=8, largest=1024))
    _, decision = control.update(
        control.init(), Measurement(samples_seen=0, global_batch_size=64, noise_scale=Unknown())
    )
    assert decision.global_batch_size == 64
    assert decision.reason == "kept: noise scale not resolved yet"


@pytest.mark.parametrize(
    ("phi", "start", "samples_per_step", "right", "within"),
    [
        (1024, 16, 64, 256, 100),  # 16 times too small
        (16, 512, 64, 32, 60),  # 16 times too large
        (4096, 8, 16, 256, 200),  # 32 times too small, and the right batch itself is far below the noise scale
    ],
)
def test_finds_the_right_batch(phi, start, samples_per_step, right, within):
    """From far too small and far too large a batch, the median run reaches the right one in some tens of steps."""
    law = NoiseLaw(samples_per_step=samples_per_step)
    runs = [closed_loop(law, phi_at=lambda _: phi, batch=start, seed=seed) for seed in range(9)]
    assert median(arrival(run, right) for run in runs) <= within
    # 4 times off at the end would be a run that was lost; noise may leave it at a neighbour of the right one.
    assert all(right / 4 <= run[-1] <= right * 4 for run in runs)


def test_follows_up_and_down():
    """The batch follows a noise scale that rises a hundredfold, and one that falls again."""
    run = closed_loop(
        NoiseLaw(samples_per_step=64),
        phi_at=lambda step: 40 * 100 ** (step / 300 if step < 300 else 2 - step / 300),
        batch=64,
        seed=0,
    )
    assert max(run) >= 256
    assert run[-1] <= max(run) / 2


def model(per_step=0.01, per_micro_batch=0.001, per_sample=0.001, *, sd=0.02, timed=(32, 64, 128)):
    """A step-time model whose parts have the same relative deviation, independent of each other."""
    parts = (per_step, per_micro_batch, per_sample)
    return StepTimeModel(
        per_step_s=per_step,
        per_micro_batch_s=per_micro_batch,
        per_sample_s=per_sample,
        covariance=tuple(tuple((sd * p) ** 2 if i == j else 0.0 for j in range(3)) for i, p in enumerate(parts)),
        full_at_samples=0.0,
        world_size=1,
        timed_batches=timed,
        recent_batches=timed,
        error=0.1,
    )


def decided(law, phi, *, batch=64, seen=10_000, step_time=None, state=None):
    control = OnGrid(law, BatchSizeGrid(quantum=8, largest=4096))
    measurement = Measurement(
        samples_seen=seen, global_batch_size=batch, noise_scale=phi, step_time=step_time or model()
    )
    return control.update(control.init() if state is None else state, measurement)[1]


GOODPUT = GoodputLaw(largest_micro_batch_size=64)


def test_a_batch_that_is_too_new_is_kept():
    """Fewer than five measurements after a change nothing moves; seen from the batch, whatever changed it."""
    state = SinceChange(global_batch_size=64, num_steps=96)
    kept = decided(NoiseLaw(), Known(1e6, num_steps=100), state=state)
    assert kept.global_batch_size == 64
    assert kept.reason == "kept: cool-down: 4 of 5 measurements since the last change"
    assert decided(NoiseLaw(), Known(1e6, num_steps=101), state=state).global_batch_size == 128
    other = SinceChange(global_batch_size=32, num_steps=0)
    assert "cool-down: 0 of 5" in decided(NoiseLaw(), Known(1e6, num_steps=101), state=other).reason


@pytest.mark.parametrize(
    "law", [NoiseLaw(no_decrease_samples=1200), GoodputLaw(largest_micro_batch_size=64, no_decrease_samples=1200)]
)
def test_no_decrease_in_the_warm_up(law):
    """In the first samples the batch grows where that is right, and does not shrink."""
    timed = model(timed=(32, 64, 128, 4096))
    kept = decided(law, Known(0.1), seen=1199, step_time=timed)
    assert kept.global_batch_size == 64
    assert decided(law, Known(0.1), seen=1200, step_time=timed).global_batch_size < 64
    assert decided(law, Known(1e6), seen=0, step_time=timed).global_batch_size == 128
    at_the_top = decided(law, Known(0.1), seen=0, batch=4096, step_time=timed)
    assert at_the_top.reason == "kept: no decrease during warm-up (1,200 samples)"


def test_the_noise_must_be_sure_enough():
    """A gain whose lower bound is below min_gain moves nothing; the same mean with a narrow interval does."""
    wide, narrow = Known(80.0, 3.0), Known(80.0, 1.05)
    assert decided(NoiseLaw(min_gain=0.0), Known(100.0, 1.05)).global_batch_size == 128
    assert decided(NoiseLaw(), wide).global_batch_size == 64
    assert decided(NoiseLaw(), narrow).global_batch_size == 64


def test_a_far_too_large_batch_goes_all_the_way_at_once():
    """From 4096 at a noise scale of 64 the law asks for a batch near it, not for half."""
    assert decided(NoiseLaw(), Known(64.0, 1.1), batch=4096).global_batch_size == 64


PLAIN = re.compile(r"\b(inf|nan|None)\b|∞|noise scale -?0(?![.\d])")
LAWS = [NoiseLaw(), NoiseLaw(samples_per_step=64.0), GOODPUT, PolluxLaw(largest_micro_batch_size=64)]
powers_of_ten = st.floats(-9, 9).map(lambda x: 10**x)
signed = powers_of_ten | powers_of_ten.map(lambda x: -x) | st.just(0.0)
parts_of_a_run = st.lists(st.tuples(st.integers(1, 256), st.integers(1, 8), powers_of_ten), max_size=3)


@st.composite
def readings(draw):
    """What a run may read off its gradients: signals below zero, nothing known of the error, or no error at all."""
    trace, square = draw(signed), draw(signed)
    variances = [(draw(st.sampled_from([0.0, 1e-3, 0.3, 3.0, math.inf])) * part) ** 2 for part in (trace, square)]
    variances = [math.inf if math.isnan(variance) else variance for variance in variances]
    return noise_scale(
        SmoothedMoments(
            noise_trace=trace,
            grad_sq_norm=square,
            var_trace=variances[0],
            var_grad=variances[1],
            cov=0.0,
            effective_steps=20.0,
            degrees_of_freedom=draw(st.sampled_from([1.0, 20.0])),
            num_steps=draw(st.sampled_from([4, 100])),
            num_samples=100.0,
        )
    )


@given(phi=readings(), timed=parts_of_a_run, batch=st.integers(1, 5000), seen=st.sampled_from([0, 10**6]))
@example(phi=noise_scale(None), timed=[], batch=64, seen=0)
def test_reasons_are_plain_and_say_what_is_done(phi, timed, batch, seen):
    """No reason prints inf, nan or 0 for what is unknown; `kept` keeps the batch, and any other names the new one.

    Measurements of all kinds, one batch timed or several or none, a batch in force that is on the grid or not.
    """
    times = StepTimes()
    for micro_batch_size, accumulation_steps, seconds in timed:
        shape = BatchPlan(micro_batch_size=micro_batch_size, accumulation_steps=accumulation_steps, world_size=1)
        for _ in range(7):
            times = times.timed(shape, seconds)
    measurement = Measurement(samples_seen=seen, global_batch_size=batch, noise_scale=phi, step_time=times.model())
    for law in LAWS:
        control = OnGrid(replace(law, no_decrease_samples=100), BatchSizeGrid(quantum=8, largest=1024))
        decision = control.update(control.init(), measurement)[1]
        assert not PLAIN.search(decision.reason), decision.reason
        assert decision.reason.startswith("kept: ") == (decision.global_batch_size == batch), decision.reason
        if decision.global_batch_size != batch:
            assert re.search(rf"\b{decision.global_batch_size}\b", decision.reason), decision.reason
            if phi.state is Resolution.INCONSISTENT:
                assert "does not run any more" in decision.reason


def test_a_reason_in_full():
    """The reason of a change has the noise scale with its interval, and what the change gains."""
    grown = decided(GOODPUT, Known(500.0, 1.1), step_time=model(per_step=0.2))
    assert grown.global_batch_size == 128
    assert grown.reason == "noise scale 500 [413, 605]; 128: +42% ±1% progress per second"
