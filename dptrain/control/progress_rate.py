"""The expected log progress per second of a batch, over noise scale, step time and the prior of the critical ratio.

A batch b makes progress in proportion to b/(b + κφ) per step (McCandlish et al. 2018, arXiv 1812.06162, equation 2.7;
Pollux, Qiao et al. 2021, OSDI, equation 5, both with κ = 1), so per second the logarithm is ln b − ln(b + κφ) − ln
T(b). Only differences between two batches are formed: they stay finite where φ is 0 or open above.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

from dptrain.noise import NoiseScale

_PAIRS = 5
_Z = tuple(NormalDist().inv_cdf(1 - (i + 0.5) / (2 * _PAIRS)) for i in range(_PAIRS))
"""Standard errors of ten values of φ of equal probability. The moments of a logarithm that lies between 0 and
the log of the ratio of the two batches change by less than 0.01 with twice as many."""


@dataclass(frozen=True, kw_only=True)
class CriticalRatio:
    """A log-normal prior of κ, critical batch size over noise scale."""

    median: float = 1.0
    """That of the theory (McCandlish et al. 2018, section 2.3). `benchmarks.prediction` has 0.93 (early target) and
    0.98 (late target) in the median of its Adam tasks."""
    spread: float = 2.0
    """Factor of one standard deviation, at least 1. Tuned on: the rms of 0.38 decades (a factor of 2.4) over the twelve
    tasks of `benchmarks.prediction`, 0.22 decades (1.7) over the trained ones. Published tasks scatter by 6."""

    @property
    def nodes(self) -> tuple[tuple[float, float], ...]:
        """Pairs (κ, weight) of the Gauss–Hermite rule with three points in log κ: exact for polynomials up to x⁵."""
        step = self.spread ** math.sqrt(3)
        return ((self.median / step, 1 / 6), (self.median, 2 / 3), (self.median * step, 1 / 6))


MEASURED, EXACTLY_1 = CriticalRatio(), CriticalRatio(spread=1.0)


@dataclass(frozen=True, kw_only=True)
class Gain:
    """Of moving from the present batch to another: expected log progress per second.

    Attributes:
        global_batch_size: the other batch.
        mean: expected difference, in nats; 0.7 is twice the progress per second.
        noise_sd: standard deviation because of φ.
        time_sd: standard deviation because of the step time.
    """

    global_batch_size: int
    mean: float
    noise_sd: float
    time_sd: float

    def lower(self, z: float) -> float:
        """Return the lower confidence bound at `z` standard deviations."""
        return self.mean - z * math.hypot(self.noise_sd, self.time_sd)

    def __str__(self) -> str:
        sd = math.hypot(self.noise_sd, self.time_sd)
        return f"{self.global_batch_size}: {math.expm1(self.mean):+.0%} ±{sd:.0%} progress per second"


@lru_cache(maxsize=8)
def quantiles(noise_scale: NoiseScale) -> tuple[float, ...]:
    """Return ten values of φ of equal probability by its confidence distribution; some may be 0, some infinite.

    Law and learning-rate rule ask for the same ones in each step, so the latest are remembered.
    """
    return tuple(end for z in _Z for end in noise_scale.bounds(z))


def gain(
    *,
    present: float,
    other: int,
    noise_scales: tuple[float, ...],
    critical_ratio: CriticalRatio,
    time: tuple[float, float],
) -> Gain:
    """Return what `other` gains over `present`.

    The spread of κ enters the mean and not the deviation: nothing that a run measures narrows it, so waiting for it
    would be for ever.

    Args:
        present: batch in force, in samples.
        other: batch to compare with, in samples.
        noise_scales: values of φ of equal probability, in samples.
        critical_ratio: prior of κ.
        time: mean and variance of ln T(other) − ln T(present).
    """
    nodes = critical_ratio.nodes
    losses = [sum(w * _lost(present, other, kappa * phi) for kappa, w in nodes) for phi in noise_scales]
    mean_lost = math.fsum(losses) / len(losses)
    variance = math.fsum((lost - mean_lost) ** 2 for lost in losses) / len(losses)
    log_time, time_variance = time
    return Gain(
        global_batch_size=other,
        mean=math.log(other / present) - mean_lost - log_time,
        noise_sd=math.sqrt(variance),
        time_sd=math.sqrt(time_variance),
    )


def _lost(present: float, other: float, critical_batch: float) -> float:
    """Return ln(other + κφ) − ln(present + κφ), the efficiency that a larger batch gives away."""
    return 0.0 if math.isinf(critical_batch) else math.log((other + critical_batch) / (present + critical_batch))
