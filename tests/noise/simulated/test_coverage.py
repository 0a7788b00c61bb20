"""Proves that the interval holds the truth as often as it says, and the contrast acts on what is known and no more."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.special import ndtr

from dptrain.noise import MomentSums, Resolution, Smoothing, SquaredNorms, noise_scale, smoothed, unbiased_moments
from tests.noise.simulated.many_runs import GROWING, NUM_RUNS, Run, absorb, constant, coverage, readings


@pytest.fixture
def many_runs_at_once(monkeypatch):
    """The update on arrays, one entry per run: only the guard, which asks about one float, is left out."""
    monkeypatch.setattr("dptrain.noise.smoothing.fits", lambda _: True)


DOUBLING = np.repeat([8.0, 16.0, 32.0, 64.0, 128.0], 40)
SHARE = np.arange(1, 401) / 400


REGIMES = {
    "thirty steps": Run(batches=constant(100, 30)),
    "many steps": Run(batches=constant(100, 400)),
    "batch doubles four times": Run(batches=DOUBLING, K=2, d=20),
    "batch doubles, fixed half-life": Run(batches=DOUBLING, K=2, d=20, smoothing=Smoothing(half_life_samples=2000)),
    "batch falls to a sixteenth": Run(batches=np.repeat([128.0, 8.0], [50, 100])),
    "skewed": Run(batches=constant(100, 100), K=2, d=1),
    "batch far too large": Run(batches=constant(5000, 100)),
    "fixed half-life": Run(batches=constant(32, 400), smoothing=Smoothing(half_life_samples=640)),
    "memory of the whole run": Run(batches=constant(32, 200), smoothing=Smoothing(half_life_samples=math.inf)),
    "signal falls as 1/t": Run(batches=constant(32, 400), K=8, d=1000, grad=1 / SHARE),
    "noise grows as √t": Run(batches=constant(32, 400), K=8, d=1000, trace=np.sqrt(SHARE)),
    "both fall": Run(batches=constant(16, 400), K=2, d=50, trace=SHARE**-0.5, grad=1 / SHARE),
}


@pytest.mark.usefixtures("many_runs_at_once")
@pytest.mark.parametrize("regime", REGIMES)
def test_the_interval_holds_the_truth_as_often_as_it_says(regime):
    """Of 2,000 intervals of 95 %, 92 to 98 % hold the true ratio of the means over the memory."""
    run = REGIMES[regime]
    scales = readings(run.measured(np.random.default_rng(12)))
    assert 0.92 < coverage(scales, run.truth()) < 0.98


@pytest.mark.usefixtures("many_runs_at_once")
@pytest.mark.parametrize("num_steps", [2, 3, 5, 10])
def test_after_very_few_steps_the_interval_errs_on_the_wide_side(num_steps):
    """With two to ten steps 95 % or more of the intervals hold the truth: late steps rule both mean and scatter."""
    run = Run(batches=constant(100, num_steps))
    assert coverage(readings(run.measured(np.random.default_rng(13))), run.truth()) > 0.95


@pytest.mark.usefixtures("many_runs_at_once")
@pytest.mark.parametrize(("d", "num_steps"), [(1, 400), (50, 100)])
def test_where_the_signal_is_drowned_the_bound_errs_on_the_low_side(d, num_steps):
    """At B = φ/50 more than 95 % of the open intervals hold the truth: a negative |G|² counts as none."""
    run = Run(batches=constant(2, num_steps), K=2, d=d)
    scales = readings(run.measured(np.random.default_rng(12)))
    assert np.mean([s.state is Resolution.AT_LEAST for s in scales]) > 0.9
    assert coverage(scales, run.truth()) > 0.95


@pytest.mark.usefixtures("many_runs_at_once")
def test_the_worst_case_that_is_known():
    """K = 2, noise in a single direction, batch far above φ: tr(Σ) is χ² with one degree, and 5–12 % miss it.

    A mean of 30 such numbers is still skewed, and most of the misses lie above the interval. Five directions of
    equal noise suffice for what the interval says.
    """
    rng = np.random.default_rng(14)
    one = Run(batches=constant(10_000, 30), K=2, d=1)
    five = Run(batches=constant(10_000, 30), K=2, d=5)
    assert 0.88 < coverage(readings(one.measured(rng)), one.truth()) < 0.92
    assert coverage(readings(five.measured(rng)), five.truth()) > 0.92


@pytest.mark.usefixtures("many_runs_at_once")
@pytest.mark.parametrize("memory", [0.8, 0.99])
def test_a_wandering_truth_is_covered_in_its_mean(memory):
    """tr(Σ) and |G|² that wander as correlated series leave 92–98 % of intervals on their means over the memory."""
    rng = np.random.default_rng(15)
    walk = np.zeros((2, 400, NUM_RUNS))
    for t in range(1, 400):
        walk[:, t] = memory * walk[:, t - 1] + math.sqrt(1 - memory**2) * rng.standard_normal((2, NUM_RUNS))
    run = Run(batches=constant(16, 400), trace=np.exp(0.3 * walk[0]), grad=np.exp(0.3 * walk[1]))
    assert 0.92 < coverage(readings(run.measured(rng)), run.truth()) < 0.98


@pytest.mark.usefixtures("many_runs_at_once")
def test_drift_does_not_blunt_the_interval():
    """While tr(Σ) grows as √t, the interval is as wide as without the growth, to 10 %."""
    drifting, still = (
        Run(batches=constant(32, 400), K=8, d=1000, trace=trace) for trace in (np.sqrt(SHARE), np.ones(400))
    )
    widths = []
    for run in (drifting, still):
        scales = readings(run.measured(np.random.default_rng(16)))
        widths.append(np.median([(s.upper - s.lower) / s.value for s in scales if s.state is Resolution.RESOLVED]))
    assert widths[0] == pytest.approx(widths[1], rel=0.1)


@pytest.mark.usefixtures("many_runs_at_once")
@pytest.mark.parametrize("rho", [0.1, 1, 16])
@pytest.mark.parametrize("num_steps", [5, 20, 100])
def test_the_contrast_errs_as_often_as_a_normal_would(num_steps, rho):
    """Against the truth itself the contrast is above 1, and below −1, in a sixth of runs; beyond ±2 in 4 % at most."""
    run = Run(batches=constant(100 / rho, num_steps), K=2, d=20)
    found = np.array([s.contrast(100) for s in readings(run.measured(np.random.default_rng(17)))])
    assert np.mean(found > 1) == pytest.approx(ndtr(-1), abs=0.045)
    assert np.mean(found < -1) == pytest.approx(ndtr(-1), abs=0.045)
    assert np.mean(found > 2) < 0.04
    assert np.mean(found < -2) < 0.04


def test_real_gradients_through_the_whole_room():
    """Vectors with uneven noise, shards 4/12/32, the real record step by step: 92–98 % of 400 intervals hold φ = 25."""
    rng = np.random.default_rng(18)
    sigma2, G = 200 * np.arange(1, 11) / 55, np.zeros(10)
    G[-1] = math.sqrt(8)
    sizes = np.array([4, 12, 32])
    scales = []
    for _ in range(400):
        g = G + rng.standard_normal((40, 3, 10)) * np.sqrt(sigma2 / sizes[:, None])
        small, large = (g**2).sum(axis=2), ((g * (sizes / 48)[:, None]).sum(axis=1) ** 2).sum(axis=1)
        sums = MomentSums()
        for s, n in zip(small.tolist(), large.tolist(), strict=True):
            sums = GROWING.update(sums, unbiased_moments(SquaredNorms.of(s, sizes=sizes.tolist(), large_sq_norm=n)))
        scales.append(noise_scale(smoothed(sums)))
    assert 0.92 < coverage(scales, 25) < 0.98


def test_the_coin_is_covered():
    """Two replicas that draw 1 or 3, φ = 1/4: 92–98 % of 400 intervals after 200 draws hold it."""
    rng = np.random.default_rng(19)
    scales = []
    for x, y in rng.choice([1.0, 3.0], (400, 2, 200)):
        pairs = zip(((x - y) ** 2 / 2).tolist(), (x * y).tolist(), strict=True)
        scales.append(noise_scale(smoothed(absorb([(s, g, 2) for s, g in pairs]))))
    assert 0.92 < coverage(scales, 0.25) < 0.98


@pytest.mark.usefixtures("many_runs_at_once")
def test_epochs_of_a_small_data_set_err_on_the_wide_side():
    """Passes over 512 samples in random orders: more than 95 % of 400 intervals hold the data set's own φ = 10.

    Over a pass the draws balance out, so that |G|² is better known than independent draws would make it.
    """
    rng = np.random.default_rng(23)
    data = rng.standard_normal((512, 20))
    data = (data - data.mean(axis=0)) * math.sqrt(10 / data.var(axis=0, ddof=1).sum()) + math.sqrt(1 / 20)
    traces, grads = np.empty((2, 160, 400))
    for run in range(400):
        order = np.concatenate([rng.permutation(512) for _ in range(10)])
        g = data[order].reshape(160, 2, 16, 20).mean(axis=2)
        small, large = (g**2).sum(axis=2).mean(axis=1), (g.mean(axis=1) ** 2).sum(axis=1)
        traces[:, run] = (small - large) * 32
        grads[:, run] = large - traces[:, run] / 32 + traces[:, run] / 512
    found = smoothed(absorb(zip(traces, grads, [32] * 160, strict=True)))
    assert found.var_grad.mean() > 2 * found.grad_sq_norm.var()
    assert coverage(readings(found), 10) > 0.95


# What is known early, and what is not said.


@pytest.mark.usefixtures("many_runs_at_once")
@pytest.mark.parametrize(("d", "num_steps"), [(5, 24), (20, 8), (100, 3)])
def test_acts_on_what_is_known(d, num_steps):
    """B = φ/16, two small batches a step: 24, 8 and 3 steps tell half of the runs that φ > 2B, at one standard error.

    The numbers are for noise in 5, 20 and 100 directions. In ten times as many steps the ratio is resolved in fewer
    than half of the runs: a law that waits for it stays stuck.
    """
    run, longer = (Run(batches=constant(100 / 16, n), K=2, d=d) for n in (num_steps, 10 * num_steps))
    scales = readings(run.measured(np.random.default_rng(20)))
    assert np.median([s.contrast(2 * 100 / 16) for s in scales]) > 1
    later = readings(longer.measured(np.random.default_rng(21)))
    assert np.mean([s.state is Resolution.RESOLVED for s in later]) < 0.5


@pytest.mark.usefixtures("many_runs_at_once")
@pytest.mark.parametrize("rho", [0.2, 1, 4])
def test_steps_until_predicts_the_wait(rho):
    """Read after 100 steps, the median forecast of when φ is known to a relative 3 % is right within a factor 1.5."""
    B, d, K = 100 / rho, 20, 4
    early = readings(Run(batches=constant(B, 100), d=d, K=K).measured(np.random.default_rng(22)))
    forecast = 100 + np.median([s.steps_until(0.03) or np.inf for s in early])
    # The standard error of theory (F5) at the effective 0.4 of the steps.
    wait = (2 / (K - 1) + 2 * rho**2 * K / (K - 1) + 4 * rho + 4 * rho / (K - 1)) / (d * 0.03**2) / 0.4
    assert wait / 1.5 < forecast < wait * 1.5
