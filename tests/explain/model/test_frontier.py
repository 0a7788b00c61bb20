"""The frontier fit: recovers known hyperbolas with honest intervals, and refuses to fit what is none."""

from __future__ import annotations

import math

import numpy as np
import pytest

from benchmarks.frontier.curves import NOISE_COURSES, DampedQuadratic
from dptrain.errors import ConfigError
from dptrain.explain.model.frontier import LARGEST_MISFIT, Estimate, Point, Verdict, fit_frontier

BATCHES = [2.0**k for k in range(2, 13)]
LISTED = {1: 462268, 16: 29111, 256: 2105, 1024: 984.5, 4096: 777, 2**20: 672}
"""Steps of the noisy quadratic with 1,000 directions, as in the list of known answers."""


def points(steps_of, batches=BATCHES):
    return [Point(global_batch_size=batch, steps=steps_of(batch)) for batch in batches]


def scattered(rng, *, own, shared=0.0, num_seeds=3, batches=BATCHES, min_steps=500.0, min_samples=50_000.0):
    """Draw a sweep round a known hyperbola: what each run has for itself, and what a seed has at all batches."""
    starts = shared * rng.standard_normal(num_seeds)
    return [
        Point(
            global_batch_size=batch,
            steps=(min_steps + min_samples / batch) * math.exp(starts[seed] + own * rng.standard_normal()),
            seed=seed,
        )
        for batch in batches
        for seed in range(num_seeds)
    ]


def test_exact_points_are_recovered_exactly():
    """Whatever the units, three points of a hyperbola or a hundred."""
    for min_steps, min_samples in ((10.0, 3e7), (1e6, 1e7), (123.0, 45_678.0)):
        crit = min_samples / min_steps
        for num in (3, 30):
            batches = np.geomspace(crit / 30, crit * 30, num)
            found = fit_frontier(points(lambda b, s=min_steps, e=min_samples: s + e / b, batches))
            assert found.verdict is Verdict.HYPERBOLA
            assert found.min_steps.value == pytest.approx(min_steps, rel=1e-4)
            assert found.min_samples.value == pytest.approx(min_samples, rel=1e-4)
            assert found.critical_batch_size.value == pytest.approx(crit, rel=1e-4)
            assert found.misfit.rms < 1e-4
            assert found.misfit.p_value is None


def test_the_damped_quadratic_is_fitted():
    """Problem 5 at a = 0.002: S_min and B_crit within 0.5 % of their closed forms."""
    problem = DampedQuadratic(damping=0.002)
    found = fit_frontier(points(lambda batch: problem.run(lambda _: batch).num_steps))
    assert found.verdict is Verdict.HYPERBOLA
    assert found.min_steps.value == pytest.approx(problem.min_steps, rel=5e-3)
    assert found.critical_batch_size.value == pytest.approx(problem.critical_batch_size, rel=5e-3)


@pytest.mark.parametrize("name", NOISE_COURSES)
def test_a_growing_noise_scale_has_its_mean_as_critical_batch(name):
    """Problem 6: the frontier of fixed batches is the hyperbola of the mean over the way."""
    course = NOISE_COURSES[name]
    batches = np.geomspace(0.02, 20, 7)
    found = fit_frontier(points(lambda batch: course.run(lambda _: batch, min_steps=100).num_steps, batches))
    assert found.verdict is Verdict.HYPERBOLA
    assert found.min_steps.value == pytest.approx(100, rel=1e-3)
    assert found.critical_batch_size.value == pytest.approx(course.mean, rel=1e-3)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(("first", "last"), [(0, 14), (0, 7), (4, 11), (5, 10)])
def test_the_greedy_quadratic_is_not_a_hyperbola(first, last, whole):
    """Problem 4, at any range of batches, with a last step that counts in part or whole: it has no S_min."""
    problem = DampedQuadratic(damping=1.0)
    rounded = math.ceil if whole else float
    found = fit_frontier(
        points(lambda batch: rounded(problem.run(lambda _: batch).num_steps), [2.0**k for k in range(first, last + 1)])
    )
    assert not found.is_fitted
    assert str(found).startswith("not a hyperbola")
    assert "misfit" in str(found)
    if found.verdict is Verdict.NOT:
        assert found.min_steps is found.min_samples is found.critical_batch_size is None
    else:
        assert found.critical_batch_size.value is None
        assert found.critical_batch_size.lower > 1000
        assert found.min_samples.value == pytest.approx(495, rel=0.01)


def test_a_sparse_sweep_is_held_to_whole_steps():
    """Problem 4 at every fourth power of two misses a hyperbola by no more than problem 10; but not with steps ≥ 1."""
    problem = DampedQuadratic(damping=1.0)
    found = fit_frontier(points(lambda b: problem.run(lambda _: b).num_steps, [4.0**k for k in range(6)]))
    assert found.verdict is Verdict.NOT
    assert "less than one" in found.reason
    assert abs(math.expm1(found.misfit.largest)) < LARGEST_MISFIT


def test_the_noisy_quadratic_is_fitted_with_its_misfit():
    """Problem 10: S_min and B_crit are near what its ends say, and the text shows by how much its middle is missed."""
    found = fit_frontier([Point(global_batch_size=batch, steps=steps) for batch, steps in LISTED.items()])
    assert found.verdict is Verdict.ROUGHLY
    assert found.min_steps.value == pytest.approx(672, rel=0.06)
    assert found.critical_batch_size.value == pytest.approx(462268 / 672, rel=0.06)
    assert found.misfit.rms == pytest.approx(0.067, abs=0.002)
    assert found.misfit.batch_size == 256
    assert "6.7% rms" in str(found)
    assert "10.1% fewer steps than fitted" in str(found)


def test_the_fit_does_not_depend_on_units_or_order():
    """Steps and samples in thousands: B_crit is the same; points in any order: everything is."""
    sweep = scattered(np.random.default_rng(0), own=0.05)
    found = fit_frontier(sweep)
    assert fit_frontier(list(reversed(sweep))).min_steps.value == pytest.approx(found.min_steps.value)
    scaled = [Point(global_batch_size=p.global_batch_size, steps=p.steps / 100, seed=p.seed) for p in sweep]
    scaled = fit_frontier(scaled)
    assert scaled.critical_batch_size.value == pytest.approx(found.critical_batch_size.value, rel=1e-6)
    assert scaled.critical_batch_size.upper == pytest.approx(found.critical_batch_size.upper, rel=1e-6)
    assert scaled.min_samples.value == pytest.approx(found.min_samples.value / 100, rel=1e-6)


@pytest.mark.parametrize(("num_seeds", "shared"), [(2, 0.0), (3, 0.1), (5, 0.0)])
def test_intervals_hold_the_truth(num_seeds, shared):
    """Of 60 sweeps with 95 % intervals at least 50 hold each of the three, whether or not seeds share a start."""
    rng = np.random.default_rng(num_seeds)
    covered = np.zeros(3)
    for _ in range(60):
        found = fit_frontier(scattered(rng, own=0.05, shared=shared, num_seeds=num_seeds), num_redraws=400)
        estimates = found.min_steps, found.min_samples, found.critical_batch_size
        covered += [e.lower <= truth <= e.upper for e, truth in zip(estimates, (500, 50_000, 100), strict=True)]
    assert (covered >= 50).all(), covered


def test_a_shared_start_does_not_blur_the_critical_batch():
    """Seeds that are all faster or all slower leave B_crit alone, and widen S_min."""
    rngs = [np.random.default_rng(1) for _ in range(2)]
    alone, shared = (fit_frontier(scattered(rng, own=0.02, shared=s)) for rng, s in zip(rngs, (0, 0.2), strict=True))

    def width(estimate):
        return math.log(estimate.upper / estimate.lower)

    assert width(shared.critical_batch_size) == pytest.approx(width(alone.critical_batch_size), rel=0.05)
    assert width(shared.min_steps) > 3 * width(alone.min_steps)


def test_more_seeds_narrow_the_interval():
    """By more than the root of their number: few seeds do not know their own scatter either."""
    rng = np.random.default_rng(2)

    def width(num_seeds):
        sweeps = [scattered(rng, own=0.05, shared=0.05, num_seeds=num_seeds) for _ in range(10)]
        fits = [fit_frontier(sweep, num_redraws=400).min_steps for sweep in sweeps]
        return np.mean([math.log(found.upper / found.lower) for found in fits])

    assert width(2) > 1.5 * 3 * width(18)


def test_seeds_of_their_own_at_each_batch_will_do():
    """Where no seed is seen twice, all scatter counts as each run's own."""
    sweep = scattered(np.random.default_rng(3), own=0.05)
    alone = [Point(global_batch_size=p.global_batch_size, steps=p.steps, seed=number) for number, p in enumerate(sweep)]
    found = fit_frontier(alone)
    assert found.verdict is Verdict.HYPERBOLA
    assert found.critical_batch_size.lower < 100 < found.critical_batch_size.upper
    assert found.misfit.p_value > 0.01


def test_a_batch_without_its_third_seed_will_do():
    """It weighs less, and the sweep is fitted."""
    sweep = scattered(np.random.default_rng(4), own=0.05)
    found = fit_frontier(sweep[:-1])
    assert found.num_runs == len(sweep) - 1
    assert found.min_steps.lower < 500 < found.min_steps.upper


@pytest.mark.parametrize(("batches", "low", "high"), [([1, 2, 4, 8], 8, math.inf), ([4096, 8192, 16384], 0, 4096)])
def test_batches_on_one_side_bound_the_critical_batch(batches, low, high):
    """Far below B_crit = 100 it is at least so much, far above it at most so much; and the text says which."""
    found = fit_frontier(scattered(np.random.default_rng(5), own=0.05, batches=batches))
    assert found.verdict is Verdict.NO_BEND
    critical = found.critical_batch_size
    assert critical.value is None
    assert low <= critical.lower <= 100 <= critical.upper <= high
    assert ("at least" if low else "at most") in str(critical)


def test_misfit_beyond_the_seeds_is_reported():
    """A curve that is sharper than a hyperbola is told from one by seeds that scatter less than it misses."""
    rng = np.random.default_rng(6)

    def sharper(batch, exponent):
        return 500 * (1 + (100 / batch) ** exponent) ** (1 / exponent) * math.exp(0.01 * rng.standard_normal())

    verdicts = [
        fit_frontier(
            [Point(global_batch_size=b, steps=sharper(b, exponent), seed=s) for b in BATCHES for s in range(3)]
        ).verdict
        for exponent in (1.0, 1.25, 2.5)
    ]
    assert verdicts == [Verdict.HYPERBOLA, Verdict.ROUGHLY, Verdict.NOT]


def test_the_same_points_give_the_same_interval():
    """The redraws are seeded."""
    sweep = scattered(np.random.default_rng(7), own=0.1)
    assert fit_frontier(sweep) == fit_frontier(sweep)
    assert fit_frontier(sweep) != fit_frontier(sweep, random_seed=1)


@pytest.mark.parametrize(
    ("sweep", "said"),
    [
        ([], "got none"),
        ([Point(global_batch_size=b, steps=10, seed=s) for b in (8, 16) for s in range(9)], "got 8, 16"),
        ([Point(global_batch_size=b, steps=0) for b in (1, 2, 3)], "positive"),
        ([Point(global_batch_size=b, steps=math.inf) for b in (1, 2, 3)], "positive"),
    ],
)
def test_what_cannot_be_fitted_is_refused(sweep, said):
    """Two batches are no frontier, and no steps are no run."""
    with pytest.raises(ConfigError, match=said):
        fit_frontier(sweep)


@pytest.mark.parametrize(
    ("estimate", "text"),
    [
        (Estimate(value=6.789, lower=6.0, upper=7.2, level=0.95), "6.79 [6, 7.2]"),
        (Estimate(value=67_890.0, lower=67_890.0, upper=67_890.0, level=None), "67,900"),
        (Estimate(value=None, lower=600.0, upper=math.inf, level=0.95), "at least 600"),
        (Estimate(value=None, lower=0.0, upper=1234.0, level=None), "at most 1,230"),
        (Estimate(value=None, lower=0.0, upper=math.inf, level=0.95), "not identified"),
    ],
)
def test_an_estimate_says_what_is_known(estimate, text):
    """A value with its interval, or the bound alone."""
    assert str(estimate) == text
