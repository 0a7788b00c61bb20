"""Norms of single micro-batches, collected parameter by parameter; where they come from is a tap's business."""

from __future__ import annotations

from torch import Tensor

from dptrain.errors import ObservationError
from dptrain.observe.geometry import Geometry
from dptrain.observe.groups import Groups
from dptrain.observe.stopwatch import Stopwatch


class MicroBatchNorms:
    """One norm for each parameter and micro-batch since the last optimizer step.

    Args:
        groups: which parameter belongs where.
        geometry: the norm.
        stopwatch: counts the time spent here.
        zero: a float64 zero on the device.
    """

    def __init__(self, *, groups: Groups, geometry: Geometry, stopwatch: Stopwatch, zero: Tensor) -> None:
        self._groups = groups
        self._norm = geometry.norm
        self._stopwatch = stopwatch
        self._zero = zero
        self._micro_batches: list[dict[int, Tensor]] = []
        self._current: dict[int, Tensor] | None = None
        self._overlap = False

    def begin(self, *, ignore: bool) -> bool:
        """Start a micro-batch, or a filler that is not looked at.

        Returns:
            False where the micro-batch begun before saw no gradient, so that this one takes its place.
        """
        if ignore:
            self._current = None
            return True
        if self._micro_batches and not self._micro_batches[-1]:
            self._current = self._micro_batches[-1]
            return False
        self._current = {}
        self._micro_batches.append(self._current)
        return True

    def see(self, index: int, grad: Tensor) -> None:
        """Note the gradient of parameter `index`. Runs once per parameter and micro-batch: keep it short."""
        norms = self._current
        if norms is None:
            return
        began = self._stopwatch.start()
        if index in norms:
            self._overlap = True
        if grad.is_sparse:
            grad = grad.coalesce().values()
        # A gradient knows its history only under create_graph; elsewhere a detach would cost 1 µs for nothing.
        norms[index] = self._norm(index, grad.detach() if grad.requires_grad else grad)
        self._stopwatch.stop(began)

    def collect(self, weights: list[float]) -> Tensor:
        """Return Σ ‖seen‖²/v over the micro-batches of the step, by group, and forget them.

        Raises:
            ObservationError: where what was seen cannot be told apart into micro-batches.
        """
        seen, overlap = self._micro_batches, self._overlap
        self.forget()
        if overlap:
            raise ObservationError(
                "a parameter received two gradients within one micro-batch (several backward() calls after one "
                "forward), so the squares cannot be added up: measure with method='hook' under DDP, or add the "
                "losses and call backward() once"
            )
        if len(seen) != len(weights) or not all(seen):
            raise ObservationError(
                f"{len(weights)} micro-batches were announced but gradients of {sum(map(bool, seen))} were seen: "
                "each forward pass in training mode needs its backward pass before the step is closed"
            )
        total = self._zero.expand(self._groups.num_entries)
        for norms, weight in zip(seen, weights, strict=True):
            total = total + self._groups.squares(norms, zero=self._zero) / weight
        return total

    def forget(self) -> None:
        """Drop what was seen."""
        self._micro_batches, self._current, self._overlap = [], None, False
