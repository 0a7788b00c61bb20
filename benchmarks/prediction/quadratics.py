"""Noisy quadratics: exact gradients with Gaussian noise of covariance Σ/B, many runs side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.prediction.problem import DIVERGED, Array, Problem
from dptrain.noise import SquaredNorms


@dataclass(frozen=True, kw_only=True, eq=False)
class Quadratic(Problem):
    """The loss Σ h_i θ_i² / dimension, in which all directions have the same share at the start: θ_i = 1/√h_i.

    The gradient in a batch of B samples is h_i θ_i + √(c_i/B)·z, without the factor 2/dimension.

    Attributes:
        curvature: h, shape (dimension,), largest 1.
        covariance: c, the variance of one sample's gradient in each direction, shape (dimension,).
    """

    kind: str = "quadratic"
    optimizer: str = "SGD"
    first_rate: float = 1.0
    max_steps: int = 10_000
    num_seeds: int = 6
    num_measured: int = 12
    curvature: Array
    covariance: Array

    def learner(self, *, batch_size: int, rate: float, seed: int, num_parts: int | None = None) -> QuadraticLearner:
        """Return a fresh run."""
        return QuadraticLearner(self, batch_size=batch_size, rate=rate, seed=seed, num_parts=num_parts or 1)

    def crossings(self, *, batch_size: int, rates: Sequence[float], limits: Sequence[int]) -> Array:
        """Return the steps to each target, from all runs at once; the loss is looked at in each step."""
        targets = np.array(self.targets)
        num_variants = len(rates) * self.num_seeds
        reached = np.full((num_variants, len(targets)), np.inf)
        generator = np.random.default_rng(batch_size)
        spread = np.sqrt(self.covariance / batch_size)
        # Of the variants that still run: their number, their rate, θ, and the last loss.
        variants, rate = np.arange(num_variants), np.repeat(rates, self.num_seeds)[:, None]
        theta = np.tile(self.curvature**-0.5, (num_variants, 1))
        last = np.ones(num_variants)
        for step in range(limits[-1]):
            theta -= rate * (self.curvature * theta + spread * generator.standard_normal(theta.shape))
            loss = (self.curvature * theta**2).mean(1)
            for row, column in np.argwhere((loss[:, None] <= targets) & np.isinf(reached[variants])):
                share = np.log(last[row] / targets[column]) / np.log(last[row] / loss[row])
                reached[variants[row], column] = step + share
            running = np.isinf(reached[variants, -1]) & (loss <= DIVERGED)
            variants, rate, theta, last = variants[running], rate[running], theta[running], loss[running]
            if not len(variants):
                break
        return reached.reshape(len(rates), self.num_seeds, len(targets))


class QuadraticLearner:
    """One run of a quadratic, its batch drawn in parts."""

    def __init__(self, problem: Quadratic, *, batch_size: int, rate: float, seed: int, num_parts: int) -> None:
        self._curvature = problem.curvature
        self._part_size = batch_size / num_parts
        self._spread = np.sqrt(problem.covariance / self._part_size)
        self._rate = rate
        self._num_parts = num_parts
        self._theta = problem.curvature**-0.5
        self._generator = np.random.default_rng(seed)

    def step(self) -> SquaredNorms:
        """Take a step along the mean of the parts' gradients."""
        noise = self._generator.standard_normal((self._num_parts, len(self._theta)))
        parts = self._curvature * self._theta + self._spread * noise
        gradient = parts.mean(0)
        self._theta = self._theta - self._rate * gradient
        return SquaredNorms.of(
            (parts**2).sum(1).tolist(),
            sizes=[self._part_size] * self._num_parts,
            large_sq_norm=float(gradient @ gradient),
        )

    def loss(self) -> float:
        """Return the loss without noise; 1 at the start, 0 at its minimum."""
        return float((self._curvature * self._theta**2).mean())
