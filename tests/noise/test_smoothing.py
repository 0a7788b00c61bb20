"""Proves the running mean of the pair and the covariance of its error: against direct sums, drift, and rounding."""

from __future__ import annotations

import json
import math
from dataclasses import astuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dptrain.errors import ConfigError
from dptrain.noise import Moments, MomentSums, Smoothing, smoothed

PAIR = st.floats(-1e6, 1e6).filter(lambda v: v == 0 or abs(v) > 1e-6)
STEPS = st.lists(st.tuples(PAIR, PAIR, st.integers(1, 4096)), min_size=1, max_size=12)
MEMORIES = [Smoothing(), Smoothing(memory=1.0), Smoothing(half_life_samples=300), Smoothing(half_life_samples=math.inf)]
NUMBERS = st.floats(allow_nan=True, allow_infinity=True, allow_subnormal=True)


def absorb(steps, *, smoothing=MEMORIES[0], sums=None):
    sums = sums or MomentSums()
    for trace, grad, num_samples in steps:
        moments = Moments(noise_trace=trace, grad_sq_norm=grad, num_samples=float(num_samples))
        sums = smoothing.update(sums, moments)
    return sums


def direct_weights(batches, *, smoothing):
    """The weight of each step, from the definition: its samples, times the fade since."""
    seen = np.cumsum(batches)
    if smoothing.half_life_samples is not None:
        return batches * 0.5 ** ((seen[-1] - seen) / smoothing.half_life_samples)
    steps = np.arange(1, len(batches))
    kept = np.minimum(seen[:-1] / seen[1:], steps / (steps + 1)) ** (math.log(2) / smoothing.memory)
    return batches * np.append(np.cumprod(kept[::-1])[::-1], 1.0)


def white(rng, *, num_steps, num_runs):
    """Independent skewed pairs with a correlation, shape (num_steps, num_runs) each: means 5 and 2."""
    shared = rng.exponential(1, (num_steps, num_runs))
    return 4 + shared, 3 - shared + 0.5 * rng.standard_normal((num_steps, num_runs))


@pytest.mark.parametrize("smoothing", MEMORIES, ids=str)
def test_sums_are_the_direct_ones(smoothing):
    """Means, covariance, effective steps and degrees of freedom equal those written out over all steps at once."""
    rng = np.random.default_rng(1)
    w, x = np.array([8, 8, 16, 64, 4, 32, 32.0]), rng.normal(5, 2, (2, 7))
    found = smoothed(absorb(zip(*x.tolist(), w.tolist(), strict=True), smoothing=smoothing))
    w = direct_weights(w, smoothing=smoothing)
    means, share = x @ w / w.sum(), (w**2).sum() / w.sum() ** 2
    changes, v = np.diff(x), w[1:] ** 2
    cov = share * (changes * v) @ changes.T / (2 * v.sum())
    assert (found.noise_trace, found.grad_sq_norm) == pytest.approx(tuple(means))
    assert (found.var_trace, found.var_grad, found.cov) == pytest.approx((cov[0, 0], cov[1, 1], cov[0, 1]))
    assert found.effective_steps == pytest.approx(1 / share)
    # Satterthwaite: 2·E²/Var of Σ v Δ², from the covariance matrix of the changes.
    D = np.diff(np.eye(7), axis=0)
    form = D.T @ np.diag(v) @ D
    assert found.degrees_of_freedom == pytest.approx(np.trace(form) ** 2 / np.trace(form @ form))


@given(pair=st.tuples(PAIR, PAIR), batches=st.lists(st.integers(1, 10_000), min_size=2, max_size=20))
@settings(derandomize=True)
def test_a_constant_comes_back(pair, batches):
    """Equal pairs give that pair without bias from the start, whatever the batches, and no variance."""
    found = smoothed(absorb([(*pair, b) for b in batches]))
    assert (found.noise_trace, found.grad_sq_norm) == pytest.approx(pair, rel=1e-12)
    assert found.var_trace == found.var_grad == found.cov == 0


def test_nothing_and_one_step():
    """Before the first step there is no mean; after one there is a mean without a variance."""
    assert smoothed(MomentSums()) is None
    found = smoothed(absorb([(3.0, -2.0, 8)]))
    assert (found.noise_trace, found.grad_sq_norm) == (3, -2)
    assert found.var_trace == found.var_grad == math.inf
    assert found.effective_steps == found.degrees_of_freedom == 1


@given(cuts=st.lists(st.integers(1, 1000), min_size=1, max_size=10), smoothing=st.sampled_from(MEMORIES[2:]))
@settings(derandomize=True)
def test_a_fixed_half_life_does_not_depend_on_how_samples_are_cut_into_steps(cuts, smoothing):
    """The past fades by the same factor over the same samples, in one step or in many."""
    start = absorb([(1.0, 1.0, 100)])
    together = smoothing._keep(start, sum(cuts))
    apart = 1.0
    for cut in cuts:
        apart *= smoothing._keep(start, cut)
        start = absorb([(1.0, 1.0, cut)], smoothing=smoothing, sums=start)
    assert apart == pytest.approx(together, rel=1e-9)


@given(steps=STEPS, factor=st.sampled_from([2, 64, 1024]))
@settings(derandomize=True)
def test_the_unit_of_samples_is_irrelevant(steps, factor):
    """All batches times a constant (tokens for sequences, say) changes no mean, variance or degree of freedom."""
    one = smoothed(absorb(steps))
    other = smoothed(absorb([(x, y, factor * b) for x, y, b in steps]))
    assert astuple(other)[:-1] == pytest.approx(astuple(one)[:-1], rel=1e-9)


@given(steps=STEPS, exponent=st.integers(-20, 20))
@settings(derandomize=True)
def test_scaled_gradients_scale_everything(steps, exponent):
    """Pairs times 4^e: means times 4^e, variances times 16^e, exactly."""
    c = 4.0**exponent
    one, other = smoothed(absorb(steps)), smoothed(absorb([(c * x, c * y, b) for x, y, b in steps]))
    assert (other.noise_trace, other.grad_sq_norm) == (c * one.noise_trace, c * one.grad_sq_norm)
    assert (other.var_trace, other.var_grad, other.cov) == (
        c * c * one.var_trace,
        c * c * one.var_grad,
        c * c * one.cov,
    )


@given(steps=STEPS, smoothing=st.sampled_from(MEMORIES))
@settings(derandomize=True)
def test_the_covariance_is_one(steps, smoothing):
    """Variances are not negative, the correlation is within ±1, and 1 ≤ degrees of freedom ≤ steps."""
    found = smoothed(absorb(steps, smoothing=smoothing))
    assert found.var_trace >= 0
    assert found.var_grad >= 0
    assert abs(found.cov) <= math.sqrt(found.var_trace) * math.sqrt(found.var_grad) * (1 + 1e-9)
    assert 1 <= found.degrees_of_freedom <= max(len(steps) - 1, 1)
    assert 1 - 1e-12 <= found.effective_steps <= len(steps) * (1 + 1e-12)


@given(steps=STEPS, more=STEPS, smoothing=st.sampled_from(MEMORIES))
@settings(derandomize=True)
def test_the_record_survives_json_bit_for_bit(steps, more, smoothing):
    """A run that goes on from the written record is the run that was never interrupted."""
    sums = absorb(steps, smoothing=smoothing)
    read = MomentSums.from_json(json.loads(json.dumps(sums.to_json(), allow_nan=False)))
    assert repr(read) == repr(sums)
    assert repr(absorb(more, smoothing=smoothing, sums=read)) == repr(absorb(more, smoothing=smoothing, sums=sums))


@pytest.mark.parametrize("edit", [{"extra": 1.0}, {"weight": None}], ids=["unknown name", "missing name"])
def test_a_foreign_record_is_refused(edit):
    """A record with a name too many or too few is an error that says which."""
    record = {**MomentSums().to_json(), **edit}
    record = {name: value for name, value in record.items() if value is not None}
    with pytest.raises(ConfigError, match=next(iter(edit))):
        MomentSums.from_json(record)


@given(steps=st.lists(st.tuples(NUMBERS, NUMBERS, NUMBERS), max_size=8), smoothing=st.sampled_from(MEMORIES))
@settings(derandomize=True, max_examples=300)
def test_no_pair_breaks_the_record(steps, smoothing):
    """Whatever floats come, nothing raises and every sum stays finite."""
    sums = absorb([(5.0, 2.0, 8), *steps, (4.0, 3.0, 8)], smoothing=smoothing)
    assert all(math.isfinite(value) for value in astuple(sums))
    assert all(math.isfinite(value) for value in astuple(smoothed(sums)))


@pytest.mark.parametrize("pair", [(math.nan, 1.0), (1.0, math.inf), (1e200, 1.0), (1.0, -1e200), (1e-200, 1e-180)])
def test_a_pair_whose_squares_do_not_fit_is_refused(pair):
    """Overflow would poison the sums and underflow feign certainty: the record stays as it was."""
    sums = absorb([(5.0, 2.0, 8), (4.0, 3.0, 8)])
    assert absorb([(*pair, 8)], sums=sums) is sums


def test_zero_gradients_are_a_measurement():
    """The pair (0, 0), of a model that has stopped learning, is taken in like any other."""
    assert smoothed(absorb([(0.0, 0.0, 8)] * 3)).num_steps == 3


@pytest.mark.parametrize("spread", [1e-3, 1e-7, 1e-9])
def test_a_tiny_relative_spread_keeps_its_variance(spread):
    """Pairs that differ in the ninth digit give their variance to 1 %: sums of squares would give rounding."""
    noise = np.random.default_rng(3).standard_normal((200, 2))
    found = smoothed(absorb([(1 + spread * x, 1 - spread * y, 8) for x, y in noise.tolist()]))
    plain = smoothed(absorb([(x, -y, 8) for x, y in noise.tolist()]))
    assert found.var_trace == pytest.approx(spread**2 * plain.var_trace, rel=0.01)
    assert found.cov == pytest.approx(spread**2 * plain.cov, rel=0.05)


@pytest.fixture
def many_runs_at_once(monkeypatch):
    """The update on arrays, one entry per run: only the guard, which asks about one float, is left out."""
    monkeypatch.setattr("dptrain.noise.smoothing.fits", lambda _: True)


@pytest.mark.usefixtures("many_runs_at_once")
@pytest.mark.parametrize("smoothing", [MEMORIES[0], MEMORIES[2]], ids=str)
def test_the_variance_is_the_scatter_over_runs(smoothing):
    """The mean variance over 4,000 runs is the variance of the means over these runs, to 6 %; the covariance too."""
    x, y = white(np.random.default_rng(5), num_steps=60, num_runs=4000)
    found = smoothed(absorb(zip(x, y, [8] * 60, strict=True), smoothing=smoothing))
    seen = np.cov(found.noise_trace, found.grad_sq_norm)
    assert found.var_trace.mean() == pytest.approx(seen[0, 0], rel=0.06)
    assert found.var_grad.mean() == pytest.approx(seen[1, 1], rel=0.06)
    assert found.cov.mean() == pytest.approx(seen[0, 1], rel=0.06)
    # And the pair itself is unbiased.
    assert found.noise_trace.mean() == pytest.approx(5, abs=4 * math.sqrt(seen[0, 0] / 4000))
    assert found.grad_sq_norm.mean() == pytest.approx(2, abs=4 * math.sqrt(seen[1, 1] / 4000))


@pytest.mark.usefixtures("many_runs_at_once")
def test_the_variance_is_as_well_known_as_it_says():
    """For normal errors the variance scatters by √(2/degrees of freedom), to 6 %."""
    x = np.random.default_rng(6).standard_normal((60, 4000))
    found = smoothed(absorb(zip(x, x, [8] * 60, strict=True)))
    scatter = found.var_trace.std() / found.var_trace.mean()
    assert scatter == pytest.approx(math.sqrt(2 / found.degrees_of_freedom), rel=0.06)


@pytest.mark.usefixtures("many_runs_at_once")
def test_the_variance_is_blind_to_slow_drift():
    """A truth that drifts within the memory by fifty times the error of the mean leaves the variance right to 8 %."""
    rng, steps = np.random.default_rng(7), np.arange(1, 401)
    drift = (2 * steps / 400)[:, None]
    x = drift + 0.05 * rng.standard_normal((400, 2000))
    found = smoothed(absorb(zip(x, x, [8] * 400, strict=True)))
    weights = direct_weights(np.full(400, 8.0), smoothing=MEMORIES[0])
    error = found.noise_trace - weights @ drift[:, 0] / weights.sum()
    assert found.var_trace.mean() == pytest.approx(error.var(), rel=0.08)
    assert np.std(drift[-160:]) > 50 * error.std()


def test_the_memory_is_a_fixed_share_of_the_run():
    """At every stage the mean is worth 0.4 of the steps, its variance 0.16 of them, and it looks back by 0.18."""
    for num_steps in (100, 1000):
        found = smoothed(absorb([(float(t), 1.0, 8) for t in range(num_steps)]))
        assert found.effective_steps == pytest.approx(0.4 * num_steps, rel=0.02)
        assert found.degrees_of_freedom == pytest.approx(0.16 * num_steps, rel=0.03)
        assert found.noise_trace == pytest.approx(0.82 * num_steps, rel=0.02)


@pytest.mark.parametrize(("before", "after"), [(2048, 16), (16, 2048)])
def test_a_start_at_another_batch_is_forgotten(before, after):
    """Of 20 steps at a batch 128 times too large, or too small, at most a fifth is left after another 100."""
    found = smoothed(absorb([(0.0, 1.0, before)] * 20 + [(1.0, 1.0, after)] * 100))
    assert found.noise_trace > 0.8


def test_a_doubled_batch_keeps_its_measurement():
    """The batch doubles on the way: tr(Σ) is per sample, so the mean does not move."""
    steps = [(10.0, 2.0, b) for b in [8] * 20 + [16] * 20 + [32] * 20]
    found = smoothed(absorb(steps))
    assert (found.noise_trace, found.grad_sq_norm) == (pytest.approx(10), pytest.approx(2))


@pytest.mark.parametrize(
    "settings_", [{"memory": 0}, {"memory": math.nan}, {"memory": math.inf}, {"half_life_samples": 0}], ids=str
)
def test_a_memory_that_is_none_is_an_error(settings_):
    """A memory of zero, or one that is not a number, is refused with its value."""
    with pytest.raises(ConfigError, match=next(iter(settings_))):
        Smoothing(**settings_)
