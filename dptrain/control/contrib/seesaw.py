"""The law that doubles the batch where a schedule would halve the learning rate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dptrain.control.base import Decision, Law, Measurement
from dptrain.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class SeesawLaw(Law):
    """Doubles the batch where the schedule would halve the rate (Seesaw; Meterez et al. 2025, arXiv 2510.14717).

    The rate falls by √2 there instead, which the same halvings as a staircase and the rate rule `square_root` make
    together: they must be used with this law, in place of the schedule itself. It assumes Adam, a gradient that is
    mostly noise, and a first batch that is not above the critical one; it measures nothing. The run takes fewer steps
    over equal samples.

    Attributes:
        halvings: how often the schedule has halved the rate by a position in samples.
        first: batch up to the first halving, in samples.
    """

    halvings: Callable[[float], int]
    first: int

    def __post_init__(self) -> None:
        if self.first < 1:
            raise ConfigError(f"the first batch must be at least 1 sample, got {self.first}")

    def decide(self, measurement: Measurement) -> Decision:
        """Ask for the batch of the present stair."""
        halvings = self.halvings(measurement.samples_seen)
        batch = self.first * 2**halvings
        return Decision(
            global_batch_size=batch,
            reason=f"{halvings} halvings of the scheduled learning rate: batch {self.first} × 2^{halvings} = {batch}",
        )
