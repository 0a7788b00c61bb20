"""Steps to a target that are known exactly, for problems on paper; nothing here is trained or fitted.

A run of optimizer steps on a problem whose noise scale φ is known advances each time by 1/(1 + φ/B) of what a step
without noise does. Summed up, that gives the frontier of steps against samples, McCandlish et al. 2018 (arXiv
1812.06162), appendix D; the sums below are of whole steps, and the last one counts in part.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

Schedule = Callable[[float], float]
"""Noise scale → global batch, both in samples."""


@dataclass(frozen=True, kw_only=True)
class Course:
    """A run on paper, step by step.

    Attributes:
        num_steps: to the target; the last one counts in part.
        noise_scales: before each step, shape (steps,).
        batch_sizes: of each step, shape (steps,).
    """

    num_steps: float
    noise_scales: NDArray[np.float64]
    batch_sizes: NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class DampedQuadratic:
    """An isotropic quadratic whose squared distance u from the minimum falls by (2a − a²)/(1 + φ/B) a step, φ = K/u.

    That is the exact mean of SGD at the learning rate a/(1 + φ/B) over the curvature. As a → 0 the frontier is a
    hyperbola; at a = 1, the greedy rate, 1/u grows by B/K whatever the batch is, and there is none.

    Attributes:
        damping: a, in (0, 1].
        noise: K, the noise scale at u = 1, in samples.
        start: u at the start.
        target: u at the end, below `start`.
    """

    damping: float = 0.001
    noise: float = 5.0
    start: float = 1.0
    target: float = 0.01

    @property
    def min_steps(self) -> float:
        """S_min, the steps without noise; 0 at the greedy rate, which needs no more than a part of one."""
        return math.log(self.start / self.target) / -math.log1p(-self._rate) if self.damping < 1 else 0.0

    @property
    def critical_batch_size(self) -> float:
        """B_crit = K·(1/u_T − 1/u₀)/ln(u₀/u_T), as a → 0."""
        return self.noise * (1 / self.target - 1 / self.start) / math.log(self.start / self.target)

    @property
    def gamma(self) -> float:
        """Product of the relative excesses of an adaptive batch, 4·tanh(ln R/4)/ln R with R = u₀/u_T, as a → 0."""
        log_ratio = math.log(self.start / self.target)
        return 4 * math.tanh(log_ratio / 4) / log_ratio

    @property
    def _rate(self) -> float:
        return self.damping * (2 - self.damping)

    def run(self, batch: Schedule) -> Course:
        """Take steps until u is at the target; inside the last one u falls exponentially."""
        u, scales, batches = self.start, [], []
        while True:
            scale = self.noise / u
            size = batch(scale)
            scales.append(scale)
            batches.append(size)
            after = u * (1 - self._rate / (1 + scale / size))
            if after <= self.target:
                part = math.log(u / self.target) / math.log(u / after)
                return _course(len(scales) - 1 + part, scales, batches)
            u = after


@dataclass(frozen=True, kw_only=True)
class NoiseCourse:
    """A problem of which only the noise scale along the way is given: φ at each part x of the progress.

    Attributes:
        noise_scale: x in [0, 1] → φ in samples, at its largest some 1.
        mean: ∫φ dx.
        gamma: (∫√φ dx)²/∫φ dx, the product of the relative excesses of an adaptive batch.
    """

    noise_scale: Callable[[float], float]
    mean: float
    gamma: float

    def run(self, batch: Schedule, *, min_steps: int) -> Course:
        """Take steps that each advance by 1/(1 + φ/B) of 1/`min_steps`; φ is that of the middle of the advance."""
        x, scales, batches = 0.0, [], []
        while True:
            # The advance depends on φ, and φ on the advance: one look ahead is enough for second order.
            scale = self.noise_scale(x)
            middle = x + 0.5 / min_steps / (1 + scale / batch(scale)) if scale else x + 0.5 / min_steps
            scale = self.noise_scale(min(middle, 1.0))
            size = batch(scale)
            scales.append(scale)
            batches.append(size)
            advance = 1 / min_steps / (1 + scale / size)
            if x + advance >= 1:
                return _course(len(scales) - 1 + (1 - x) / advance, scales, batches)
            x += advance


def _course(num_steps: float, scales: list[float], batches: list[float]) -> Course:
    return Course(num_steps=num_steps, noise_scales=np.array(scales), batch_sizes=np.array(batches))


def _exponential(ratio: float) -> NoiseCourse:
    """φ that grows by `ratio` along the way, ending at 1."""
    log_ratio = math.log(ratio)
    return NoiseCourse(
        noise_scale=lambda x: ratio ** (x - 1),
        mean=(1 - 1 / ratio) / log_ratio,
        gamma=4 * math.tanh(log_ratio / 4) / log_ratio,
    )


NOISE_COURSES: Mapping[str, NoiseCourse] = MappingProxyType(
    {
        "constant": NoiseCourse(noise_scale=lambda _: 1.0, mean=1.0, gamma=1.0),
        "square root": NoiseCourse(noise_scale=math.sqrt, mean=2 / 3, gamma=24 / 25),
        "linear": NoiseCourse(noise_scale=lambda x: x, mean=1 / 2, gamma=8 / 9),
        "square": NoiseCourse(noise_scale=lambda x: x * x, mean=1 / 3, gamma=3 / 4),
        "exponential ×10": _exponential(10),
        "exponential ×100": _exponential(100),
        "exponential ×1000": _exponential(1000),
    }
)
"""Noise scales that grow along the way, each with its closed form."""


def noisy_quadratic_steps(batch_size: float, *, target: float = 0.01, dimension: int = 1000) -> float:
    """Return the steps of SGD to a loss, at the constant learning rate that is best for the batch.

    The loss is ½·Σ h_i·u_i; curvature h_i and gradient variance are both 1/i, and all u_i are 1 at the start. u_i falls
    by (1 − εh_i)² a step towards a floor that the noise sets. Steps are a real number: they enter as an exponent.

    Args:
        batch_size: in samples.
        target: loss.
        dimension: number of directions.
    """
    curvature = 1 / np.arange(1, dimension + 1)
    low, high = 0.0, math.log(1e9)
    for _ in range(40):
        middle = (low + high) / 2
        if _best_loss(math.exp(middle), batch_size, curvature) > target:
            low = middle
        else:
            high = middle
    return math.exp(high)


def _best_loss(num_steps: float, batch_size: float, curvature: NDArray[np.float64]) -> float:
    """Return the lowest loss that a constant rate reaches; looked for on a grid, then on a finer one round its best."""
    low, high = math.log(1e-5), math.log(1.999)
    best = math.inf
    for _ in range(3):
        rates = np.exp(np.linspace(low, high, 40))
        kept = (1 - rates[:, None] * curvature) ** 2
        left = np.exp(num_steps * np.log(kept))
        floor = rates[:, None] ** 2 * curvature / batch_size * (1 - left) / (1 - kept)
        losses = 0.5 * ((left + floor) * curvature).sum(1)
        at = int(losses.argmin())
        best = min(best, float(losses[at]))
        low, high = math.log(rates[max(at - 1, 0)]), math.log(rates[min(at + 1, len(rates) - 1)])
    return best
