"""The wrapper that holds any law to the batches that run: bounds, and rounding to the grid."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from dptrain.control.base import Controller, Decision, Measurement, State
from dptrain.control.grid import BatchSizeGrid


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
