"""Which replica holds up the others: forward times compared step by step, reported only when the evidence persists."""

from __future__ import annotations

from statistics import median

from dptrain.runtime.step_reduction import StepOutcome, StepRecord

SLOW = 4 / 3
"""Ratio of a replica's forward time to that of the others from which it counts as slow."""
WINDOW_STEPS = 20
"""Fewest steps of a window."""
WINDOW_S = 10.0
"""Shortest window. Cores that are shared slow one process for seconds, then another: with windows of 20 steps alone, a
healthy run of 34 s on two busy cores reported its two ranks in turn, six times."""
NUM_WINDOWS = 6
"""Consecutive windows in which the same replica must be slow. A slow device or a hot node stays slow for minutes.

Tuned on simulated contention, 3.3 hours with one rank of two at 1.8 times the other, chosen anew every τ seconds on
average: 0 false reports for τ = 3 s and 6 s, 1 for 10 s. Three windows of 5 s, by their median, gave 143 to 149."""
_SHARE = 0.25
"""Quantile of a window's ratios that must be slow: three of four steps. By the median, 5 to 19 false reports."""
_LEAST_S = 0.002
"""Forward time of the others below which a ratio measures the scheduler, not the replica."""


class StragglerWatch:
    """Finds out whether this replica is slow, and remembers which one was reported.

    The time of a step's forward passes is compared, during which a replica waits for no other. The mean over all
    replicas comes back with the reduction of the step, one step later.

    Args:
        world_size: number of replicas.
    """

    def __init__(self, *, world_size: int) -> None:
        self._world_size = world_size
        self._ratios: list[float] = []
        self._began_s: float | None = None
        self._slow_windows: list[float] = []
        self._sent: list[float] = []
        self._reported: int | None = None
        self.slowness = 0.0

    def note(self, busy_s: float) -> None:
        """Take this replica's forward seconds of a step, which it is about to send to the others."""
        if self._world_size > 1:  # a single replica gets no outcome to compare with, and would only collect
            self._sent.append(busy_s)

    def learn(self, outcome: StepOutcome, record: StepRecord) -> str | None:
        """Take the outcome of a step, and return one line where a new straggler is known."""
        if self._world_size == 1:
            return None
        own_s = self._sent.pop(0) if self._sent else outcome.busy_s
        others_s = (outcome.busy_s * self._world_size - own_s) / (self._world_size - 1)
        self._ratios.append(own_s / others_s if others_s > _LEAST_S else 1.0)
        self._began_s = record.wall_s if self._began_s is None else self._began_s
        if len(self._ratios) >= WINDOW_STEPS and record.wall_s - self._began_s >= WINDOW_S:
            self._judge(record)
        if outcome.slow_rank is None or outcome.slow_rank == self._reported:
            return None
        self._reported = outcome.slow_rank
        return (
            f"rank {outcome.slow_rank} slow: forward time {outcome.slowness:.2g}× that of the other ranks for "
            f"{NUM_WINDOWS * WINDOW_S:g} s or more, up to step {record.step:,}"
        )

    def _judge(self, record: StepRecord) -> None:
        """Close the window: slow in enough of them in a row, or not slow at all."""
        ratios = sorted(self._ratios)
        is_slow = ratios[int(_SHARE * len(ratios))] > SLOW
        self._slow_windows = [*self._slow_windows, median(ratios)] if is_slow else []
        self.slowness = median(self._slow_windows) if len(self._slow_windows) >= NUM_WINDOWS else 0.0
        self._ratios = []
        self._began_s = record.wall_s
