"""The frontier of optimizer steps against samples, fitted to whole runs; no run is read here, and none is started.

S = S_min(1 + B_crit/B) steps of B samples, E = S·B = E_min(1 + B/B_crit) samples, E_min = S_min·B_crit: McCandlish et
al. 2018 (arXiv 1812.06162), section 2.3. The fit is by least squares in the logarithm of the steps, because runs
scatter by a factor and not by a number of steps, and so that all batches weigh the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

import numpy as np

from dptrain.errors import ConfigError
from dptrain.explain.model.hyperbola import Curves, Runs, Scatter

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

TOLERANCE = 0.05
"""Misfit, as a part of the steps, that is not worth telling from none where there is no scatter to hold it against."""
LARGEST_MISFIT = 0.15
"""Misfit at one batch, as a part of the steps, beyond which two numbers do not describe the points. It is
arbitrary: the noisy quadratic, whose curve is no hyperbola either, is off by 10 %, and its B_crit still says a lot."""

_SIGNIFICANCE = 0.01  # at which misfit counts as more than the scatter of seeds
_FEWEST_BATCHES = 3  # two numbers pass through two points, whatever they are


class Verdict(StrEnum):
    """Whether a hyperbola describes the points."""

    HYPERBOLA = "hyperbola"
    """The misfit is no more than the scatter of seeds, or than `TOLERANCE`."""
    ROUGHLY = "roughly a hyperbola"
    """The misfit is more than that, but at no batch more than `LARGEST_MISFIT`."""
    NO_BEND = "not a hyperbola over these batches"
    """The steps fall as one over the batch, or not at all: B_crit has but one bound."""
    NOT = "not a hyperbola"
    """No two numbers describe the points."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """What one run needed to get to the target.

    Attributes:
        global_batch_size: in samples, the same in the whole run.
        steps: optimizer steps; the last one may count in part.
        seed: runs of one seed at several batches had the same start.
    """

    global_batch_size: float
    steps: float
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A fitted number with what is known of it.

    Attributes:
        value: None where only bounds are known.
        lower: lower end of the interval; 0 where open.
        upper: upper end of the interval; infinite where open.
        level: confidence of the interval; None without scatter, from which alone an interval could come.
    """

    value: float | None
    lower: float
    upper: float
    level: float | None

    def __str__(self) -> str:
        if self.value is None:
            bounds = [f"at least {shown(self.lower)}"] * (self.lower > 0)
            bounds += [f"at most {shown(self.upper)}"] * math.isfinite(self.upper)
            return " and ".join(bounds) or "not identified"
        return (
            shown(self.value)
            if self.level is None
            else f"{shown(self.value)} [{shown(self.lower)}, {shown(self.upper)}]"
        )


@dataclass(frozen=True, kw_only=True)
class Misfit:
    """How far points and hyperbola are apart, in the mean over the runs of each batch.

    Attributes:
        rms: root mean square over the batches of the difference in ln(steps).
        largest: the difference in ln(steps) that is largest in size; positive where the runs needed more.
        batch_size: where that is.
        scatter: standard deviation of ln(steps) between the seeds at one batch; None without any.
        p_value: probability of that much misfit from the scatter alone; None without scatter.
    """

    rms: float
    largest: float
    batch_size: float
    scatter: float | None
    p_value: float | None

    @property
    def is_chance(self) -> bool:
        """Whether the scatter explains it; without any, whether it is within `TOLERANCE`."""
        return abs(self.largest) <= math.log1p(TOLERANCE) if self.p_value is None else self.p_value > _SIGNIFICANCE

    def __str__(self) -> str:
        side = "more" if self.largest > 0 else "fewer"
        text = (
            f"misfit {self.rms:.1%} rms, largest at a batch of {shown(self.batch_size)}: "
            f"{abs(math.expm1(self.largest)):.1%} {side} steps than fitted"
        )
        return text if self.scatter is None else f"{text}; seeds scatter by {self.scatter:.1%}, p = {self.p_value:.2g}"


@dataclass(frozen=True, kw_only=True)
class Frontier:
    """What whole runs say of the trade of steps against samples.

    Attributes:
        verdict: whether a hyperbola describes them.
        reason: in what it does not; empty where it does.
        min_steps: S_min; None where the verdict is `NOT`, as are the next two.
        min_samples: E_min.
        critical_batch_size: B_crit = E_min/S_min, in samples.
        misfit: of the best hyperbola, whatever the verdict.
        num_batches: that were fitted.
        num_runs: at all of them together.
    """

    verdict: Verdict
    reason: str
    min_steps: Estimate | None
    min_samples: Estimate | None
    critical_batch_size: Estimate | None
    misfit: Misfit
    num_batches: int
    num_runs: int

    @property
    def is_fitted(self) -> bool:
        """Whether S_min, E_min and B_crit have values."""
        return self.verdict in (Verdict.HYPERBOLA, Verdict.ROUGHLY)

    def __str__(self) -> str:
        found = [f"{self.verdict}: {self.reason}"] if self.reason else []
        if self.verdict is not Verdict.NOT:
            both = f"S_min {self.min_steps} steps, E_min {self.min_samples} samples"
            found.append(f"{both}, B_crit {self.critical_batch_size} samples")
        return "; ".join([*found, str(self.misfit)])


def fit_frontier(
    points: Iterable[Point], *, level: float = 0.95, num_redraws: int = 2000, random_seed: int = 0
) -> Frontier:
    """Fit S_min, E_min and B_crit to the steps of whole runs, or say that no hyperbola describes them.

    The intervals are a parametric bootstrap over the seeds: the mean ln(steps) of every batch is redrawn
    `num_redraws` times and fitted anew. To resample the runs themselves would be far too sure, since a sweep has
    three seeds and not thirty. What all batches of a seed share (a lucky start) is redrawn apart from what each run
    has for itself, and both by Student's t, because each scatter is an estimate from few seeds itself. What they share
    moves S_min and E_min together and leaves B_crit alone.

    An interval says how far the seeds leave the fit open, and nothing of misfit: where the verdict is
    `ROUGHLY`, another choice of batches would move the fit by more.

    Args:
        points: at three batches or more. Batches with more runs weigh more.
        level: of the intervals.
        num_redraws: of the bootstrap.
        random_seed: of the redraws; the same points give the same intervals.

    Raises:
        ConfigError: for fewer than three batches, or numbers that are not positive.
    """
    runs = _runs(list(points))
    curves, scatter = Curves(runs.batch_sizes, counts=runs.counts), runs.scatter()
    best = curves.fit(runs.means[None])
    misfit = _misfit(runs, runs.means - best[0] - curves.bend(best[1])[0], scatter)
    if scatter is None:
        fitted = _estimates(best, curves.within(math.log1p(TOLERANCE), means=runs.means), curves, level=None)
    else:
        redrawn = curves.fit(runs.redraw(scatter, num=num_redraws, random_seed=random_seed))
        fitted = _estimates(best, redrawn, curves, level=level)
    verdict, reason = _judge(fitted, misfit, runs)
    min_steps, min_samples, critical = (None, None, None) if verdict is Verdict.NOT else fitted
    return Frontier(
        verdict=verdict,
        reason=reason,
        min_steps=min_steps,
        min_samples=min_samples,
        critical_batch_size=critical,
        misfit=misfit,
        num_batches=len(runs.batch_sizes),
        num_runs=int(runs.counts.sum()),
    )


def _runs(points: Sequence[Point]) -> Runs:
    for point in points:
        if not (0 < point.steps < math.inf and 0 < point.global_batch_size < math.inf):
            raise ConfigError(f"steps and batch must be positive, got {point.steps:g} at {point.global_batch_size:g}")
    runs = Runs(
        batch_sizes=[point.global_batch_size for point in points],
        steps=[point.steps for point in points],
        seeds=[point.seed for point in points],
    )
    if len(runs.batch_sizes) < _FEWEST_BATCHES:
        found = ", ".join(map(shown, runs.batch_sizes)) or "none"
        raise ConfigError(
            f"a frontier needs runs that reached the target at {_FEWEST_BATCHES} batches or more, got {found}: "
            "add batches, or choose a target that is easier to reach"
        )
    return runs


def _misfit(runs: Runs, residuals: Array, scatter: Scatter | None) -> Misfit:
    from scipy.special import fdtrc

    worst = int(np.abs(residuals).argmax())
    p_value = None
    if scatter is not None:
        freedom = len(residuals) - 2
        excess = float(runs.counts @ residuals**2) / freedom / scatter.own**2
        p_value = float(fdtrc(freedom, scatter.own_freedom, excess))
    return Misfit(
        rms=math.sqrt(float(np.mean(residuals**2))),
        largest=float(residuals[worst]),
        batch_size=float(runs.batch_sizes[worst]),
        scatter=None if scatter is None else scatter.total,
        p_value=p_value,
    )


def _estimates(
    best: tuple[Array, Array], others: tuple[Array, Array], curves: Curves, *, level: float | None
) -> tuple[Estimate, Estimate, Estimate]:
    """Make S_min, E_min and B_crit of the best fit and of others that could be true as well.

    Args:
        best: (ln S_min, ln B_crit), of one fit.
        others: the same, of many; without a level, all of them bound the true one.
        curves: whose grid ends where B_crit is not significantly different from 0 or infinity.
        level: of the interval.
    """
    tail = 0.0 if level is None else (1 - level) / 2

    def ends(values: Array) -> tuple[float, float]:
        low, high = np.quantile(values, [tail, 1 - tail])
        return math.exp(low), math.exp(high)

    lower, upper = ends(others[1])
    open_below, open_above = lower <= math.exp(curves.grid[0]), upper >= math.exp(curves.grid[-1])
    critical = (0.0 if open_below else lower, math.inf if open_above else upper)
    (fewest_steps, most_steps), (fewest_samples, most_samples) = ends(others[0]), ends(others[0] + others[1])
    steps = (0.0 if open_above else fewest_steps, most_steps)
    samples = (0.0 if open_below else fewest_samples, most_samples)

    def estimate(log_value: Array, interval: tuple[float, float], *, is_open: bool) -> Estimate:
        value = None if is_open else math.exp(log_value[0])
        return Estimate(value=value, lower=interval[0], upper=interval[1], level=level)

    return (
        estimate(best[0], steps, is_open=open_above),
        estimate(best[0] + best[1], samples, is_open=open_below),
        estimate(best[1], critical, is_open=open_above or open_below),
    )


def _judge(fitted: tuple[Estimate, Estimate, Estimate], misfit: Misfit, runs: Runs) -> tuple[Verdict, str]:
    min_steps, _, critical = fitted
    if not misfit.is_chance and abs(misfit.largest) > math.log1p(LARGEST_MISFIT):
        return Verdict.NOT, f"the best fit is off by more than {100 * LARGEST_MISFIT:.0f} %"
    if critical.value is None:
        return Verdict.NO_BEND, _without_bend(critical, runs)
    if min_steps.value is not None and min_steps.value < 1:
        return Verdict.NOT, f"S_min would be {min_steps.value:.2g} steps, less than one"
    if not misfit.is_chance:
        beyond = f"{TOLERANCE:.0%}" if misfit.scatter is None else "the seeds explain"
        return Verdict.ROUGHLY, f"the misfit is more than {beyond}"
    return Verdict.HYPERBOLA, ""


def _without_bend(critical: Estimate, runs: Runs) -> str:
    first, last = shown(runs.batch_sizes[0]), shown(runs.batch_sizes[-1])
    if critical.upper < math.inf:
        return f"batch {first}–{last}: no significant fall of the steps"
    if critical.lower > 0:
        return f"batch {first}–{last}: steps fall as 1/batch, no significant bend"
    return "scatter between seeds hides whether a larger batch saves steps"


def shown(value: float) -> str:
    """Write a number of steps or samples with three digits, and without an exponent: 6.78, 678, 67,800."""
    rounded = float(f"{value:.3g}")
    return f"{rounded:,.0f}" if abs(rounded) >= 1000 else f"{rounded:.3g}"  # noqa: PLR2004 - where a fourth digit begins
