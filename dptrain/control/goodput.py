"""The default law: the batch with the most progress per second, by the measured noise scale and step times."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from dptrain.control.base import Measurement
from dptrain.control.noise_law import ProgressLaw
from dptrain.control.progress_rate import MEASURED, CriticalRatio, Gain
from dptrain.control.step_time_model import StepTimeModel

_OPTIMISM = 1.5
"""Standard deviations of the step time by which a batch whose time is not known is taken to be faster. Tuned on: the
runs of `tests/control/simulated/simulation.py`; 1 stays too small at 300 ms per step, 2 turns back more often."""


@dataclass(frozen=True, kw_only=True)
class GoodputLaw(ProgressLaw):
    """The batch of the grid with the greatest E[ln b − ln(b + κφ) − ln T(b)]: throughput × efficiency.

    As the batch grows the micro-batch rises first, up to the largest, and then the accumulation steps do: a
    device that is not full takes more samples for little. How long a batch takes that was never run is a guess from
    the model, and one try of a few steps settles it. So a neighbour whose time is not known is judged by an optimistic
    one, and while one batch alone was timed, another one is.

    Attributes:
        largest_micro_batch_size: in samples.
        least_accumulation_steps: micro-batches of a replica in a step, however small the batch.
        critical_ratio: prior of κ.
    """

    largest_micro_batch_size: int
    least_accumulation_steps: int = 1
    critical_ratio: CriticalRatio = MEASURED

    def layout(self, batch: float, world_size: int) -> tuple[float, float]:
        """Return micro-batch size and accumulation steps of a global batch, which may lie between those that run."""
        share = batch / world_size
        accumulation_steps = max(share / self.largest_micro_batch_size, self.least_accumulation_steps)
        return share / accumulation_steps, accumulation_steps

    def log_cost(self, present: float, other: int, measurement: Measurement) -> tuple[float, float]:
        """Return mean and variance of ln T(other) − ln T(present)."""
        model = _model(measurement)
        return model.log_ratio(self.layout(other, model.world_size), self.layout(present, model.world_size))

    def unmeasured(self, present: int, measurement: Measurement) -> str | None:
        """Return that the present batch was not timed yet."""
        model = measurement.step_time
        is_timed = model is not None and present in model.timed_batches
        return None if is_timed else f"step time of {present} not measured yet"

    def exploration(self, gains: Mapping[int, Gain], measurement: Measurement) -> tuple[int, str] | None:
        """Return a neighbour that was not timed lately, where it may well be faster or nothing else was timed."""
        present, model = measurement.global_batch_size, _model(measurement)
        # By age and not by deviation: where times scatter no number of tries would bring that down.
        near = (g for b, g in gains.items() if b not in model.recent_batches and present / 2 <= b <= 2 * present)
        best = max(near, key=_hoped, default=None)
        if best is None or (model.is_split_known and _hoped(best) <= self.min_gain):
            return None
        why = f"only {present} was timed so far"
        if _hoped(best) > self.min_gain:
            when = "lately" if best.global_batch_size in model.timed_batches else "yet"
            why = f"its step time was not measured {when}, up to {math.expm1(_hoped(best)):+.0%} progress per second"
        return best.global_batch_size, f"timing {best.global_batch_size}: {why}"


def _hoped(found: Gain) -> float:
    return found.mean - found.noise_sd + _OPTIMISM * found.time_sd


def _model(measurement: Measurement) -> StepTimeModel:
    assert measurement.step_time is not None, "asked before a step was timed"
    return measurement.step_time
