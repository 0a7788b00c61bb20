"""Proves that the pair at present holds its truth on drifting courses, and that its record is all it remembers."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from dptrain.errors import ConfigError
from dptrain.noise import Moments, PresentState, noise_scale, present_moments, present_updated
from dptrain.noise.scale import heavy_tails

NUM_STEPS, NUM_RUNS = 300, 40
SHARE = np.arange(1, NUM_STEPS + 1) / NUM_STEPS
COURSES = {
    "constant": (np.ones(NUM_STEPS), np.ones(NUM_STEPS)),
    "signal ÷10 over the run": (np.ones(NUM_STEPS), 10**-SHARE),
    "signal ÷10 in the last quarter": (np.ones(NUM_STEPS), 10 ** -np.clip(4 * SHARE - 3, 0, 1)),
    "signal ÷10 at 80 %": (np.ones(NUM_STEPS), np.where(SHARE > 0.8, 0.1, 1.0)),
    "noise ×10 in the last quarter": (10 ** np.clip(4 * SHARE - 3, 0, 1), np.ones(NUM_STEPS)),
}
"""Problem 13: tr(Σ)/100 and |G|² by step."""


def measured(trace, grad, rng, *, batch=400.0, K=4, d=200):
    """Draw one run's pairs from the exact laws of ‖g_k − g‖² and ‖g‖², for d equal eigenvalues."""
    S = 100 * trace
    traces = S / d * rng.chisquare(d * (K - 1), len(S)) / (K - 1)
    large = S / d / batch * rng.noncentral_chisquare(d, grad * batch * d / S)
    return [
        Moments(noise_trace=s, grad_sq_norm=g, num_samples=batch, num_small=K)
        for s, g in zip(traces.tolist(), (large - traces / batch).tolist(), strict=True)
    ]


def followed(steps):
    state = PresentState()
    for moments in steps:
        state = present_updated(state, moments)
    return state


@pytest.mark.parametrize("course", COURSES)
def test_the_interval_holds_the_noise_scale_now(course):
    """Of 40 runs 35 at least print an interval of 95 % that holds φ over the last 20 steps (chance of fewer: 2 %)."""
    trace, grad = COURSES[course]
    truth = 100 * trace[-20:].mean() / grad[-20:].mean()
    rng = np.random.default_rng(13)
    scales = [noise_scale(present_moments(followed(measured(trace, grad, rng)))) for _ in range(NUM_RUNS)]
    assert sum(scale.lower <= truth <= scale.upper for scale in scales) >= 35
    assert np.median([scale.value or math.inf for scale in scales]) == pytest.approx(truth, rel=0.15)


def test_a_change_of_batch_rescales_nothing():
    """With a batch that falls to an eighth and fewer small batches half-way, a constant φ is still found."""
    rng = np.random.default_rng(5)
    one = np.ones(150)
    state = followed([*measured(one, one, rng), *measured(one, one, rng, batch=50.0, K=2)])
    scale = noise_scale(present_moments(state))
    assert scale.lower < 100 < scale.upper
    assert scale.value == pytest.approx(100, rel=0.15)


def test_the_record_goes_through_json_and_comes_back():
    """Every float reads back the same, and a foreign record is refused."""
    state = followed(measured(*COURSES["constant"], np.random.default_rng(6))[:30])
    assert PresentState.from_json(json.loads(json.dumps(state.to_json()))) == state
    assert PresentState.from_json(json.loads(json.dumps(PresentState().to_json()))) == PresentState()
    with pytest.raises(ConfigError, match="steps"):
        PresentState.from_json({name: value for name, value in state.to_json().items() if name != "steps"})


def test_a_record_of_before_in_which_all_had_names_is_read():
    """Its plain mean has a slope, which is 0; what lacks a part is refused in a sentence."""
    state = followed(measured(*COURSES["constant"], np.random.default_rng(6))[:30])
    before = state._asdict()
    for name in ("trace", "grad"):
        before[name] = {**before[name]._asdict(), "memories": [list(memory) for memory in before[name].memories]}
    assert PresentState.from_json(json.loads(json.dumps(before))) == state
    with pytest.raises(ConfigError, match="drifting quantity"):
        PresentState.from_json({**before, "trace": {"memories": before["trace"]["memories"]}})
    with pytest.raises(ConfigError, match="drifting quantity"):
        PresentState.from_json({**state.to_json(), "grad": state.to_json()["grad"][1:]})


def test_it_does_not_grow_with_the_run():
    """The record of 300 steps is no longer than that of 30, but for the digits."""
    steps = measured(*COURSES["constant"], np.random.default_rng(7))
    short, long = (len(json.dumps(followed(steps[:count]).to_json())) for count in (30, 300))
    assert long < 1.1 * short


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf, 1e-300, 1e300])
def test_any_floats_leave_finite_numbers(value):
    """Zeros, and what no float can square, leave a reading without NaN."""
    steps = measured(*COURSES["constant"], np.random.default_rng(8))[:20]
    odd = Moments(noise_trace=value, grad_sq_norm=value, num_samples=8.0)
    for state in (followed([*steps, odd]), followed([odd] * 20), followed([odd, *steps])):
        scale = noise_scale(present_moments(state))
        assert not any(math.isnan(x) for x in (scale.lower, scale.upper, scale.contrast(10)))


def sample_gradients(nu, rng, *, num_steps=400, K=2, b=16, d=20):
    """Problem 15: draw whole samples from Student's t with ν degrees of freedom; return each step's pair."""
    found = []
    for _ in range(num_steps):
        g = rng.standard_normal((K, b, d)) * np.sqrt(nu / rng.chisquare(nu, (K, b, 1))) + 1 / math.sqrt(d)
        small = g.mean(axis=1)
        large = float((small.mean(axis=0) ** 2).sum())
        trace = (float((small**2).sum(axis=1).mean()) - large) / (1 / b - 1 / (K * b))
        found.append(
            Moments(noise_trace=trace, grad_sq_norm=large - trace / (K * b), num_samples=float(K * b), num_small=K)
        )
    return found


def test_heavy_tails_are_seen():
    """At ν = 2.5, where half of the intervals miss the truth, nine runs of ten warn; normal noise does not."""
    rng = np.random.default_rng(15)
    heavy = [followed(sample_gradients(2.5, rng)) for _ in range(10)]
    normal = [followed(sample_gradients(1e6, rng)) for _ in range(10)]
    assert sum(heavy_tails(state.trace.lone, num_steps=state.steps) is not None for state in heavy) >= 9
    assert not any(heavy_tails(state.trace.lone, num_steps=state.steps) for state in normal)


def test_gradients_that_vanish_can_be_read():
    """As the loss goes to zero the pairs fall to 1e-160 and below, whose variances underflow: no division by zero."""
    state = PresentState()
    for step in range(40):
        size = 10.0 ** (-5 * step)
        state = present_updated(state, Moments(noise_trace=size, grad_sq_norm=size, num_samples=8.0))
        found = present_moments(state)
    assert math.isfinite(found.noise_trace)
    assert found.num_steps > 10
