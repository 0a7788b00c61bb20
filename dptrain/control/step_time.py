"""The steps timed so far, shape by shape, as a record of bounded size; pure, so the clock is the caller's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from dptrain.batch import BatchPlan
from dptrain.control.step_time_model import ShapeTime, StepTimeModel, fit
from dptrain.errors import CheckpointError

_MOST_SHAPES = 32
_MOST_SECONDS = 31
_MOST_STRIDE = 8
"""Of the latest 248 steps of a shape every eighth is kept: on a machine that others load, too, neighbours are alike."""
_FEWEST_SECONDS = 3
"""Durations from which on a shape counts: the median of fewer may be a straggler."""
_SKIPPED_OF_A_PROCESS = 3
"""Steps left out at first: compilation, allocation, the wrapper's second layout of buckets."""
_SKIPPED_OF_A_CHANGE = 1
"""Steps left out when the shape changes, to one that is new as well."""
_SLOWEST_LEFT_OUT = 2
"""Durations that do not count for a shape's median: a shape that is new may be compiled and allocated over three steps,
and where a batch is soon left again all that is known of it are three durations."""
_HALF_LIFE_STEPS = 100
"""Steps in which the variance of a shape that is not run any more doubles: machines have slow spells, and a shape that
was timed in one alone would keep the batch from it for ever. Tuned on: the slow spells of the two-core machine of
`benchmarks.time_to_target`, some hundred steps long."""
_RECENT_STEPS = 2 * _HALF_LIFE_STEPS
"""Age up to which a shape counts as timed lately: there its variance is four times that of a fresh one."""
_MODEL_ERROR = 0.02
"""Relative error of a median that more steps do not average away, at the present batch and once more for each doubling
away from it: the line is not the machine, and a decision asks for the neighbours of the present batch. Tuned on: the
runs of `tests/control/simulated/simulation.py`, which 1 % leaves as they are and 5 % makes 1 % slower."""
_SD_OF_MEDIAN_DEVIATION = 1.48
_LEAST_NOISE = 0.01


@dataclass(frozen=True, kw_only=True)
class TimedShape:
    """What is remembered of one shape.

    Attributes:
        shape: which one.
        seconds: durations, oldest first, every `stride`-th of the latest.
        stride: 1, 2, 4 or 8; doubles each time that the durations have become too many.
        num_since: steps since the latest of the durations.
        latest: number of the latest step of it, counted over all shapes without those left out.
        to_skip: how many of its next steps are left out.
        predicted_s: what the model said before any step of it was timed; None where it could not say.
    """

    shape: BatchPlan
    seconds: tuple[float, ...] = ()
    stride: int = 1
    num_since: int = 0
    latest: int = 0
    to_skip: int = _SKIPPED_OF_A_PROCESS
    predicted_s: float | None = None

    def timed(self, seconds: float, *, latest: int) -> TimedShape:
        """Take in one more duration, of the step with the number `latest`."""
        if self.to_skip:
            return replace(self, to_skip=self.to_skip - 1, latest=latest)
        if self.num_since + 1 < self.stride:
            return replace(self, num_since=self.num_since + 1, latest=latest)
        kept, stride = (*self.seconds, seconds), self.stride
        if len(kept) > _MOST_SECONDS and stride < _MOST_STRIDE:
            kept, stride = kept[1::2], 2 * stride
        return replace(self, seconds=kept[-_MOST_SECONDS:], stride=stride, num_since=0, latest=latest)

    @property
    def median_s(self) -> float:
        """The median of its durations but for the slowest two."""
        return median(sorted(self.seconds)[:-_SLOWEST_LEFT_OUT])


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """The steps timed so far, as a record of bounded size: `asdict` writes it, `from_json` reads it.

    Stragglers do not move it, for it goes by the median of each shape. The first steps of the process are left out, and
    the first after each change.

    Attributes:
        shapes: what was timed, the present one last.
        num_steps: steps taken in so far, without those left out.
    """

    shapes: tuple[TimedShape, ...] = ()
    num_steps: int = 0

    def timed(self, shape: BatchPlan, seconds: float) -> StepTimes:
        """Take in one measured step.

        Args:
            shape: of the step.
            seconds: its duration, the same number on all ranks; left out where it is not positive and finite.
        """
        if not 0 < seconds < math.inf:
            return self
        known = next((entry for entry in self.shapes if entry.shape == shape), None)
        if known is None:
            to_skip = _SKIPPED_OF_A_CHANGE if self.shapes else _SKIPPED_OF_A_PROCESS
            model = self._model(shape.world_size)
            predicted_s = model.seconds(shape) if model is not None and model.is_split_known else None
            known = TimedShape(shape=shape, predicted_s=predicted_s, to_skip=to_skip)
        elif known is not self.shapes[-1]:
            known = replace(known, to_skip=max(known.to_skip, _SKIPPED_OF_A_CHANGE))
        others = (entry for entry in self.shapes if entry.shape != shape)
        num_steps = self.num_steps + (known.to_skip == 0)
        after = known.timed(seconds, latest=num_steps)
        return StepTimes(shapes=(*others, after)[-_MOST_SHAPES:], num_steps=num_steps)

    @property
    def has_just_settled(self) -> bool:
        """Whether the present shape counts from the latest step on."""
        return bool(self.shapes) and len(self.shapes[-1].seconds) == _FEWEST_SECONDS

    def model(self) -> StepTimeModel | None:
        """Return what the steps on the present number of replicas say; None before a shape has settled."""
        return self._model(self.shapes[-1].shape.world_size) if self.shapes else None

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> StepTimes:
        """Return what `asdict` wrote, for a new process: to it all shapes are new again.

        Raises:
            CheckpointError: where the record is not one.
        """
        try:
            shapes = [
                replace(
                    TimedShape(**entry),
                    shape=BatchPlan(**entry["shape"]),
                    seconds=tuple(map(float, entry["seconds"])),
                    num_since=0,
                    to_skip=_SKIPPED_OF_A_PROCESS,
                )
                for entry in record["shapes"]
            ]
            return cls(shapes=tuple(shapes), num_steps=int(record["num_steps"]))
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"not a record of step times: {error!r} is missing or wrong") from error

    def _model(self, world_size: int) -> StepTimeModel | None:
        present = (entry for entry in self.shapes if entry.shape.world_size == world_size)
        settled = [entry for entry in present if len(entry.seconds) >= _FEWEST_SECONDS]
        if not settled:
            return None
        errors = [abs(entry.predicted_s / entry.median_s - 1) for entry in settled if entry.predicted_s is not None]
        deviations = [abs(second / entry.median_s - 1) for entry in settled for second in entry.seconds]
        noise = max(_SD_OF_MEDIAN_DEVIATION * median(deviations), _LEAST_NOISE)
        times = []
        for entry in settled:
            age = settled[-1].latest - entry.latest
            doublings = math.log2(entry.shape.global_batch_size / settled[-1].shape.global_batch_size)
            variance = math.pi / 2 * noise**2 / len(entry.seconds)  # π/2: of a median
            variance += _MODEL_ERROR**2 * (1 + doublings**2)
            variance *= 2.0 ** (age / _HALF_LIFE_STEPS)
            is_recent = age <= _RECENT_STEPS
            times.append(ShapeTime(shape=entry.shape, seconds=entry.median_s, variance=variance, is_recent=is_recent))
        return fit(times, error=median(errors) if errors else None)
