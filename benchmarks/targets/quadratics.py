"""Quadratic problems whose best adaptive run is known, driven by the real controllers; no process is started here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from benchmarks.frontier.curves import DampedQuadratic, noisy_quadratic_steps
from dptrain.batch import BatchPlan
from dptrain.control import (
    RULES,
    BatchSizeGrid,
    Controller,
    CriticalRatio,
    Measurement,
    OnGrid,
    StepTimeModel,
    StepTimes,
)
from dptrain.control.goodput import GoodputLaw
from dptrain.control.learning_rate import RuleName
from dptrain.control.noise_law import NoiseLaw
from dptrain.control.schedule import Constant
from dptrain.noise import (
    MomentSums,
    NoiseScale,
    Resolution,
    Smoothing,
    SquaredNorms,
    noise_scale,
    smoothed,
    unbiased_moments,
)

DAMPED = DampedQuadratic(damping=0.002)
"""Problem 5."""
EXCHANGE_RATES = (30.0, 107.0, 300.0)
"""Samples that a step fewer is worth; in the middle B_crit, where a batch of B_crit costs twice the least of both."""
FIXED_BATCHES = tuple(2**k for k in range(2, 13))
_WORLD_SIZE = 2
_NOISY_TARGET = 0.01
_LARGEST_BATCH = 1 << 20
_TIMED_STEPS = 10
_LARGEST_TIMED = 1 << 14
"""Up to which all batches count as timed: the line that the times were made of holds for each."""
_MOST_NOISY_STEPS = 5_000
_HALVINGS = 10


@dataclass(frozen=True, kw_only=True)
class Spent:
    """What a run took to the target.

    Attributes:
        steps: optimizer steps; the last one counts in part.
        samples: the same in samples.
    """

    steps: float
    samples: float

    def product(self, problem: DampedQuadratic) -> float:
        """Return (S/S_min − 1)(E/E_min − 1)."""
        # The samples that batches of next to nothing take: at a finite a not quite B_crit·S_min.
        rate = problem.damping * (2 - problem.damping)
        min_samples = problem.noise * (1 / problem.target - 1 / problem.start) / rate
        return (self.steps / problem.min_steps - 1) * (self.samples / min_samples - 1)


class Problem(Protocol):
    """A problem under way."""

    @property
    def left(self) -> float:
        """What is left of the loss, over the target: the run ends at 1."""
        ...

    @property
    def noise_scale(self) -> NoiseScale:
        """What is known of the noise scale."""
        ...

    def step(self, batch: int) -> None:
        """Take an optimizer step."""
        ...


def drive(
    problem: Problem,
    controller: Controller,
    *,
    start: int,
    step_time: StepTimeModel | None = None,
    most_steps: float = math.inf,
) -> Spent | None:
    """Let a controller choose the batch before each step of a run to the target.

    Args:
        problem: at its beginning.
        controller: the real one, limits and all.
        start: the batch in force at the first decision.
        step_time: what is known of it, for a law that asks.
        most_steps: after which the run is given up, with None.
    """
    state, batch, steps, samples = controller.init(), start, 0, 0
    left = before = problem.left
    while left > 1:
        measurement = Measurement(
            samples_seen=samples, global_batch_size=batch, noise_scale=problem.noise_scale, step_time=step_time
        )
        state, decision = controller.update(state, measurement)
        batch = round(decision.global_batch_size)
        problem.step(batch)
        before, left = left, problem.left
        steps, samples = steps + 1, samples + batch
        if steps >= most_steps or not math.isfinite(left):
            return None
    beyond = 1 - math.log(before) / math.log(before / left)
    return Spent(steps=steps - beyond, samples=samples - beyond * batch)


class Damped:
    """Problem 5 in the mean, its noise scale given exactly."""

    def __init__(self, problem: DampedQuadratic = DAMPED) -> None:
        self._problem = problem
        self._u = problem.start
        self.noise_scale = known(problem.noise / problem.start)

    @property
    def left(self) -> float:
        """Distance over its target."""
        return self._u / self._problem.target

    def step(self, batch: int) -> None:
        """Shrink u by the mean of an SGD step at the damped rate."""
        rate = self._problem.damping * RULES["noise"](self.noise_scale, batch=batch, reference_batch=batch)
        noise = rate * rate * self._problem.noise / batch
        self._u = self._u * (1 - rate) ** 2 + noise
        self.noise_scale = known(self._problem.noise / self._u)


class SampledDamped:
    """Problem 5 with drawn gradients, the noise scale measured from the norms of two small batches a step.

    The learning rate stays that of the problem, damped by the true noise scale: at a rate so far below the best one
    any error that makes it larger looks like progress.

    Args:
        problem: its figures.
        dimension: of the parameters; curvature and noise are the same in all directions.
        seed: of the gradients.
        rate_is_measured: damp by the measured noise scale after all.
    """

    def __init__(
        self,
        problem: DampedQuadratic = DAMPED,
        *,
        dimension: int = 1000,
        seed: int = 0,
        rate_is_measured: bool = False,
    ) -> None:
        self._problem = problem
        self._random = np.random.default_rng(seed)
        self._theta = np.full(dimension, math.sqrt(problem.start / dimension))
        self._sums, self._smoothing = MomentSums(), Smoothing()
        self._rate_is_measured = rate_is_measured

    @property
    def left(self) -> float:
        """Distance, |θ|², over its target."""
        return float(self._theta @ self._theta) / self._problem.target

    @property
    def noise_scale(self) -> NoiseScale:
        """As a run measures it."""
        return noise_scale(smoothed(self._sums))

    def step(self, batch: int) -> None:
        """Draw the mean gradients of two replicas, learn from their norms, and take an SGD step."""
        share, dimension = batch / _WORLD_SIZE, len(self._theta)
        spread = math.sqrt(self._problem.noise / dimension / share)
        small = self._theta + spread * self._random.standard_normal((_WORLD_SIZE, dimension))
        gradient = small.mean(0)
        moments = unbiased_moments(
            SquaredNorms.of(
                [float(own @ own) for own in small],
                sizes=[share] * _WORLD_SIZE,
                large_sq_norm=float(gradient @ gradient),
            )
        )
        assert moments is not None
        self._sums = self._smoothing.update(self._sums, moments)
        true = known(self._problem.noise / (self.left * self._problem.target))
        scale = self.noise_scale if self._rate_is_measured else true
        self._theta -= self._problem.damping * RULES["noise"](scale, batch=batch, reference_batch=batch) * gradient


class NoisyQuadratic:
    """Problem 10 in the mean: curvature and gradient noise 1/i in 1,000 directions, noise scale given exactly.

    Args:
        learning_rate: at the reference batch.
        rule: how it follows the batch.
        reference_batch: where it was found.
    """

    def __init__(
        self, *, learning_rate: float, rule: RuleName = "none", reference_batch: int = 1, dimension: int = 1000
    ) -> None:
        self._curvature = 1 / np.arange(1, dimension + 1)
        self._squares = np.ones(dimension)
        self._learning_rate, self._rule, self._reference_batch = learning_rate, RULES[rule], reference_batch
        self.noise_scale = self._known()

    @property
    def left(self) -> float:
        """Loss over its target."""
        return 0.5 * float(self._curvature @ self._squares) / _NOISY_TARGET

    def step(self, batch: int) -> None:
        """Take the mean of an SGD step."""
        factor = self._rule(self.noise_scale, batch=batch, reference_batch=self._reference_batch)
        rate = self._learning_rate * factor
        with np.errstate(over="ignore"):
            self._squares = (1 - rate * self._curvature) ** 2 * self._squares + rate**2 * self._curvature / batch
        self.noise_scale = self._known()

    def _known(self) -> NoiseScale:
        """φ = Σ c / Σ h²u."""
        return known(float(self._curvature.sum() / (self._curvature**2 @ self._squares)))


def known(phi: float) -> NoiseScale:
    """Return the record of a noise scale that is known exactly: its interval is a point."""
    return NoiseScale(
        noise_trace=phi,
        grad_sq_norm=1.0,
        var_trace=0.0,
        var_grad=0.0,
        cov=0.0,
        effective_steps=math.inf,
        degrees_of_freedom=1e6,
        num_steps=1,
        num_samples=1.0,
        level=0.95,
        state=Resolution.RESOLVED,
        value=phi,
        lower=phi,
        upper=phi,
    )


def fixed_runs(batches: Sequence[int] = FIXED_BATCHES) -> dict[int, Spent]:
    """Run problem 5 at fixed batches."""
    spent = {batch: drive(Damped(), Constant(batch), start=batch) for batch in batches}
    return {batch: found for batch, found in spent.items() if found is not None}


def law_of(exchange_rate: float, *, powers_of_two: bool = False, goodput: bool = False) -> Controller:
    """Return a law behind real limits, on a fine grid or on dptrain's default one.

    Args:
        exchange_rate: samples that a step fewer is worth.
        powers_of_two: the default grid, and the default least gain.
        goodput: the goodput law, which finds the exchange rate in the times of steps.
    """
    least, cool_down = 0.02 if powers_of_two else 0.0, 0  # a noise scale that is given has no measurements to wait for
    law: Controller = NoiseLaw(samples_per_step=exchange_rate, min_gain=least, cool_down=cool_down)
    if goodput:
        law = GoodputLaw(
            largest_micro_batch_size=_LARGEST_BATCH,
            critical_ratio=CriticalRatio(spread=1.0),
            min_gain=least,
            cool_down=cool_down,
        )
    return OnGrid(law, BatchSizeGrid(quantum=_WORLD_SIZE, largest=_LARGEST_BATCH, powers_of_two=powers_of_two))


def timed(exchange_rate: float) -> StepTimeModel:
    """Return the model of step times that a run fits where a step of B samples takes `exchange_rate` + B."""
    times = StepTimes()
    for batch in FIXED_BATCHES:
        shape = BatchPlan(micro_batch_size=batch // _WORLD_SIZE, accumulation_steps=1, world_size=_WORLD_SIZE)
        for _ in range(_TIMED_STEPS):
            times = times.timed(shape, exchange_rate + batch)
    model = times.model()
    assert model is not None
    return replace(model, timed_batches=tuple(range(_WORLD_SIZE, _LARGEST_TIMED, _WORLD_SIZE)))


def first_batch(exchange_rate: float) -> int:
    """Return the batch that is right at the start of problem 5, a whole number for each replica."""
    return _WORLD_SIZE * max(1, round(math.sqrt(exchange_rate * DAMPED.noise / DAMPED.start) / _WORLD_SIZE))


def noisy_curve(batches: Sequence[int]) -> dict[int, float]:
    """Return the steps of fixed batches on problem 10, each at the constant learning rate that is best for it."""
    return {batch: noisy_quadratic_steps(batch) for batch in batches}


def noisy_run(*, exchange_rate: float, rule: RuleName, rates: Sequence[float], refined: int) -> tuple[Spent, float]:
    """Return what the exchange-rate law takes on problem 10, and the learning rate, searched for at the first batch.

    Args:
        exchange_rate: samples that a step fewer is worth.
        rule: of the learning rate.
        rates: the grid, ascending.
        refined: further rates, between the neighbours of the best one.
    """
    from scipy.optimize import minimize_scalar

    start = max(1, round(math.sqrt(exchange_rate * NoisyQuadratic(learning_rate=1.0).noise_scale.lower)))
    found: dict[float, Spent] = {}

    def cost(log_rate: float) -> float:
        problem = NoisyQuadratic(learning_rate=math.exp(log_rate), rule=rule, reference_batch=start)
        spent = drive(problem, law_of(exchange_rate), start=start, most_steps=_MOST_NOISY_STEPS)
        if spent is None:
            return math.inf
        found[log_rate] = spent
        return spent.steps * exchange_rate + spent.samples

    grid = [math.log(rate) for rate in rates]
    best = min(range(len(grid)), key=lambda at: cost(grid[at]))
    bounds = (grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)])
    minimize_scalar(cost, bounds=bounds, method="bounded", options={"maxiter": refined})
    log_rate = min(found, key=lambda at: found[at].steps * exchange_rate + found[at].samples)
    return found[log_rate], math.exp(log_rate)


def samples_over_curve(spent: Spent, curve: Mapping[int, float]) -> float:
    """Return the samples of a run over those of the fixed batch that takes equal steps; below 1 it is below the curve.

    That batch is looked for between two of the curve: a line through those would lie above it.
    """
    low = math.log(max(batch for batch, steps in curve.items() if steps >= spent.steps))
    high = low + math.log(max(curve) / min(curve)) / (len(curve) - 1)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if noisy_quadratic_steps(math.exp(middle)) >= spent.steps:
            low = middle
        else:
            high = middle
    return spent.samples / (math.exp((low + high) / 2) * spent.steps)
