"""The best learning rate for each batch and target, on a grid that is extended until the best is inside."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.prediction.problem import Array, Problem

_RATIO = math.sqrt(2)
"""Ratio of neighbouring learning rates; the search takes every second grid point first."""
_FARTHEST = 12
"""Grid points between the first and one that is tried, at most."""
_PATIENCE = 1.5
"""A variant is given up where it takes so many times the steps of the best one."""
_SLACK = 2
"""The steps that a smaller batch is given, over those that a hyperbola through the larger one could need."""


@dataclass(frozen=True, kw_only=True)
class Searched:
    """One batch after its search.

    Attributes:
        batch_size: in the problem's unit.
        tried: learning rate → steps to each target, shape (seeds, targets); infinite where not reached.
        best: the learning rate with the fewest steps, for each target; None where no rate reached it.
        inside: for each target, whether a lower and a higher rate were tried beside the best one.
        limits: steps after which a run to each target was given up at the end of the search.
    """

    batch_size: int
    tried: Mapping[float, Array]
    best: tuple[float | None, ...]
    inside: tuple[bool, ...]
    limits: tuple[int, ...]

    def steps(self, target: int) -> list[float]:
        """Return the steps of each seed to a target at the best rate; none where no rate reached it."""
        rate = self.best[target]
        return [] if rate is None else [float(steps) for steps in self.tried[rate][:, target]]


def search(problem: Problem) -> list[Searched]:
    """Search each batch, from the largest down; each search begins where the one before it ended."""
    found: list[Searched] = []
    first, limits = problem.first_rate, [problem.max_steps] * len(problem.targets)
    for batch_size in reversed(problem.batch_sizes):
        if found and found[-1].best[-1] is not None:
            shrunk = found[-1].batch_size / batch_size
            first = found[-1].best[-1] / math.sqrt(shrunk)
            # A hyperbola takes at most r times the steps at an r-th of the batch.
            limits = [math.ceil(_SLACK * shrunk * limit) for limit in found[-1].limits]
        found.append(_search_batch(problem, batch_size=batch_size, first=first, limits=limits))
    return found[::-1]


def _search_batch(problem: Problem, *, batch_size: int, first: float, limits: Sequence[int]) -> Searched:
    tried: dict[int, Array] = {}
    while grid_points := _wanted(tried):
        rates = [first * _RATIO**grid_point for grid_point in grid_points]
        tried |= zip(grid_points, problem.crossings(batch_size=batch_size, rates=rates, limits=limits), strict=True)
        limits = [_limit(tried, target, known=limit) for target, limit in enumerate(limits)]
    best = [_best(tried, target) for target in range(len(limits))]
    return Searched(
        batch_size=batch_size,
        tried={first * _RATIO**grid_point: tried[grid_point] for grid_point in sorted(tried)},
        best=tuple(None if grid_point is None else first * _RATIO**grid_point for grid_point in best),
        inside=tuple(
            grid_point is not None and {grid_point - 1, grid_point + 1} <= tried.keys() for grid_point in best
        ),
        limits=tuple(limits),
    )


def _limit(tried: Mapping[int, Array], target: int, *, known: int) -> int:
    best = _best(tried, target)
    return known if best is None else min(known, math.ceil(_PATIENCE * _mean(tried[best][:, target])))


def _wanted(tried: Mapping[int, Array]) -> list[int]:
    """The grid points to be tried next: two from each best one, then one; none when all is known."""
    if not tried:
        return [0]
    num_targets = next(iter(tried.values())).shape[1]
    for distance in (2, 1):
        wanted: set[int] = set()
        for target in range(num_targets):
            grid_point = _best(tried, target)
            around = (
                {min(tried) - 2, max(tried) + 2}
                if grid_point is None
                else {grid_point - distance, grid_point + distance}
            )
            wanted |= {one for one in around - tried.keys() if abs(one) <= _FARTHEST}
        if wanted:
            return sorted(wanted)
    return []


def _best(tried: Mapping[int, Array], target: int) -> int | None:
    """The grid point with the fewest steps in the geometric mean over seeds; None where each one failed a seed."""
    means = {grid_point: _mean(steps[:, target]) for grid_point, steps in tried.items()}
    best = min(means, key=means.__getitem__)
    return best if math.isfinite(means[best]) else None


def _mean(steps: Array) -> float:
    return float(np.exp(np.log(steps).mean()))
