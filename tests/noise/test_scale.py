"""Proves that the interval holds the truth as often as it says, and the contrast acts on what is known and no more."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from scipy.special import ndtr

from dptrain.errors import ConfigError
from dptrain.noise import (
    Moments,
    MomentSums,
    NoiseScale,
    Resolution,
    SmoothedMoments,
    Smoothing,
    SquaredNorms,
    noise_scale,
    smoothed,
    unbiased_moments,
)

GROWING = Smoothing()
NUM_RUNS = 2000


def absorb(steps, *, smoothing=GROWING):
    sums = MomentSums()
    for trace, grad, num_samples in steps:
        sums = smoothing.update(sums, Moments(noise_trace=trace, grad_sq_norm=grad, num_samples=float(num_samples)))
    return sums


def pair(**changes):
    """A smoothed pair well resolved at φ = 50, with what a test changes in it."""
    fields = {
        "noise_trace": 100.0,
        "grad_sq_norm": 2.0,
        "var_trace": 25.0,
        "var_grad": 0.09,
        "cov": -0.4,
        "effective_steps": 40.0,
        "degrees_of_freedom": 20.0,
        "num_steps": 100,
        "num_samples": 800.0,
    }
    return SmoothedMoments(**{**fields, **changes})


# Simulated runs. Each has tr(Σ) = 100·trace_t and |G|² = grad_t, so that φ = 100 at the start.


def by_step(value):
    """Return a number, or one per step, so that it broadcasts against (num_steps, num_runs)."""
    value = np.asarray(value, float)
    return value[:, None] if value.ndim == 1 else value


@dataclass(frozen=True, kw_only=True)
class Run:
    """A way to train: K small batches a step, d equal eigenvalues of Σ, and how truth and batch move on the way."""

    batches: np.ndarray
    K: int = 4
    d: int = 30
    trace: np.ndarray | float = 1.0
    grad: np.ndarray | float = 1.0
    smoothing: Smoothing = GROWING

    def measured(self, rng, *, num_runs=NUM_RUNS):
        """Draw every step of many runs and smooth them: the fields are arrays over runs.

        The estimates of a step come from the exact laws of their squared norms, ‖g_k − g‖² and ‖g‖², for normal
        gradients.
        """
        shape = (len(self.batches), num_runs)
        B, S, G = (by_step(v) for v in (self.batches, 100 * self.trace, self.grad))
        traces = S / self.d * rng.chisquare(self.d * (self.K - 1), shape) / (self.K - 1)
        large = S / self.d / B * rng.noncentral_chisquare(self.d, G * B * self.d / S, shape)
        grads = large - traces / B
        return smoothed(absorb(zip(traces, grads, self.batches, strict=True), smoothing=self.smoothing))

    def truth(self):
        """The ratio of the means of the true pair over the memory."""
        zero = np.zeros((len(self.batches), 1))
        S, G = (by_step(v) + zero for v in (100 * self.trace, self.grad))
        found = absorb(zip(S, G, self.batches, strict=True), smoothing=self.smoothing)
        return found.trace / found.grad


def readings(measured, *, level=0.95):
    """One noise scale per run."""
    shared = {
        name: getattr(measured, name) for name in ("effective_steps", "degrees_of_freedom", "num_steps", "num_samples")
    }
    columns = (measured.noise_trace, measured.grad_sq_norm, measured.var_trace, measured.var_grad, measured.cov)
    return [
        noise_scale(
            SmoothedMoments(noise_trace=s, grad_sq_norm=g, var_trace=vs, var_grad=vg, cov=c, **shared), level=level
        )
        for s, g, vs, vg, c in zip(*(column.tolist() for column in columns), strict=True)
    ]


def coverage(scales, truth):
    """Return the share of intervals that hold the truth, one truth for all or one each."""
    truths = np.broadcast_to(truth, len(scales))
    return np.mean([s.lower <= t <= s.upper for s, t in zip(scales, truths, strict=True)])


@pytest.fixture
def many_runs_at_once(monkeypatch):
    """The update on arrays, one entry per run: only the guard, which asks about one float, is left out."""
    monkeypatch.setattr("dptrain.noise.smoothing.fits", lambda _: True)


def constant(batch, num_steps):
    return np.full(num_steps, float(batch))


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


def test_states():
    """Both known: resolved. |G|² drowned: at least. Both drowned, or nothing seen: not resolved yet."""
    resolved, bounded, unknown = (
        noise_scale(pair(**changes)) for changes in ({}, {"var_grad": 4.0}, {"var_grad": 4.0, "var_trace": 1e4})
    )
    assert resolved.state is Resolution.RESOLVED
    assert resolved.value == 50
    assert 0 < resolved.lower < 50 < resolved.upper < math.inf
    assert (bounded.state, bounded.value, bounded.upper) == (Resolution.AT_LEAST, None, math.inf)
    assert 0 < bounded.lower < 50
    for nothing in (unknown, noise_scale(None), noise_scale(smoothed(absorb([(9.0, 1.0, 8)])))):
        assert nothing.state is Resolution.NOT_RESOLVED
        assert (nothing.value, nothing.lower, nothing.upper) == (None, 0, math.inf)
    assert noise_scale(None).contrast(10) == 0


def test_a_negative_signal_opens_the_interval():
    """A smoothed |G|² below zero is bad luck: the lower bound is the one of |G|² = 0, and no number is negative."""
    negative, zero = (noise_scale(pair(grad_sq_norm=g, cov=0.0)) for g in (-0.4, 0.0))
    assert negative.state is Resolution.AT_LEAST
    assert negative.lower == zero.lower > 0
    assert noise_scale(pair(noise_trace=-1.0)).value == 0


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({}, "50 [36.3, 75.5]"),
        ({"var_grad": 4.0}, "at least 16"),
        ({"noise_trace": 1.2e6, "var_trace": 25e8}, "600k [450k, 880k]"),
        ({"var_trace": math.inf}, "not resolved yet"),
    ],
)
def test_how_it_prints(changes, text):
    """Two to three digits, the interval and its level; a bound as a bound; ignorance in words."""
    assert str(noise_scale(pair(**changes))) == text


def test_a_ratio_is_printed_when_it_is_no_stroke_of_luck():
    """|G|² of 1.5 half-widths of its interval is distinguishable from zero, but gives only a bound; 2 gives a value."""
    lucky, known = (noise_scale(pair(var_grad=(2 / 2.086 / widths) ** 2)) for widths in (1.5, 2.1))
    assert (lucky.state, lucky.value, lucky.upper) == (Resolution.AT_LEAST, None, math.inf)
    assert known.state is Resolution.RESOLVED


@pytest.mark.parametrize("level", [0, 1, 95, math.nan])
def test_a_level_outside_0_to_1_is_an_error(level):
    """The text quotes the level and shows a right one."""
    with pytest.raises(ConfigError, match=f"0.95, got {level}"):
        noise_scale(None, level=level)


def test_a_relative_error_of_zero_is_an_error():
    """No number of steps is enough; an accuracy that is reached already needs none."""
    scale = noise_scale(pair())
    with pytest.raises(ConfigError, match="positive"):
        scale.steps_until(0)
    assert scale.steps_until(10) == 0
    assert scale.steps_until(0.01) > scale.steps_until(0.1) > 0
    assert noise_scale(None).steps_until(0.1) is None


# Properties of any pair.

SIGNED = st.floats(-1e6, 1e6).filter(lambda v: v == 0 or abs(v) > 1e-9)
POSITIVE = st.floats(1e-3, 1e6)


def pairs(values):
    return st.builds(
        lambda s, g, sd_s, sd_g, corr, df: pair(
            noise_trace=s,
            grad_sq_norm=g,
            var_trace=sd_s**2,
            var_grad=sd_g**2,
            cov=corr * sd_s * sd_g,
            degrees_of_freedom=df,
        ),
        values,
        values,
        POSITIVE,
        POSITIVE,
        st.floats(-0.99, 0.99),
        st.floats(1, 1e4),
    )


PAIRS = pairs(SIGNED)


@given(moments=pairs(POSITIVE), z=st.floats(0.1, 5), phi=st.floats(0, 1e9))
@settings(deadline=None, derandomize=True, max_examples=400)
def test_the_bounds_are_where_the_contrast_reaches_z(moments, z, phi):
    """Where both estimates are positive, a noise scale is within the bounds at z if its contrast is within ±z.

    And only then, but for one case: two estimates so strongly and positively correlated that the set has a hole.
    """
    scale = noise_scale(moments)
    lower, upper = scale.bounds(z)
    contrast = abs(scale.contrast(phi))
    if contrast < z * (1 - 1e-6):
        assert lower <= phi * (1 + 1e-9)
        assert phi <= upper * (1 + 1e-9)
    elif contrast > z * (1 + 1e-6) and (moments.cov <= 0 or upper < math.inf):
        assert not lower * (1 + 1e-9) < phi < upper * (1 - 1e-9)


@given(moments=PAIRS, z=st.floats(0, 10), wider=st.floats(0, 10))
@settings(deadline=None, derandomize=True)
def test_more_caution_never_narrows(moments, z, wider):
    """The bounds at a larger z hold those at a smaller."""
    scale = noise_scale(moments)
    (lower, upper), (lower_wide, upper_wide) = scale.bounds(z), scale.bounds(z + wider)
    assert lower_wide <= lower * (1 + 1e-9)
    assert upper_wide >= upper * (1 - 1e-9)


@given(moments=PAIRS, level=st.floats(0.01, 0.999))
@settings(deadline=None, derandomize=True)
def test_the_value_lies_within_its_interval(moments, level):
    """0 ≤ lower ≤ value ≤ upper, a value exactly where resolved, and the interval is `bounds` at the same level."""
    scale = noise_scale(moments, level=level)
    assert 0 <= scale.lower <= scale.upper
    assert (scale.value is None) == (scale.state is not Resolution.RESOLVED) == math.isinf(scale.upper)
    if scale.value is not None:
        assert scale.lower <= scale.value <= scale.upper


def test_the_interval_is_the_bounds_of_its_level():
    """95 % are 1.96 standard errors of a normal."""
    scale = noise_scale(pair())
    assert scale.bounds(1.959964) == pytest.approx((scale.lower, scale.upper), rel=1e-6)


@given(moments=PAIRS, phi=st.floats(0, 1e9))
@settings(deadline=None, derandomize=True)
def test_the_sign_of_the_contrast_is_the_sign_of_the_difference(moments, phi):
    """Above phi: positive. Below: negative."""
    difference = moments.noise_trace - phi * moments.grad_sq_norm
    assume(abs(difference) > 1e-9 * (abs(moments.noise_trace) + phi * abs(moments.grad_sq_norm)))
    assert math.copysign(1, noise_scale(moments).contrast(phi)) == math.copysign(1, difference)


@given(moments=PAIRS, exponent=st.integers(-40, 40), phi=st.floats(0, 1e6), z=st.floats(0.1, 5))
@settings(deadline=None, derandomize=True)
def test_scaled_gradients_change_nothing(moments, exponent, phi, z):
    """Gradients times 2^e: the same value, interval, state and contrast, to the last bit."""
    c = 4.0**exponent
    scaled = pair(
        noise_trace=c * moments.noise_trace,
        grad_sq_norm=c * moments.grad_sq_norm,
        var_trace=c * c * moments.var_trace,
        var_grad=c * c * moments.var_grad,
        cov=c * c * moments.cov,
        degrees_of_freedom=moments.degrees_of_freedom,
    )
    one, other = noise_scale(moments), noise_scale(scaled)
    assert (one.state, one.value, one.lower, one.upper) == (other.state, other.value, other.lower, other.upper)
    assert one.contrast(phi) == other.contrast(phi)
    assert one.bounds(z) == other.bounds(z)


NUMBERS = st.floats(allow_nan=True, allow_infinity=True, allow_subnormal=True)


@given(
    steps=st.lists(st.tuples(NUMBERS, NUMBERS, st.floats(1, 1e9)), max_size=6), phi=NUMBERS, z=NUMBERS, level=NUMBERS
)
@settings(deadline=None, derandomize=True, max_examples=300)
@example(steps=[(0.0, 1.0, 1.0), (1.0, 0.0, 1.0), (0.0, 0.0, 1.0)], phi=0.0, z=0.0, level=0.95)
def test_no_measurement_breaks_the_reading(steps, phi, z, level):
    """Whatever was measured and asked, nothing raises, no end is NaN, and the ends do not cross."""
    scale = noise_scale(smoothed(absorb(steps)), level=level if 0 < level < 1 else 0.95)
    assert isinstance(scale, NoiseScale)
    for lower, upper in ((scale.lower, scale.upper), scale.bounds(z)):
        assert 0 <= lower <= upper
    assert not math.isnan(scale.contrast(phi))
    assert scale.steps_until(0.1) is None or scale.steps_until(0.1) >= 0
    assert str(scale)


def test_known_exactly():
    """Without any scatter the interval is the value, and the contrast is certain on both sides."""
    scale = noise_scale(smoothed(absorb([(100.0, 2.0, 8)] * 4)))
    assert (scale.lower, scale.value, scale.upper) == (50, 50, 50)
    assert (scale.contrast(49), scale.contrast(50), scale.contrast(51)) == (math.inf, 0, -math.inf)


def test_proportional_estimates_feign_no_certainty():
    """Where tr(Σ) and |G|² scatter in proportion, a contrast whose variance rounds to none or below stays finite."""
    for sd in np.linspace(0.1, 1, 200):
        scale = noise_scale(pair(var_trace=(3 * sd) ** 2, var_grad=sd**2, cov=3 * sd * sd))
        assert 0 < scale.contrast(3) < math.inf


def test_the_contrast_against_a_huge_noise_scale_is_the_test_of_the_signal():
    """As phi grows the contrast tends to −|G|² over its standard error; nothing overflows on the way."""
    scale = noise_scale(pair(degrees_of_freedom=1e9))
    assert scale.contrast(1e300) == pytest.approx(-2 / 0.3, rel=1e-3)
    assert scale.contrast(1e300) == pytest.approx(scale.contrast(1e9), rel=1e-6)
