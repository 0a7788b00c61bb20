"""The global batch sizes that the hardware runs."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dptrain.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class BatchSizeGrid:
    """Global batches `quantum · 2^k` between two bounds, so that a compiled model meets a handful of shapes.

    Attributes:
        quantum: smallest micro-batch × replicas, in samples.
        smallest: lower bound, in samples.
        largest: upper bound, in samples.
        powers_of_two: grid points are quantum · 2^k; else all multiples of the quantum, for batches written by hand.

    Raises:
        ConfigError: where no grid point lies between the bounds.
    """

    quantum: int
    smallest: int = 1
    largest: int
    powers_of_two: bool = True

    def __post_init__(self) -> None:
        if not self.first <= self.last:
            raise ConfigError(
                f"no batch between smallest {self.smallest} and largest {self.largest} can run: the batches that can "
                f"are {self}; largest must be at least {self.first}"
            )

    @property
    def first(self) -> int:
        """The smallest grid point within the bounds."""
        below = self._below(self.smallest)
        return below if below >= self.smallest else self._next(below)

    @property
    def last(self) -> int:
        """The largest grid point within the bounds; below `first` where there is none."""
        return self._below(self.largest) if self.largest >= self.quantum else 0

    def nearest(self, batch: float) -> int:
        """Return the grid point at the smallest ratio to `batch`."""
        lower = self._below(batch)
        upper = self._next(lower)
        nearest = lower if (batch / lower) ** 2 <= upper / lower else upper
        return min(max(nearest, self.first), self.last)

    def candidates(self, batch: int) -> tuple[int, ...]:
        """Return the grid points that one decision may move to from `batch`, rising: all below, and up to its double.

        Growth stops at twice the batch because the noise scale of a larger batch is measured better on the way. A batch
        that is far too large costs as many times more in each step, so the way down has no limit.
        """
        top = min(2 * batch, self.last)
        # Of multiples sixteen to an octave: between two of them nothing is gained.
        ratio = 2.0 if self.powers_of_two else 2 ** (1 / 16)
        count = max(math.ceil(math.log(max(top / self.first, 1.0), ratio)), 0)
        points = {self.nearest(top / ratio**k) for k in range(count + 1)} | {self.first}
        return tuple(sorted(point for point in points if point <= max(top, self.first)))

    def _below(self, batch: float) -> int:
        count = max(int(batch // self.quantum), 1)
        return self.quantum * (1 << (count.bit_length() - 1) if self.powers_of_two else count)

    def _next(self, point: int) -> int:
        return 2 * point if self.powers_of_two else point + self.quantum

    def __str__(self) -> str:
        return ", ".join(str(self.quantum * factor) for factor in (1, 2, 4 if self.powers_of_two else 3)) + ", …"
