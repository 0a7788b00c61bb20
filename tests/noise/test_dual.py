"""Sign and spectral noise scales from dual norms against Gaussian gradients whose answer is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dptrain.noise import MomentSums, Smoothing, smoothed
from dptrain.noise.dual import DualNorms, dual_moments, dual_noise_scale, sign_factor, spectral_factor

SIZE, REPLICAS = 16, 4
"""Samples in a small batch, and how many of them a step has."""


class Sign:
    """Half of the coordinates are all noise, half have six standard errors of a step's mean."""

    def __init__(self, generator):
        self.sigma = np.exp(generator.normal(size=300) * 0.5)
        self.grad = np.where(np.arange(300) % 2, 0.0, 6 * self.sigma / math.sqrt(SIZE * REPLICAS))
        self.truth = (self.sigma.sum() / self.grad.sum()) ** 2

    def draw(self, generator):
        shape = (REPLICAS, 300)
        return self.grad + self.sigma / math.sqrt(SIZE) * generator.normal(size=shape)

    def norm(self, grad):
        return np.abs(grad).sum()

    factor = sign_factor()


class Spectral:
    """A matrix of four strong directions in equal noise."""

    rows, columns = 12, 40

    def __init__(self, generator):
        left, _ = np.linalg.qr(generator.normal(size=(self.rows, 4)))
        right, _ = np.linalg.qr(generator.normal(size=(self.columns, 4)))
        self.grad = left @ np.diag([60.0, 50.0, 40.0, 30.0]) @ right.T
        self.truth = (self.rows * math.sqrt(self.columns) / 180.0) ** 2
        self.factor = spectral_factor(self.rows, self.columns)

    def draw(self, generator):
        return self.grad + generator.normal(size=(REPLICAS, self.rows, self.columns)) / math.sqrt(SIZE)

    def norm(self, grad):
        return np.linalg.svd(grad, compute_uv=False).sum()


def steps(problem, generator, count):
    """Return the smoothed pair of `count` steps."""
    sums = MomentSums()
    for _ in range(count):
        own = problem.draw(generator)
        mean = own.mean(0)
        norms = DualNorms(
            small=np.mean([problem.norm(g) for g in own]),
            large=problem.norm(mean),
            deviation=np.mean([problem.norm(g - mean) for g in own]) / problem.factor,
            size=SIZE,
            total=SIZE * REPLICAS,
        )
        sums = Smoothing(half_life_samples=1e9).update(sums, dual_moments(norms))
    return smoothed(sums)


@pytest.mark.parametrize("kind", [Sign, Spectral])
def test_the_known_answer_is_found_to_two_percent(kind):
    """400 steps of Gaussian gradients give (‖σ‖/‖G‖)², where the plain norm of the step's gradient is far off."""
    generator = np.random.default_rng(0)
    problem = kind(generator)
    scale = dual_noise_scale(steps(problem, generator, 400))
    assert scale.value == pytest.approx(problem.truth, rel=0.02)
    assert scale.lower < scale.value < scale.upper
    assert scale.noise_trace / scale.grad_sq_norm == pytest.approx(math.sqrt(scale.value))
    assert scale.contrast(scale.value * 0.8) > 3
    assert scale.contrast(scale.value * 1.2) < -3
    assert scale.bounds(2.0) == pytest.approx((scale.lower, scale.upper), rel=0.05)


@pytest.mark.parametrize("kind", [Sign, Spectral])
def test_the_interval_covers_its_mean_as_often_as_it_says(kind):
    """Of 500 intervals from 20 steps each 92 to 98 % hold what 4,000 steps say: chance is all that it covers."""
    generator = np.random.default_rng(1)
    problem = kind(generator)
    long = steps(problem, generator, 4000)
    truth = (long.noise_trace / long.grad_sq_norm) ** 2
    scales = [dual_noise_scale(steps(problem, generator, 20)) for _ in range(500)]
    covered = np.mean([scale.lower <= truth <= scale.upper for scale in scales])
    assert 0.92 <= covered <= 0.98


def test_the_stated_bias_is_the_bias():
    """A coordinate with as much signal as noise in the step comes out 40 % too small, one with twice that 9 %."""
    generator = np.random.default_rng(2)
    for ratio, expected in ((1.0, 0.60), (2.0, 0.91), (6.0, 1.0), (0.0, 0.0)):
        noise = generator.normal(size=(2, 400_000))
        own = ratio / math.sqrt(2) + noise  # in units of a small batch's noise; a step has two of them
        norms = DualNorms(small=np.abs(own).mean(), large=np.abs(own.mean(0)).mean(), deviation=1.0, size=1, total=2)
        found = dual_moments(norms).grad_sq_norm * math.sqrt(2)
        assert found == pytest.approx(ratio * expected if ratio else 0.0, abs=0.03)


@pytest.mark.parametrize(("rows", "columns"), [(8, 8), (6, 24), (24, 6), (4, 100)])
def test_the_spectral_factor_is_that_of_random_matrices(rows, columns):
    """The law for large matrices is within 2 % of simulated small ones, on either side."""
    generator = np.random.default_rng(3)
    values = np.linalg.svd(generator.normal(size=(2000, rows, columns)), compute_uv=False).sum(1).mean()
    small, large = sorted((rows, columns))
    assert spectral_factor(rows, columns) == pytest.approx(values / (small * math.sqrt(large)), rel=0.02)


def test_nothing_to_compare_gives_nothing():
    """One small batch, or a norm that is not finite."""
    for small, total in ((1.0, 4), (math.nan, 8)):
        norms = DualNorms(small=small, large=1.0, deviation=1.0, size=4, total=total)
        assert dual_moments(norms) is None
