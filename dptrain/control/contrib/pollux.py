"""The goodput law with Pollux' model of a step, in which the all-reduce overlaps the last pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dptrain.control.goodput import GoodputLaw
from dptrain.control.step_time import StepTimeModel
from dptrain.errors import ConfigError

_MOST_OVERLAP = 10.0


@dataclass(frozen=True, kw_only=True)
class PolluxLaw(GoodputLaw):
    """B with the most throughput × efficiency, with T = (a − 1)·T_grad + (T_grad^γ + T_sync^γ)^{1/γ}.

    Pollux (Qiao et al. 2021, OSDI, section 3.2): a passes of T_grad each, and a synchronisation of T_sync that the
    last one hides wholly (γ → ∞) or not at all (γ = 1). T_grad is the fitted pass time, and T_sync what makes T
    right at the present batch. The times of whole steps do not tell γ and T_sync apart (Pollux, which fits γ, times the
    two parts separately), so γ is a setting. The efficiency, (φ + B0)/(φ + B), is that of `GoodputLaw` at κ = 1, where
    with γ = 1 the two laws are one. Pollux' scheduler (how many replicas a job gets) is no part of this; its rule never
    to go below the first batch is `smallest` of the limits.

    Attributes:
        overlap: γ, from 1 to 10, which is as good as infinite. The default is arbitrary: half-way, in effect.
    """

    overlap: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.overlap <= _MOST_OVERLAP:
            raise ConfigError(f"overlap (Pollux' γ) must lie between 1 and {_MOST_OVERLAP:g}, got {self.overlap}")

    def step_time(self, model: StepTimeModel, *, present: float) -> Callable[[float], float]:
        """Return Pollux' time of a step against its global batch."""
        gamma = self.overlap
        pass_s = model.pass_s(self.layout(model, present)["micro_batch_size"])
        # In shares of the present pass, whose powers neither vanish nor overflow.
        sync = ((1 + model.per_step_s / pass_s) ** gamma - 1) ** (1 / gamma) if pass_s > 0 else 0.0

        def seconds(batch: float) -> float:
            layout = self.layout(model, batch)
            grad = model.pass_s(layout["micro_batch_size"]) / pass_s
            return (layout["accumulation_steps"] - 1) * grad + float((grad**gamma + sync**gamma) ** (1 / gamma))

        return seconds if pass_s > 0 else lambda _batch: 1.0
