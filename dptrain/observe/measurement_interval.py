"""Which optimizer steps are measured, so that measuring takes no more than its budget; timing stands in `stopwatch`."""

from __future__ import annotations

import math
import time
from collections import deque

from dptrain.errors import ObservationError
from dptrain.observe.loop.sizes import is_count

NUM_TIMINGS = 3
"""Entries of `MeasurementInterval.timing`."""
LAG = 2
"""Measured steps between a timing and the interval that rests on it.

By then its reduction has arrived wherever anyone looks, and all ranks decide from the same timings at the same step,
whether or not they read in between.
"""
_WINDOW = 9
"""Timings whose median counts: one that was disturbed, by a compilation or an evaluation, moves nothing."""


_FIRST = 16
"""Measured steps at the beginning of a run that the budget does not spread out.

A run of 40 steps (run_clm's default set) then has 16 and a few, of which the memory keeps seven. Spread out from the
fourth on it had eight, of which it kept three, and no interval. At 3 % of a step each they are 1 % of 50 steps.
"""
_FIRST_COST = 0.1
"""Share of a step above which measuring costs too much for that, as with `Meter.split`."""


class MeasurementInterval:
    """Measures every k-th step, k being fixed or chosen from the cost of measuring.

    The interval is the smallest k with cost/(k · step time) ≤ budget, where both are medians over the last measured
    steps and sums over all ranks. It at most doubles from one measured step to the next.

    Args:
        every: a fixed interval in steps, or None.
        budget: share of the step time that measuring may take, where `every` is None.
        first: measured steps at the beginning that the budget does not spread out.

    Raises:
        ObservationError: for an interval below 1 or a budget that is not positive.
    """

    def __init__(self, *, every: int | None = None, budget: float = 0.01, first: int = _FIRST) -> None:
        if every is not None and not is_count(every):
            raise ObservationError(f"every must be a whole number of steps, at least 1 (each step), got {every!r}")
        if not budget > 0:
            raise ObservationError(f"budget must be a positive share of the step time, such as 0.01, got {budget!r}")
        self._fixed = every is not None
        self._first = first
        self._budget = budget
        self.every = every or 1
        self._wait = 1
        self._num_closed = 0
        self._arrived: deque[tuple[float, float]] = deque()
        self._window: deque[tuple[float, float]] = deque(maxlen=_WINDOW)
        self._cost_s = 0.0
        self._elapsed_s = 0.0
        self._steps = 0
        self._began_s: float | None = None

    @property
    def share(self) -> float | None:
        """The share of the bare step time that measuring took so far, over all ranks; None before it is known."""
        bare_s = self._elapsed_s - self._cost_s
        return self._cost_s / bare_s if bare_s > 0 else None

    def timing(self, cost_s: float) -> list[float]:
        """Return this rank's (cost, time since the last measured step, steps in it), for the one reduction.

        Args:
            cost_s: seconds that measuring took since the last call.
        """
        now_s = time.perf_counter()
        elapsed_s = 0.0 if self._began_s is None else now_s - self._began_s
        steps = 0 if self._began_s is None else self._steps + 1
        self._began_s, self._steps = now_s, 0
        # The first step has no step before it to count from; what it cost would be held against nothing.
        return [cost_s, elapsed_s, float(steps)] if steps else [0.0, 0.0, 0.0]

    def note(self, timing: list[float]) -> None:
        """Take in the sum of `timing` over all ranks; once for each measured step, in order."""
        cost_s, elapsed_s, steps = timing
        self._cost_s += cost_s
        self._elapsed_s += elapsed_s
        self._arrived.append((cost_s, (elapsed_s - cost_s) / steps) if steps else (0.0, 0.0))

    def skip(self) -> None:
        """Close a step that is not measured."""
        self._steps += 1

    def close(self) -> None:
        """Close a measured step and choose the interval to the next; `note` was called for all but `LAG`."""
        self._num_closed += 1
        if not self._fixed and self._num_closed > LAG:
            cost_s, step_s = self._arrived.popleft()
            if step_s > 0:
                self._window.append((cost_s, step_s))
            if self._window and (self._num_closed >= self._first or self._cost() > _FIRST_COST):
                self.every = min(self._affordable(), 2 * self.every)
        elif self._fixed:
            self._arrived.clear()
        self._wait = self.every

    def _affordable(self) -> int:
        return max(1, math.ceil(self._cost() / self._budget))

    def _cost(self) -> float:
        """Return what measuring takes, as a share of a step."""
        # Every rank's step takes the same time, so the sums over ranks of both differ from the means by one factor.
        return _median([cost for cost, _ in self._window]) / _median([step for _, step in self._window])

    def align(self, step: int) -> None:
        """Begin after so many steps, so that a run which goes on measures the steps that it would have measured.

        Only a fixed interval can: what is chosen from timings is chosen anew, beginning with the first step.
        """
        self._wait = 1 + (-step % self.every if self._fixed else 0)

    def next_is_measured(self) -> bool:
        """Say whether the step that begins now is measured; asked once per step."""
        self._wait -= 1
        return self._wait == 0


class NeverMeasured(MeasurementInterval):
    """Measures no step."""

    def next_is_measured(self) -> bool:
        """Say no."""
        return False


def _median(values: list[float]) -> float:
    """Of an even number the upper one. The standard library's costs a tenth of the time that dptrain imports in."""
    return sorted(values)[len(values) // 2]
