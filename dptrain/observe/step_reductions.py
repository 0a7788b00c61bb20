"""The reductions of measured steps that are under way, in order, each with what measuring took and who is alike."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from dptrain.observe.checks.duplicate_data_check import DuplicateDataCheck
from dptrain.observe.checks.first_step import FirstStepCheck
from dptrain.observe.measurement_interval import LAG, NUM_TIMINGS, MeasurementInterval
from dptrain.observe.reduction import PendingSum, on_device
from dptrain.observe.stopwatch import Stopwatch

UNSEEN = {"cpu": 1.2}
"""What measuring costs to what its own clock shows, by kind of device: on a CPU the norms push from the caches what the
model's kernels then fetch again. In trials over the models of `benchmarks.overhead` it was 1.04 to 1.22."""


class StepReductions:
    """Starts one reduction per measured step and hands the sums on once they are long under way.

    Args:
        group: process group over which is summed.
        device: of the vectors.
        interval_rule: gets the timings, which ride on the reduction.
        duplicate_data_check: compares the ranks at rare steps; None for nobody.
        stopwatch: what measuring takes.
    """

    def __init__(
        self,
        *,
        group: dist.ProcessGroup | None,
        device: torch.device,
        interval_rule: MeasurementInterval,
        duplicate_data_check: DuplicateDataCheck | None,
        stopwatch: Stopwatch,
    ) -> None:
        self._group = group
        self._device = device
        self._interval_rule = interval_rule
        self._duplicate_data_check = duplicate_data_check
        self._stopwatch = stopwatch
        self._first_step = FirstStepCheck(group)
        self._num_started = 0
        self._pending: deque[tuple[PendingSum, PendingSum | None]] = deque()

    def discarded(self) -> None:
        """Note that gradients were thrown away, which matters until the first reduction."""
        self._first_step.discarded()

    def start(self, vector: Tensor, *, own_square: Tensor) -> None:
        """Start the reduction of a measured step; a collective, no wait but for the ranks to meet at the first.

        Args:
            vector: this rank's part, float64.
            own_square: squared norm of this rank's own gradient, which the check compares.

        Raises:
            ObservationError: at the first step, where another rank went on without closing it.
        """
        self._first_step.meet()
        cost_s = self._stopwatch.take() * UNSEEN.get(self._device.type, 1.0)
        timing = on_device(self._interval_rule.timing(cost_s), device=self._device)
        began = self._stopwatch.start()
        pending = PendingSum(torch.cat([vector, timing]), group=self._group)
        self._num_started += 1
        check = self._duplicate_data_check
        squares = None if check is None else check.exchange(own_square, number=self._num_started)
        self._pending.append((pending, squares))
        self._stopwatch.stop(began)

    def arrived(self, num_left: int = LAG) -> Iterator[list[float]]:
        """Yield the sums of all steps but the last `num_left`, in order; waits for those that are not there yet."""
        while len(self._pending) > num_left:
            pending, squares = self._pending.popleft()
            values = pending.read()
            yield values[:-NUM_TIMINGS]
            self._interval_rule.note(values[-NUM_TIMINGS:])
            if squares is not None and self._duplicate_data_check is not None:
                self._duplicate_data_check.judge(squares.read())
