"""The meter's steps in a loop that has a reduction of its own to put the sums in."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from dptrain.noise import SquaredNorms
from dptrain.observe.hooks.base import GradientHook
from dptrain.observe.measurement_interval import NUM_TIMINGS, MeasurementInterval
from dptrain.observe.reduction import on_device
from dptrain.observe.step_reductions import UNSEEN


class OwnReduction:
    """What such a loop calls in place of `step`: no host sync, no collective."""

    _hook: GradientHook
    _device: torch.device
    _interval_rule: MeasurementInterval
    _measuring: bool
    _nothing: Tensor

    @abstractmethod
    def local_sums(self, *, grad_norm: Tensor | None = None) -> Tensor:
        """Return this replica's part of the step."""

    @abstractmethod
    def absorb(self, sums: list[float]) -> SquaredNorms | None:
        """Take in the sum over all replicas."""

    @abstractmethod
    def _turn(self) -> None:
        """Go over to the next step."""

    def close_step(self, *, grad_norm: Tensor | None = None) -> tuple[Tensor, bool]:
        """Close an optimizer step in a loop that has a reduction of its own. No host sync, no collective.

        Args:
            grad_norm: as for `local_sums`.

        Returns:
            A float64 vector of `num_sums` entries to be summed over the replicas and handed to `absorb_step`, in the
            order of the steps and before the third measured step from there on is closed; and whether the step was
            measured. If not, the vector is zero.
        """
        measured = self._measuring
        vector = self._nothing
        if measured:
            stopwatch = self._hook.stopwatch
            began = stopwatch.start()
            sums = self.local_sums(grad_norm=grad_norm)
            stopwatch.stop(began)
            cost_s = stopwatch.take() * UNSEEN.get(self._device.type, 1.0)
            vector = torch.cat([sums, on_device(self._interval_rule.timing(cost_s), device=self._device)])
            self._interval_rule.close()
        self._turn()
        return vector, measured

    def absorb_step(self, sums: list[float], *, usable: bool) -> None:
        """Take in the sum over all replicas of a measured step's `close_step`.

        Args:
            sums: as `close_step` gave them, summed.
            usable: whether the averaged gradient was finite; if not, only the timing counts.
        """
        if usable:
            self.absorb(sums[:-NUM_TIMINGS])
        self._interval_rule.note(sums[-NUM_TIMINGS:])

    def align(self, step: int) -> None:
        """Go on after so many steps of a run: a fixed interval measures the steps that it would have measured."""
        self._interval_rule.align(step)
        self._measuring = self._interval_rule.next_is_measured()
        self._hook.listen(on=self._measuring)

    @property
    def num_sums(self) -> int:
        """Length of the vector of `close_step`."""
        return len(self._nothing)
