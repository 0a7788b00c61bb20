"""Learning-rate schedules that count updates, advanced by samples while the batch adapts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

_ROUNDING = 1e-9
"""So that ten tenths of an update are one."""


class SampleSchedule:
    """Makes a call of `scheduler.step()` advance by the samples of the update before it.

    A schedule is planned in updates of the first batch. An update of eight times the batch brings it eight updates
    further, so it ends with the same samples as without adapting; fractions are carried over. The loop, or its
    framework, goes on calling `step()` once per update.

    Args:
        reference_batch_size: samples of an update that the schedule was planned with.
    """

    def __init__(self, *, reference_batch_size: float) -> None:
        self._reference = reference_batch_size
        self._num_samples = reference_batch_size
        self._carried: dict[int, float] = {}
        self._followed: list[LRScheduler] = []

    def plan_for(self, reference_batch_size: float) -> None:
        """Take another number of samples of a planned update, such as that of the run that is resumed."""
        self._reference = reference_batch_size

    def note(self, num_samples: float) -> None:
        """Take the samples of the update that is being made, all replicas together."""
        self._num_samples = num_samples

    def follow(self, schedulers: Iterable[Any]) -> None:
        """Advance these by samples from now on; one that follows a metric is left alone, as is one known already."""
        for one in schedulers:
            scheduler = getattr(one, "scheduler", one)  # accelerate wraps it under this name
            known = any(scheduler is followed for followed in self._followed)
            if known or not isinstance(scheduler, LRScheduler) or isinstance(scheduler, ReduceLROnPlateau):
                continue
            self._carried.setdefault(len(self._followed), 0.0)
            scheduler.__class__ = self._advancing(type(scheduler), number=len(self._followed))
            self._followed.append(scheduler)

    def _advancing(self, kind: type[LRScheduler], *, number: int) -> type[LRScheduler]:
        # A class of its own, and no attribute: a scheduler's attributes are its state, which checkpoints pickle.
        schedule = self

        def step(scheduler: LRScheduler, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - torch's
            for _ in range(schedule._due(number)):
                kind.step(scheduler, *args, **kwargs)

        return type(kind.__name__, (kind,), {"step": step, "__module__": kind.__module__})

    def _due(self, number: int) -> int:
        due = self._carried[number] + self._num_samples / self._reference
        whole = int(due + _ROUNDING)
        self._carried[number] = due - whole
        return whole

    def release(self) -> None:
        """Let the schedulers count updates again."""
        for scheduler in self._followed:
            scheduler.__class__ = type(scheduler).__mro__[1]  # the class that it had
        self._followed.clear()

    def state(self) -> list[float]:
        """Return the fractions of updates that are carried over, one for each scheduler."""
        return [self._carried[number] for number in sorted(self._carried)]

    def restore(self, state: Iterable[float]) -> None:
        """Go on from a `state`."""
        self._carried.update(enumerate(state))
