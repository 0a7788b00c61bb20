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
    one, and while one batch alone was timed, another one is. What accumulation costs is not known before it is run:
    the first batch that needs it is tried where it would gain if a further micro-batch cost its samples alone.

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
        near = {b for b in gains if b not in model.recent_batches and present / 2 <= b <= 2 * present}
        # Accumulation grows with the batch: two tell whether all have the same. On a fine grid thousands are timed.
        timed = {self.layout(f(model.timed_batches), model.world_size)[1] for f in (min, max) if model.is_split_known}
        only = timed.pop() if len(timed) == 1 else math.inf
        hoped, batch = max(((self._hoped(gains[b], model, only), b) for b in near), default=(-math.inf, present))
        if hoped > self.min_gain:
            why = f"not measured {'lately' if batch in model.timed_batches else 'yet'}"
            return batch, f"timing {batch}: its step time was {why}, up to {math.expm1(hoped):+.0%} progress per second"
        if batch == present or model.is_split_known:
            return None
        return batch, f"timing {batch}: only {present} was timed so far"

    def _hoped(self, found: Gain, model: StepTimeModel, only: float) -> float:
        """Return the gain by a step time that is as short as may well be; `only`: accumulation of all timed batches."""
        optimism = _OPTIMISM * found.time_sd
        other = self.layout(found.global_batch_size, model.world_size)
        if other[1] > only:
            # Of steps with equally many micro-batches no time says what one costs: at best its samples alone.
            optimism = max(optimism, model.log_ratio(other, (other[0] * other[1] / only, only))[0])
        return found.mean - found.noise_sd + optimism


def _model(measurement: Measurement) -> StepTimeModel:
    assert measurement.step_time is not None, "asked before a step was timed"
    return measurement.step_time
