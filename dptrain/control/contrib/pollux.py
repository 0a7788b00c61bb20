"""The goodput law with Pollux' model of a step, in which the all-reduce overlaps the last forward–backward."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dptrain.control.base import Measurement
from dptrain.control.goodput import GoodputLaw
from dptrain.errors import ConfigError

_MOST_OVERLAP = 10.0


@dataclass(frozen=True, kw_only=True)
class PolluxLaw(GoodputLaw):
    """The batch with the most throughput × efficiency, with T = (a − 1)·T_grad + (T_grad^γ + T_sync^γ)^{1/γ}.

    Pollux (Qiao et al. 2021, OSDI, section 3.2): a micro-batches of T_grad each, and a synchronisation of T_sync that
    the last one hides wholly (γ → ∞) or not at all (γ = 1). T_grad is the fitted time of a micro-batch, and T_sync
    what makes T right at the present batch. The times of whole steps do not tell γ and T_sync apart (Pollux, which
    fits γ, times the two parts separately), so γ is a setting. With γ = 1 the law is `GoodputLaw`. Pollux' scheduler
    (how many replicas a job gets) is no part of this; its rule never to go below the first batch is `smallest` of the
    bounds.

    Attributes:
        overlap: γ, from 1 to 10, which is as good as infinite. The default is arbitrary: half-way, in effect.
    """

    overlap: float = 2.0

    def __post_init__(self) -> None:
        if not 1 <= self.overlap <= _MOST_OVERLAP:
            raise ConfigError(f"overlap (Pollux' γ) must lie between 1 and {_MOST_OVERLAP:g}, got {self.overlap}")

    def log_cost(self, present: float, other: int, measurement: Measurement) -> tuple[float, float]:
        """Return mean and variance of ln T(other) − ln T(present); the variance is that without overlap."""
        variance = super().log_cost(present, other, measurement)[1]
        model, gamma = measurement.step_time, self.overlap
        assert model is not None, "asked before a step was timed"
        pass_s = model.micro_batch_s(self.layout(present, model.world_size)[0])
        # In shares of the present micro-batch, whose powers neither vanish nor overflow.
        sync = ((1 + model.per_step_s / pass_s) ** gamma - 1) ** (1 / gamma)

        def seconds(batch: float) -> float:
            micro_batch_size, accumulation_steps = self.layout(batch, model.world_size)
            grad = model.micro_batch_s(micro_batch_size) / pass_s
            return (accumulation_steps - 1) * grad + float((grad**gamma + sync**gamma) ** (1 / gamma))

        return math.log(seconds(other) / seconds(present)), variance
