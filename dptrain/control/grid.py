"""The global batch sizes that the hardware runs, and the wrapper that holds any law to them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from dptrain.control.base import Controller, Decision, Measurement, State
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
        if self.quantum < 1:
            raise ConfigError(f"quantum (micro-batch × replicas) must be at least 1 sample, got {self.quantum}")
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

        Growth stops at the double because the noise scale of a larger batch is measured better on the way. A batch
        that is far too large costs as many times more in each step, so the way down has no limit.
        """
        points = [self.first]
        while points[-1] < min(2 * batch, self.last):
            points.append(self._next(points[-1]))
        return tuple(point for point in points if point <= 2 * batch)

    def _below(self, batch: float) -> int:
        count = max(int(batch // self.quantum), 1)
        return self.quantum * (1 << (count.bit_length() - 1) if self.powers_of_two else count)

    def _next(self, point: int) -> int:
        return 2 * point if self.powers_of_two else point + self.quantum

    def __str__(self) -> str:
        return ", ".join(str(self.quantum * factor) for factor in (1, 2, 4 if self.powers_of_two else 3)) + ", …"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds of the global batch, for `limited`."""

    largest: int
    """Largest global batch, in samples."""
    smallest: int | None = None
    """Smallest global batch, in samples; None for the least that the replicas run."""


@dataclass(frozen=True, kw_only=True)
class OnGrid:
    """Rounds what a controller asks for to the grid: half and double of a batch are equally far from it.

    Attributes:
        inner: the controller.
        grid: the batches that run.
    """

    inner: Controller
    grid: BatchSizeGrid

    def init(self) -> State:
        """Return the state of the controller inside, before the first decision."""
        return self.inner.init()

    def restore(self, record: Mapping[str, Any]) -> State:
        """Return the state of the controller inside, as saved."""
        return self.inner.restore(record)

    def update(self, state: State, measurement: Measurement) -> tuple[State, Decision]:
        """Ask the controller inside, and round its answer."""
        state, asked = self.inner.update(state, replace(measurement, grid=self.grid))
        batch = self.grid.nearest(asked.global_batch_size)
        if batch == asked.global_batch_size:
            return state, replace(asked, global_batch_size=batch)  # whole, where the law's number may be a float
        return state, Decision(global_batch_size=batch, reason=f"{asked.reason}; nearest on the batch grid: {batch}")


def limited(law: Controller, *, quantum: int, limits: Limits, powers_of_two: bool = True) -> OnGrid:
    """Hold `law` to the batches that run.

    Args:
        law: decides; it finds the grid in the measurement.
        quantum: samples that the batch must be a multiple of: smallest micro-batch × replicas.
        limits: bounds.
        powers_of_two: whether the batch moves by powers of two from the quantum; a schedule written by hand may not.

    Raises:
        ConfigError: where no batch within the bounds can run.
    """
    smallest = quantum if limits.smallest is None else limits.smallest
    grid = BatchSizeGrid(quantum=quantum, smallest=smallest, largest=limits.largest, powers_of_two=powers_of_two)
    return OnGrid(inner=law, grid=grid)
