"""What a sweep is asked to try: batches, learning rates, seeds, targets; and one run of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dptrain.errors import ConfigError

FACTOR = 2.0
"""Between neighbouring learning rates that are searched. Near its best, half or twice the rate costs some 10 to 30 %
of the steps; a finer grid would choose between rates that the seeds do not tell apart."""

_MOST_GRID_POINTS = 12  # to each side of the first guess: a factor of 4,096
_DIGITS = 4  # of a learning rate, so that what a run's name says is what it has


@dataclass(frozen=True, kw_only=True, order=True)
class SweepRun:
    """One run of a sweep.

    Attributes:
        global_batch_size: in samples.
        grid_point: of the learning rate, in the order of the rates.
        learning_rate: in the whole run.
        seed: of the run.
    """

    global_batch_size: int
    grid_point: int
    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        """Name of its run folder."""
        return f"batch-{self.global_batch_size}-lr-{self.learning_rate:g}-seed-{self.seed}"


@dataclass(frozen=True, kw_only=True)
class SweepSpec:
    """What is to be tried.

    Attributes:
        batch_sizes: global batches, ascending.
        targets: held-out losses to reach, from the easiest to the hardest.
        seeds: of the runs; the first one searches the learning rate.
        learning_rates: those to try at each batch, ascending; None: searched.
        base_batch_size: the batch that the three below are meant for.
        base_learning_rate: a first guess at that batch.
        base_samples: length of a run at that batch, in samples.
        exponent: of the batch in the first guess at another batch: 1 for the linear rule, ½ for the square root.
    """

    batch_sizes: Sequence[int]
    targets: Sequence[float]
    seeds: Sequence[int]
    learning_rates: Sequence[float] | None
    base_batch_size: int
    base_learning_rate: float
    base_samples: int
    exponent: float

    def __post_init__(self) -> None:
        _check("global batches", self.batch_sizes, must="at least 1", holds=lambda batch: batch >= 1)
        _check("seeds", self.seeds, must="at least 0", holds=lambda seed: seed >= 0)
        _check("targets", self.targets, must="finite", holds=math.isfinite)
        if self.learning_rates is not None:
            _check("learning rates", self.learning_rates, must="positive", holds=lambda rate: 0 < rate < math.inf)
        assert list(self.batch_sizes) == sorted(self.batch_sizes)
        assert list(self.targets) == sorted(self.targets, reverse=True)

    @property
    def first_grid_points(self) -> range:
        """The learning rates that are tried at every batch to begin with."""
        return range(-1, 2) if self.learning_rates is None else range(len(self.learning_rates))

    def has_grid_point(self, grid_point: int) -> bool:
        """Whether there is such a learning rate to try."""
        return (
            abs(grid_point) <= _MOST_GRID_POINTS
            if self.learning_rates is None
            else grid_point in self.first_grid_points
        )

    def run(self, global_batch_size: int, *, grid_point: int, seed: int) -> SweepRun:
        """Return the run at a batch, at a learning rate, of a seed."""
        if self.learning_rates is None:
            guess = self.base_learning_rate * (global_batch_size / self.base_batch_size) ** self.exponent
            rate = float(f"{guess * FACTOR**grid_point:.{_DIGITS}g}")
        else:
            rate = self.learning_rates[grid_point]
        return SweepRun(global_batch_size=global_batch_size, grid_point=grid_point, learning_rate=rate, seed=seed)

    def max_samples(self, global_batch_size: int) -> int:
        """Return how long a run may go on, in samples.

        As many steps as a run at the base batch where the batch is larger, as many samples where it is smaller: a
        larger batch never needs more steps to a target, nor a smaller one more samples. So a target that is within
        reach at the base batch is within reach at all of them.
        """
        steps = -(-self.base_samples // self.base_batch_size)
        return max(self.base_samples, steps * global_batch_size)


def _check(name: str, values: Sequence[float], *, must: str, holds: Callable[[float], bool]) -> None:
    listed = ", ".join(f"{value:g}" for value in values) or "none"
    if not values or not all(map(holds, values)):
        raise ConfigError(f"{name} must be {must}, got {listed}")
    if len(set(values)) < len(values):
        raise ConfigError(f"{name} must each be given once, got {listed}")
