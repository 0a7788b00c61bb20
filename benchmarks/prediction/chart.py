"""One problem charted: the steps to its targets at each batch, the fitted critical batch, the run-averaged noise."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

from benchmarks.prediction.average import RunAverage, run_average
from benchmarks.prediction.problem import Learner, Problem, first_crossings
from benchmarks.prediction.search import Searched, search
from dptrain.explain.model.frontier import Frontier, Point, Verdict, fit_frontier
from dptrain.explain.model.hyperbola import Curves, Runs
from dptrain.noise import SquaredNorms

STAGES = ("early", "late")
_NUM_PARTS = 8
_FEWEST_PARTS = 4
_FIRST_MEASURED_SEED = 100
_PATIENCE = 4
"""A run whose noise is measured may take so many times the steps that its batch took in the search."""


def chart(problem: Problem) -> list[dict[str, Any]]:
    """Return a row for each target of the problem, the early one first."""
    began_s = time.monotonic()
    searched = search(problem)
    rows = [_row(problem, searched, target) for target in range(len(STAGES))]
    return [{**row, "seconds": time.monotonic() - began_s} for row in rows]


def _row(problem: Problem, searched: Sequence[Searched], target: int) -> dict[str, Any]:
    reached = [one for one in searched if one.best[target] is not None]
    points = [
        Point(global_batch_size=one.batch_size, steps=steps, seed=seed)
        for one in reached
        for seed, steps in enumerate(one.steps(target))
    ]
    found = fit_frontier(points)
    fitted = _fitted(found) if found.verdict is not Verdict.NOT else _nearest(points)
    # Where the fit gives no number, the middle of the grid is as good a place as any.
    near = fitted["critical_batch_size"] or math.sqrt(reached[0].batch_size * reached[-1].batch_size)
    measurable = [one for one in reached if one.batch_size >= _FEWEST_PARTS * problem.grain]
    at = min(measurable, key=lambda one: abs(math.log(one.batch_size / near)))
    average, cold = _measured(problem, at, target), _measured(problem, reached[-1], target)
    return {
        "task": problem.name,
        "kind": problem.kind,
        "unit": problem.unit,
        "optimizer": problem.optimizer,
        "stage": STAGES[target],
        "target": problem.targets[target],
        "verdict": str(found.verdict),
        "misfit": found.misfit.rms,
        "largest_misfit": found.misfit.largest,
        **fitted,
        "noise_scale": average and average.over_steps,
        "noise_scale_by_progress": average and average.over_progress,
        "measured_at": at.batch_size,
        "noise_scale_cold": cold and cold.over_steps,
        "cold_at": reached[-1].batch_size,
        "rates_inside": all(one.inside[target] for one in reached),
        "frontier": [
            {"batch_size": one.batch_size, "steps": one.steps(target), "learning_rate": one.best[target]}
            for one in reached
        ],
    }


def _fitted(found: Frontier) -> dict[str, float | None]:
    """The numbers of a fit and the interval of B_crit; what is open or unknown is None, for JSON has no infinity."""
    critical, min_steps = found.critical_batch_size, found.min_steps
    assert critical is not None
    assert min_steps is not None
    return {
        "critical_batch_size": critical.value,
        "lower": critical.lower,
        "upper": critical.upper if math.isfinite(critical.upper) else None,
        "min_steps": min_steps.value,
    }


def _nearest(points: Sequence[Point]) -> dict[str, float | None]:
    """The hyperbola that is nearest to points that lie on none: good for an order of magnitude, not for an interval."""
    runs = Runs(
        batch_sizes=[point.global_batch_size for point in points],
        steps=[point.steps for point in points],
        seeds=[point.seed for point in points],
    )
    log_steps, log_critical = Curves(runs.batch_sizes, counts=runs.counts).fit(runs.means[None])
    return {
        "critical_batch_size": math.exp(log_critical[0]),
        "lower": None,
        "upper": None,
        "min_steps": math.exp(log_steps[0]),
    }


def _measured(problem: Problem, at: Searched, target: int) -> RunAverage | None:
    """The noise scale averaged over runs at the best learning rate of a batch, each up to its target."""
    rate = at.best[target]
    assert rate is not None
    num_parts = min(_NUM_PARTS, at.batch_size // problem.grain)
    runs = []
    for seed in range(_FIRST_MEASURED_SEED, _FIRST_MEASURED_SEED + problem.num_measured):
        learner = _Recorder(problem.learner(batch_size=at.batch_size, rate=rate, seed=seed, num_parts=num_parts))
        reached = first_crossings(learner, targets=[problem.targets[target]], limit=_PATIENCE * at.limits[target])
        if reached:
            runs.append(learner.seen[: math.ceil(reached[0])])
    return run_average(runs) if runs else None


class _Recorder:
    """A learner whose squared norms are kept."""

    def __init__(self, learner: Learner) -> None:
        self._learner = learner
        self.seen: list[SquaredNorms] = []

    def step(self) -> SquaredNorms | None:
        """Take a step and keep what it saw."""
        seen = self._learner.step()
        assert seen is not None
        self.seen.append(seen)
        return seen

    def loss(self) -> float:
        """Return the learner's own loss."""
        return self._learner.loss()
