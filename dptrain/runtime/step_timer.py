"""How long steps take, as the hosts see it: from the beginning of one to that of the next; agreed by all replicas."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from dptrain.batch import BatchPlan
from dptrain.control import StepTimeModel, StepTimes
from dptrain.runtime.step_reduction import StepOutcome, StepRecord

_EVERY = 16
"""Steps between two fits, which take a third of a millisecond: medians move slowly. A new shape is fitted at once."""


class StepTimer:
    """Times the steps of this replica, and learns from the mean over all replicas.

    On a GPU the host runs ahead of the device by less than one step, so that its steps take on average as long as the
    device's.

    Args:
        world_size: number of replicas.
    """

    def __init__(self, *, world_size: int) -> None:
        self._world_size = world_size
        self._latest: StepRecord | None = None
        self._shapes: dict[int, BatchPlan] = {}
        self._interval_s: float | None = None
        self._was_disturbed = False
        self._times = StepTimes()
        self._model: StepTimeModel | None = None
        self._num_learned = 0
        self._is_stale = False

    def began(self, record: StepRecord) -> None:
        """Note that a step begins, and so that the one before it is over."""
        before, self._latest = self._latest, record
        self._interval_s = None if before is None or self._was_disturbed else record.wall_s - before.wall_s
        self._was_disturbed = False
        self._shapes[record.step] = BatchPlan(
            micro_batch_size=record.micro_batch_size,
            accumulation_steps=record.micro_steps(self._world_size),
            world_size=self._world_size,
        )
        self._shapes.pop(record.step - 3, None)  # the outcome of a step is read at most two steps later

    def disturbed(self) -> None:
        """Note that something else than training took time: the step under way is not timed."""
        self._was_disturbed = True

    @property
    def interval_s(self) -> float | None:
        """Seconds that this replica took for the step before the one begun last; None where it was disturbed."""
        return self._interval_s

    def interval_of(self, record: StepRecord) -> float | None:
        """Return the seconds of `record`'s step where they are known yet."""
        return self._interval_s if self._latest is not None and self._latest.step == record.step + 1 else None

    def learn(self, record: StepRecord, outcome: StepOutcome) -> None:
        """Take from a step's outcome how long the step before it took on all replicas."""
        shape = self._shapes.get(record.step - 1)
        if outcome.step_s is not None and shape is not None:
            self._times = self._times.timed(shape, outcome.step_s)
            self._num_learned += 1
            is_due = self._num_learned % _EVERY == 0 or self._times.has_just_settled
            self._is_stale = self._is_stale or is_due or self._model is None

    @property
    def model(self) -> StepTimeModel | None:
        """What was learned, as a model of the time of any step; fitted only when it is asked for."""
        if self._is_stale:
            self._model = self._times.model()
            self._is_stale = False
        return self._model

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must hold."""
        return {"times": asdict(self._times), "num_learned": self._num_learned, "model": _as_json(self.model)}

    def restore(self, record: Mapping[str, Any]) -> None:
        """Go on from a `state`."""
        self._times = StepTimes.from_json(record["times"])
        self._num_learned = record["num_learned"]
        self._model = None if record["model"] is None else StepTimeModel.from_json(record["model"])
        self._is_stale = False


def _as_json(model: StepTimeModel | None) -> dict[str, Any] | None:
    return None if model is None else asdict(model)
