"""What the laws that follow the noise scale share, and the law that holds the batch in a fixed relation to it."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from dptrain.control.base import Controller, Decision, Measurement, State
from dptrain.control.progress_rate import EXACTLY_1, CriticalRatio, Gain, gain, quantiles

_Z = 1.0
"""Standard deviations of the lower confidence bound. Tuned on: the six cases of decision 2, where 1.5 arrives 1.6 times
later at a batch drowned in noise, and 0.5 turns back twice as often."""


@dataclass(frozen=True, kw_only=True)
class SinceChange(State):
    """Since when a batch is in force.

    Attributes:
        global_batch_size: in force at the latest decision; None before the first.
        num_steps: measured steps of the run at the first decision with it.
    """

    global_batch_size: int | None = None
    num_steps: int = 0


@dataclass(frozen=True, kw_only=True)
class ProgressLaw(Controller):
    """Moves to the batch of the grid that makes the most progress per unit of cost, where that is sure enough.

    A law says what a step costs (`log_cost`); the engine weighs that against the progress of a step, b/(b + κφ), over
    the posteriors of φ and κ (`progress_rate`). The batch moves where the lower confidence bound of a gain is above
    `min_gain`. Where φ is open above, |G|² drowns in noise and a larger batch measures it better: twice the batch is
    tried where its expected gain is above `min_gain` (docs/decisions/0002-act-on-the-interval.md).

    Attributes:
        min_gain: least gain worth a change, in nats of progress per unit of cost: 0.02 is 2 %. Tuned on: the runs of
            `tests/control/simulated/simulation.py`, which 0.01 and 0.04 leave within 0.3 %.
        no_decrease_samples: from the start of the run, in which the batch only grows: a model in warm-up hardly moves,
            and its noise scale is small for that reason.
        cool_down: measurements at a batch before the next change: a step is left out, three make a median, and one is
            under way.
        critical_ratio: prior of κ, critical batch size over noise scale; exactly 1 where a law is defined by φ itself.
    """

    min_gain: float = 0.02
    no_decrease_samples: int = 0
    cool_down: int = 5
    critical_ratio: CriticalRatio = EXACTLY_1
    memory: ClassVar[type[State]] = SinceChange

    @abstractmethod
    def log_cost(self, present: float, other: int, measurement: Measurement) -> tuple[float, float]:
        """Return mean and variance of ln cost(other) − ln cost(present) of a step."""

    def unmeasured(self, present: int, measurement: Measurement) -> str | None:  # noqa: ARG002
        """Return what the law must know and does not yet; None where all is known."""
        return None

    def exploration(self, gains: Mapping[int, Gain], measurement: Measurement) -> tuple[int, str] | None:  # noqa: ARG002
        """Return a batch to try for what it would tell, and why in words; None where nothing is worth it."""
        return None

    def update(self, state: State, measurement: Measurement) -> tuple[SinceChange, Decision]:
        """Decide, unless the batch in force is too new to be judged."""
        assert isinstance(state, SinceChange), f"{type(self).__name__} was given a {type(state).__name__}"
        present, measured = measurement.global_batch_size, measurement.noise_scale.num_steps
        if state.global_batch_size != present:
            since = 0 if state.global_batch_size is None else measured
            state = replace(state, global_batch_size=present, num_steps=since)
        if (passed := measured - state.num_steps) < self.cool_down:
            return state, keep(present, f"cool-down: {passed} of {self.cool_down} measurements since the last change")
        return state, self.decide(measurement)

    def decide(self, measurement: Measurement) -> Decision:
        """Return the batch that the measurement asks for, without memory."""
        present, phi = measurement.global_batch_size, measurement.noise_scale
        lower, upper = phi.bounds(_Z)
        if not (0 < lower < math.inf or upper < math.inf):
            return keep(present, f"noise scale {phi}")
        if missing := self.unmeasured(present, measurement):
            return keep(present, missing)
        if gains := self.gains(measurement):
            batch, why = self._best(gains, measurement)
            kept = "kept: " if batch == present else ""
            return Decision(global_batch_size=batch, reason=f"{kept}noise scale {phi}; {why}")
        if measurement.samples_seen < self.no_decrease_samples:
            return keep(present, f"no decrease during warm-up ({self.no_decrease_samples:,} samples)")
        return keep(present, "no other batch runs")

    def _best(self, gains: Mapping[int, Gain], measurement: Measurement) -> tuple[int, str]:
        """Return the batch, and why in words."""
        present = measurement.global_batch_size
        surest = max(gains.values(), key=lambda each: each.lower(_Z))
        if surest.lower(_Z) > self.min_gain:
            return surest.global_batch_size, str(surest)
        double = gains.get(2 * present)
        is_open = math.isinf(measurement.noise_scale.bounds(_Z)[1])
        if is_open and double is not None and double.mean > self.min_gain:
            return double.global_batch_size, f"no upper bound yet; {double} expected"
        if tried := self.exploration(gains, measurement):
            return tried
        best = max(gains.values(), key=lambda each: each.mean)
        return present, f"{best} at best"

    def gains(self, measurement: Measurement) -> dict[int, Gain]:
        """Return what each other batch that one decision may move to gains."""
        assert measurement.grid is not None, "the law compares the batches that run: wrap it in `OnGrid`"
        present, phis = measurement.global_batch_size, quantiles(measurement.noise_scale)
        lowest = present if measurement.samples_seen < self.no_decrease_samples else 0
        return {
            other: gain(
                present=present,
                other=other,
                noise_scales=phis,
                critical_ratio=self.critical_ratio,
                time=self.log_cost(present, other, measurement),
            )
            for other in measurement.grid.candidates(present)
            if other != present and other > lowest
        }


def keep(batch: int, why: str) -> Decision:
    """Return the decision to stay at a batch."""
    return Decision(global_batch_size=batch, reason=f"kept: {why}")


@dataclass(frozen=True, kw_only=True)
class NoiseLaw(ProgressLaw):
    """B = ratio · φ, or B = √(r · φ) with r samples per step.

    Three criteria of the literature are settings of it:
    1. ratio 1: a step makes half the progress of a noiseless one, and so does a sample (McCandlish et al. 2018,
       arXiv 1812.06162, section 2.2).
    2. ratio 1/η²: the smallest batch that passes the norm test E‖g_B − G‖² ≤ η²·|G|² (Byrd et al. 2012, Mathematical
       Programming 134; Lau et al. 2024, arXiv 2412.21124).
    3. samples_per_step r: minimises steps · r + samples (McCandlish et al. 2018, appendix D).

    In the terms of `ProgressLaw` a step costs b^(1/(1 + ratio)), or r + b: the costs whose best batch is that one. The
    law acts on the grid, so the batch is the grid point nearest in log space.

    Attributes:
        ratio: batch over noise scale.
        samples_per_step: r, the samples that one optimizer step fewer is worth; None to go by the ratio.
    """

    ratio: float = 1.0
    samples_per_step: float | None = None

    def log_cost(self, present: float, other: int, measurement: Measurement) -> tuple[float, float]:  # noqa: ARG002
        """Return ln cost(other) − ln cost(present), which is exact."""
        if self.samples_per_step is not None:
            return math.log((self.samples_per_step + other) / (self.samples_per_step + present)), 0.0
        return math.log(other / present) / (1 + self.ratio), 0.0
