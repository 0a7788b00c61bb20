"""Least squares of ln(steps) = ln S_min + ln(1 + B_crit/B), for many redraws at once; judges nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

_REACH = 100.0  # a B_crit that far beyond the batches bends the line by 1 %, and counts as nowhere
_SPACING = 0.02  # of the grid in ln B_crit; a parabola finds the rest
_NO_SCATTER = 1e-9  # of ln(steps): rounding


@dataclass(frozen=True, kw_only=True)
class Scatter:
    """How ln(steps) scatters between runs of one batch.

    Attributes:
        total: standard deviation between the runs of one batch.
        own: standard deviation of what each run has for itself.
        own_freedom: degrees of freedom of `own`.
        shared: standard deviation between seeds of their means over all batches; 0 where runs have no seeds in common.
        shared_freedom: degrees of freedom of `shared`.
    """

    total: float
    own: float
    own_freedom: int
    shared: float
    shared_freedom: int


class Runs:
    """Runs to one target, by batch.

    Args:
        batch_sizes: of each run.
        steps: of each run.
        seeds: of each run.

    Attributes:
        batch_sizes: those that there are, ascending, shape (batches,).
        counts: runs at each, shape (batches,).
        means: mean ln(steps) at each, shape (batches,).
    """

    def __init__(self, *, batch_sizes: Sequence[float], steps: Sequence[float], seeds: Sequence[int]) -> None:
        self.batch_sizes, self._at = np.unique(np.asarray(batch_sizes, dtype=np.float64), return_inverse=True)
        self._logs = np.log(np.asarray(steps, dtype=np.float64))
        self._seeds = np.unique(np.asarray(seeds), return_inverse=True)[1]
        self.counts = np.bincount(self._at)
        self.means: Array = np.bincount(self._at, self._logs) / self.counts

    def scatter(self) -> Scatter | None:
        """Return the scatter by its source; None with one run at each batch, or without scatter."""
        residuals = self._logs - self.means[self._at]
        freedom = len(self._logs) - len(self.counts)
        total = math.sqrt(float(residuals @ residuals) / freedom) if freedom else 0.0
        if total < _NO_SCATTER:
            return None
        num_seeds = int(self._seeds.max()) + 1
        cells = np.bincount(self._at * num_seeds + self._seeds, minlength=len(self.counts) * num_seeds)
        if num_seeds == 1 or not (cells == 1).all():
            return Scatter(total=total, own=total, own_freedom=freedom, shared=0.0, shared_freedom=1)
        levels = np.bincount(self._seeds, residuals) / len(self.counts)
        own = residuals - levels[self._seeds]
        own_freedom = (len(self.counts) - 1) * (num_seeds - 1)
        return Scatter(
            total=total,
            own=max(math.sqrt(float(own @ own) / own_freedom), _NO_SCATTER),
            own_freedom=own_freedom,
            shared=math.sqrt(float(levels @ levels) / (num_seeds - 1)),
            shared_freedom=num_seeds - 1,
        )

    def redraw(self, scatter: Scatter, *, num: int, random_seed: int) -> Array:
        """Redraw the means `num` times, shape (num, batches), as sure as the scatter is known.

        What runs have for themselves is redrawn for each batch; what seeds share, for all batches at once.
        """
        draw = np.random.default_rng(random_seed)
        own = draw.standard_normal((num, len(self.means))) * scatter.own / np.sqrt(self.counts)
        own *= np.sqrt(scatter.own_freedom / draw.chisquare(scatter.own_freedom, (num, 1)))
        if scatter.shared:
            own -= own.mean(1, keepdims=True)  # the level of a batch's mean is in that of the seeds
            own += draw.standard_t(scatter.shared_freedom, (num, 1)) * scatter.shared / math.sqrt(self.counts[0])
        return self.means + own


class Curves:
    """All hyperbolas over some batches, up to their height.

    Args:
        batch_sizes: ascending, shape (batches,).
        counts: runs at each, which is what they weigh, shape (batches,).

    Attributes:
        grid: ln B_crit, ascending; its ends stand for 0 and for infinity.
    """

    def __init__(self, batch_sizes: Array, *, counts: NDArray[np.int_]) -> None:
        self._log_batches = np.log(batch_sizes)
        self._weights = counts / counts.sum()
        reach = math.log(_REACH)
        low, high = self._log_batches[0] - reach, self._log_batches[-1] + reach
        self.grid: Array = np.linspace(low, high, 1 + math.ceil((high - low) / _SPACING))
        self._bends = self._centred(self.bend(self.grid))

    def bend(self, log_crit: Array) -> Array:
        """Return ln(1 + B_crit/B), shape (number of B_crit, batches)."""
        bend: Array = np.logaddexp(0.0, log_crit[:, None] - self._log_batches)
        return bend

    def _centred(self, values: Array) -> Array:
        centred: Array = values - (values @ self._weights)[:, None]
        return centred

    def fit(self, means: Array) -> tuple[Array, Array]:
        """Fit each row of means, shape (fits, batches): (ln S_min, ln B_crit), each of shape (fits,)."""
        centred = self._centred(means)
        squares: Array = (self._bends**2) @ self._weights - 2 * (centred * self._weights) @ self._bends.T
        at = squares.argmin(1)
        log_crit = self.grid[at] + self._past(squares, at)
        return self._heights(means, log_crit), log_crit

    def _heights(self, means: Array, log_crit: Array) -> Array:
        heights: Array = (means - self.bend(log_crit)) @ self._weights
        return heights

    def _past(self, squares: Array, at: NDArray[np.intp]) -> Array:
        """Return how far past its grid point the minimum of the parabola through three of them is; 0 at the ends."""
        inside = (at > 0) & (at < len(self.grid) - 1)
        middle = np.clip(at, 1, len(self.grid) - 2)
        before, here, after = (squares[np.arange(len(at)), middle + shift] for shift in (-1, 0, 1))
        curvature = before - 2 * here + after
        past: Array = np.divide(before - after, 2 * curvature, out=np.zeros_like(here), where=inside & (curvature > 0))
        past *= self.grid[1] - self.grid[0]
        return past

    def within(self, tolerance: float, *, means: Array) -> tuple[Array, Array]:
        """Return every fit of one row of means whose largest misfit is at most `tolerance`; the best where none is.

        A fit that the tolerance holds to on both sides bounds nothing, and is the best one alone: that is the case
        unless an end of the grid is among them.
        """
        misfits = np.abs(self._centred(means[None]) - self._bends).max(1)
        among = misfits <= tolerance
        if not (among[0] or among[-1]):
            return self.fit(means[None])
        log_crit = self.grid[among]
        return self._heights(means, log_crit), log_crit
