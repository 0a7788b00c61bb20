"""The laws that follow the measured noise scale: the mechanism, and its maps from noise scale to batch."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass

from dptrain.control.base import Decision, Law, Measurement
from dptrain.errors import ConfigError

_LARGEST = 1e60
"""Stands for an infinite noise scale, of which only |G|² speaks, and whose square is finite."""
_ROUNDED = 1 + 1e-6
"""Some laws find a batch to nine digits: the ends of an interval without width may come out turned round."""


@dataclass(frozen=True, kw_only=True)
class IntervalLaw(Law):
    """Acts on the interval of the noise scale φ, never on its point estimate.

    The contrast tr(Σ) − φ·|G|² at the φ that the present batch is right for is known long before the ratio is.
    Within `z` standard errors of 0 it leaves the batch alone; beyond, the batch moves onto the interval of the
    batches that the contrast does not reject: up to its lower end, or down to its upper end. Where the interval is
    open above, the law asks for the double at least: |G|² drowns in noise there, a larger batch measures it
    better, and moving to the end alone stays 2–4 times too small for hundreds of steps. Compared with the point
    estimate in docs/decisions/0002-act-on-the-interval.md.

    Attributes:
        z: standard errors of a normal at which a noise scale counts as rejected.
    """

    z: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.z < math.inf:
            raise ConfigError(f"z must be a positive number of standard errors, such as 1, got {self.z}")

    @abstractmethod
    def batch_for(self, noise_scale: float) -> float:
        """Return the batch that `noise_scale` asks for; rises with it, both in samples."""

    @abstractmethod
    def noise_scale_for(self, batch: float) -> float:
        """Return the noise scale that `batch` is right for: the inverse of `batch_for`."""

    def decide(self, measurement: Measurement) -> Decision:
        """Project the batch in force onto what the measurement allows."""
        batch, phi = measurement.global_batch_size, measurement.noise_scale
        right = self.noise_scale_for(batch)
        sureness = phi.contrast(min(right, _LARGEST))
        lower, upper = phi.bounds(self.z)
        asked, known, verb = float(batch), _between(lower, upper), "keep"
        # Written so that NaN, from a measurement that is out of order, moves nothing. What a noise scale asks for may
        # be dear to find, so it is not asked where nothing moves.
        if sureness > self.z:
            smallest, largest = self.batch_for(lower), self.batch_for(upper)
            if smallest <= largest * _ROUNDED:
                asked = asked if math.isfinite(largest) else 2.0 * batch
                asked = max(asked, smallest) if math.isfinite(smallest) else asked
                known, verb = f"above {max(lower, right):.3g}", "grow to"
        elif sureness < -self.z and self.batch_for(lower) / _ROUNDED <= (largest := self.batch_for(upper)) < batch:
            # The estimate of φ may be 0; a batch has at least one sample.
            asked = max(largest, 1.0)
            known, verb = f"below {upper:.3g}", "shrink to"
        reason = f"noise scale is {known}, the batch of {batch} is right for {right:.3g} (z = {sureness:+.1f})"
        return Decision(global_batch_size=asked, reason=f"{reason}: {verb} {asked:.4g}")


@dataclass(frozen=True, kw_only=True)
class NoiseLaw(IntervalLaw):
    """B = κ·φ: the batch in a fixed proportion to the noise scale.

    At κ = 1 a step makes half the progress of a noiseless one, and so does a sample (McCandlish et al. 2018,
    arXiv 1812.06162, section 2.2).

    Attributes:
        ratio: κ, batch over noise scale.
    """

    ratio: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.ratio < math.inf:
            raise ConfigError(f"ratio (batch over noise scale) must be positive, got {self.ratio}")

    def batch_for(self, noise_scale: float) -> float:
        """Return κ·φ."""
        return self.ratio * noise_scale

    def noise_scale_for(self, batch: float) -> float:
        """Return B/κ."""
        return batch / self.ratio


@dataclass(frozen=True, kw_only=True)
class ExchangeRateLaw(IntervalLaw):
    """B = √(r·φ): the schedule that is best where one step may cost r samples.

    It minimises steps·r + samples (McCandlish et al. 2018, appendix D). On fixed hardware with step time α + βB
    the rate is r = α/β, and the law makes the progress per second greatest.

    Attributes:
        samples_per_step: r, the samples that one step fewer is worth.
    """

    samples_per_step: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.samples_per_step < math.inf:
            raise ConfigError(f"samples_per_step must be positive, got {self.samples_per_step}")

    def batch_for(self, noise_scale: float) -> float:
        """Return √(r·φ)."""
        return math.sqrt(self.samples_per_step) * math.sqrt(noise_scale)

    def noise_scale_for(self, batch: float) -> float:
        """Return B²/r."""
        return batch * batch / self.samples_per_step


def _between(lower: float, upper: float) -> str:
    if math.isfinite(upper):
        return f"between {lower:.3g} and {upper:.3g}"
    return f"above {lower:.3g}" if lower > 0 else "not known yet"
