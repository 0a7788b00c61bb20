"""Which replica holds up the others: each weighs its own busy time against the mean of all, and one speaks up."""

from __future__ import annotations

from dptrain.runtime.step_reduction import StepOutcome, StepRecord

_SLOW = 1 / 0.75
"""Busy time to the mean of the others, above which a replica is a straggler."""
_STEPS = 20
"""Over which both are averaged: one pause is none of it."""
_LEAST_S = 0.002
"""Mean busy time below which differences are the scheduler's."""


class StragglerWatch:
    """Says whether this replica is slow, and remembers whether that was told.

    Busy is a replica in its forward passes: there it waits for nobody. The mean over all comes back with the reduction
    of the step, a step later.

    Args:
        world_size: number of replicas.
    """

    def __init__(self, *, world_size: int) -> None:
        self._world_size = world_size
        self._own_s = 0.0
        self._others_s = 0.0
        self._steps = 0
        self._sent: list[float] = []
        self._told: int | None = None
        self.slowness = 0.0

    def note(self, busy_s: float) -> None:
        """Take this replica's busy seconds of a step, which it is about to tell the others."""
        if self._world_size > 1:  # who is alone learns of nobody, and would only gather
            self._sent.append(busy_s)

    def learn(self, outcome: StepOutcome, record: StepRecord) -> str | None:
        """Take what all replicas found in the step, and return a sentence where a new straggler is known.

        Of a straggler the others' mean is what is left of the sum of all without it.
        """
        if self._world_size == 1:
            return None
        own_s = self._sent.pop(0) if self._sent else outcome.busy_s
        self._own_s += own_s
        self._others_s += (outcome.busy_s * self._world_size - own_s) / (self._world_size - 1)
        self._steps += 1
        if self._steps == _STEPS:
            self._judge()
        if outcome.slow_rank is None or outcome.slow_rank == self._told:
            return None
        self._told = outcome.slow_rank
        return (
            f"rank {outcome.slow_rank} is a straggler: over {_STEPS} steps up to step {record.step:,} it took "
            f"{outcome.slowness:.2g} times as long as the others for the same work"
        )

    def _judge(self) -> None:
        apart = self._others_s > 0 and self._others_s / self._steps > _LEAST_S
        ratio = self._own_s / self._others_s if apart else 0.0
        self.slowness = ratio if ratio > _SLOW else 0.0
        self._own_s = self._others_s = 0.0
        self._steps = 0
