"""Which runs a batch size of a sweep needs, from the runs so far; a pure function, so a sweep has no state.

For each batch the first seed tries three learning rates, and then one more on the side where the best one lies at the
edge, until it does not. The other seeds run at every rate that the first seed does not tell from the best. All of that
is decided when every run asked for so far is settled, and from samples alone: so the runs that a sweep consists of do
not depend on which of them was done first, nor on how often the sweep was killed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dptrain.sweep.course import Course
from dptrain.sweep.spec import SweepRun, SweepSpec

HOPELESS = 3.0
"""A run that has seen this many times the samples that another of its batch needed to all targets is stopped."""
CLOSE = 1.1
"""Rates whose steps differ by less than this on the first seed are tried on all of them."""

CourseOf = Callable[[SweepRun], Course]
"""How far a run came; an empty course for one that was not begun."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The learning rate that reaches a target in the fewest steps at a batch, in the geometric mean over the seeds.

    Attributes:
        grid_point: of the rate; None where no rate brings all seeds to the target.
        is_at_edge: whether no slower or no faster rate was tried beside it.
    """

    grid_point: int | None
    is_at_edge: bool


@dataclass(frozen=True, kw_only=True)
class Search:
    """Where the search at one batch stands.

    Attributes:
        runs: asked for so far, in order.
        unsettled: those that have to be trained, or trained further.
        cap: samples after which a run of this batch is hopeless, and up to which runs count; infinite while a target
            has not been reached.
        choices: one for each target, in their order; empty until all is settled.
    """

    runs: Sequence[SweepRun]
    unsettled: Sequence[SweepRun]
    cap: float
    choices: Sequence[Choice]


def search(spec: SweepSpec, global_batch_size: int, course_of: CourseOf) -> Search:
    """Return the runs that a batch needs, and its choices once it needs no more.

    Args:
        spec: of the sweep.
        global_batch_size: which.
        course_of: how far each run came.
    """
    runs = [
        spec.run(global_batch_size, grid_point=grid_point, seed=spec.seeds[0]) for grid_point in spec.first_grid_points
    ]
    while True:
        cap = _cap(spec, runs, course_of)
        unsettled = [run for run in runs if not _is_settled(spec, course_of(run), cap)]
        if unsettled:
            return Search(runs=runs, unsettled=unsettled, cap=cap, choices=())
        found = _Found(spec, runs, course_of, cap)
        more = found.wider() or found.other_seeds()
        if not more:
            choices = [found.choice(target) for target in spec.targets]
            return Search(runs=runs, unsettled=(), cap=cap, choices=choices)
        runs += more


def _cap(spec: SweepSpec, runs: Sequence[SweepRun], course_of: CourseOf) -> float:
    needed = [
        min((_samples(course_of(run), target, math.inf) for run in runs), default=math.inf) for target in spec.targets
    ]
    return HOPELESS * max(needed)


def _is_settled(spec: SweepSpec, course: Course, cap: float) -> bool:
    """Whether nothing that a run may still do can count."""
    done = all(course.reached(target) is not None for target in spec.targets)
    return done or course.is_over or course.is_beyond(cap)


def _samples(course: Course, target: float, cap: float) -> float:
    found = course.reached(target, up_to=cap)
    return math.inf if found is None else found


class _Found:
    """What the settled runs of one batch say."""

    def __init__(self, spec: SweepSpec, runs: Sequence[SweepRun], course_of: CourseOf, cap: float) -> None:
        self._spec = spec
        self._course_of = course_of
        self._cap = cap
        self._batch = runs[0].global_batch_size
        self._tried = sorted({run.grid_point for run in runs})
        self._runs = set(runs)

    def wider(self) -> list[SweepRun]:
        """Return runs at the next rates beyond the edge at which the best one lies, for any target."""
        wanted = {grid_point for target in self._spec.targets for grid_point in self._beside(self._best(target))}
        return [self._run_at(grid_point) for grid_point in sorted(wanted) if self._spec.has_grid_point(grid_point)]

    def _beside(self, grid_point: int) -> list[int]:
        return [beside for beside in (grid_point - 1, grid_point + 1) if beside not in self._tried]

    def _best(self, target: float) -> int:
        """Return the rate that needs the fewest samples; where none gets there, that which gets lowest."""

        def rank(grid_point: int) -> tuple[float, float]:
            course = self._course_of(self._run_at(grid_point))
            lowest = math.inf if course.has_diverged else course.lowest(up_to=self._cap)
            return self._needed(grid_point, target, self._spec.seeds[0]), lowest

        return min(self._tried, key=rank)

    def other_seeds(self) -> list[SweepRun]:
        """Return runs of the other seeds at each rate that the first one does not tell from the best."""
        wanted = {
            self._run_at(grid_point, seed)
            for target in self._spec.targets
            for grid_point in self._close(target)
            for seed in self._spec.seeds
        }
        return sorted(wanted - self._runs)

    def _close(self, target: float) -> list[int]:
        """Return the rates near the best of those that no seed has failed with so far."""
        needed = {
            grid_point: self._needed(grid_point, target, self._spec.seeds[0])
            for grid_point in self._tried
            if self._holds(grid_point, target)
        }
        best = min(needed.values(), default=math.inf)
        return [grid_point for grid_point, samples in needed.items() if samples <= CLOSE * best]

    def _holds(self, grid_point: int, target: float) -> bool:
        run = [seed for seed in self._spec.seeds if self._run_at(grid_point, seed) in self._runs]
        return all(self._needed(grid_point, target, seed) < math.inf for seed in run)

    def choice(self, target: float) -> Choice:
        """Choose among the rates with which all seeds got there."""
        means = {
            grid_point: math.fsum(math.log(self._needed(grid_point, target, seed)) for seed in self._spec.seeds)
            for grid_point in self._tried
            if self._holds(grid_point, target)
            and all(self._run_at(grid_point, seed) in self._runs for seed in self._spec.seeds)
        }
        if not means:
            return Choice(grid_point=None, is_at_edge=False)
        grid_point = min(means, key=means.__getitem__)
        return Choice(grid_point=grid_point, is_at_edge=bool(self._beside(grid_point)))

    def _needed(self, grid_point: int, target: float, seed: int) -> float:
        return _samples(self._course_of(self._run_at(grid_point, seed)), target, self._cap)

    def _run_at(self, grid_point: int, seed: int | None = None) -> SweepRun:
        return self._spec.run(self._batch, grid_point=grid_point, seed=self._spec.seeds[0] if seed is None else seed)
