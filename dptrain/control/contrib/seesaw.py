"""The law that doubles the batch where a schedule would halve the learning rate, and the rate that goes with it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dptrain.control.base import Decision, Law, Measurement
from dptrain.control.learning_rate import LearningRateSchedule
from dptrain.errors import ConfigError

_MOST_HALVINGS = 40
"""A rate of 0 would have been halved without end."""


@dataclass(frozen=True, kw_only=True)
class StaircaseSchedule:
    """A falling schedule as a staircase of halvings: 1, ½, ¼, … from where the schedule itself is down to each.

    The warm-up is the schedule's. The staircase is the base rate of a Seesaw run, and the rate rule multiplies it by
    its factor for the batch as usual: with `square_root` the rate falls by √2 at each doubling of the batch (Adam),
    with `linear` it stays (SGD; Smith et al. 2018, arXiv 1711.00489). Where the batch cannot be doubled any more, or
    not yet, the rate falls by the whole half: nothing acts twice, and nothing is lost.

    Attributes:
        schedule: that would halve the rate.
    """

    schedule: LearningRateSchedule

    def halvings(self, samples_seen: float) -> int:
        """Return how often the schedule has halved the rate since its height, by this position."""
        if samples_seen < self.schedule.warmup_samples:
            return 0
        share = self.schedule.factor(samples_seen)
        # The added part in 1e9 is rounding: a schedule that is down to the half there is down to it.
        return min(math.floor(-math.log2(share) + 1e-9), _MOST_HALVINGS) if share > 0 else _MOST_HALVINGS

    def factor(self, samples_seen: float) -> float:
        """Return the factor on the base rate, in place of `LearningRateSchedule.factor`."""
        warming_up = samples_seen < self.schedule.warmup_samples
        return self.schedule.factor(samples_seen) if warming_up else 0.5 ** self.halvings(samples_seen)


@dataclass(frozen=True, kw_only=True)
class SeesawLaw(Law):
    """Doubles the batch where the schedule would halve the rate (Seesaw; Meterez et al. 2025, arXiv 2510.14717).

    The rate falls by √2 there instead, which `StaircaseSchedule` and the rate rule `square_root` make together: they
    must be used with this law, in place of the schedule itself. It assumes Adam, a gradient that is mostly noise, and a
    first batch that is not above the critical one; it measures nothing. The run takes fewer steps over equal samples.

    Attributes:
        staircase: of the run.
        first: batch up to the first halving, in samples.
    """

    staircase: StaircaseSchedule
    first: int

    def __post_init__(self) -> None:
        if self.first < 1:
            raise ConfigError(f"the first batch must be at least 1 sample, got {self.first}")
        if self.staircase.schedule.kind == "constant":
            raise ConfigError(
                "Seesaw doubles the batch where a schedule halves the learning rate: choose one that falls"
            )

    def decide(self, measurement: Measurement) -> Decision:
        """Ask for the batch of the present stair."""
        halvings = self.staircase.halvings(measurement.samples_seen)
        batch = self.first * 2**halvings
        return Decision(
            global_batch_size=batch,
            reason=f"{halvings} halvings of the scheduled learning rate: batch {self.first} × 2^{halvings} = {batch}",
        )
