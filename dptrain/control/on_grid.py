"""The wrapper that holds any law to the batches that run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from dptrain.control.base import Controller, Decision, Measurement, State
from dptrain.control.grid import BatchSizeGrid


@dataclass(frozen=True)
class OnGrid(Controller):
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
        # A law that keeps a batch does not know that it runs no more, after bounds or replicas have changed.
        is_kept = asked.global_batch_size == measurement.global_batch_size
        why = f"{asked.global_batch_size} does not run any more" if is_kept else asked.reason
        return state, Decision(global_batch_size=batch, reason=f"{why}; nearest on the batch grid: {batch}")
