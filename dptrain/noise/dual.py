"""Noise scales in the geometries of sign and spectral descent, from dual norms, with their interval; pure."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, fields

from dptrain.noise.moments import Moments
from dptrain.noise.scale import NoiseScale, noise_scale
from dptrain.noise.smoothing import SmoothedMoments


@dataclass(frozen=True, kw_only=True)
class DualNorms:
    """One step's dual norms (L1 for sign descent, nuclear for spectral), with what was averaged.

    Attributes:
        small: mean of ‖g_k‖ over small batches of `size` samples.
        large: ‖g‖ of their mean over `total` samples.
        deviation: mean of ‖g_k − g‖, each divided by what Gaussian noise of unit size has there, see `sign_factor` and
            `spectral_factor`.
        size: b, samples in a small batch.
        total: B, samples in the step.
    """

    small: float
    large: float
    deviation: float
    size: float
    total: float


def dual_moments(norms: DualNorms) -> Moments | None:
    """Return one step's (‖σ‖, ‖G‖): the noise of one sample and the gradient, both in the dual norm.

    A deviation g_k − g has the variance σ²(1/b − 1/B) in each coordinate, so ‖σ‖ follows from its norm. ‖G‖ is
    extrapolated from the two batches to no noise, for which the norm of pure noise falls as 1/√batch.

    Bias: none for coordinates (or singular directions) that are all noise, nor for those far above it. Where a
    coordinate's signal is as large as its noise in the step, |G| comes out 40 % too small, at twice that 9 %, and the
    noise scale with it too large. ‖σ‖ takes the noise of a small batch for Gaussian; the spectral factor takes it for
    equal in all entries of a matrix. The plain ‖g‖ (Naganuma et al., arXiv 2602.03001) is too large by all the noise.

    Returns:
        The pair as `noise_trace` and `grad_sq_norm`, not squared; None where there is nothing to compare.
    """
    if not 0 < norms.size < norms.total or not math.isfinite(norms.small + norms.large + norms.deviation):
        return None
    noise = norms.deviation / math.sqrt(1 / norms.size - 1 / norms.total)
    small_noise, large_noise = math.sqrt(1 / norms.size), math.sqrt(1 / norms.total)
    grad = (norms.large * small_noise - norms.small * large_noise) / (small_noise - large_noise)
    return Moments(noise_trace=noise, grad_sq_norm=grad, num_samples=norms.total)


class DualNoiseScale(NoiseScale):
    """(‖σ‖/‖G‖)² in samples. `noise_trace` and `grad_sq_norm` are ‖σ‖ and ‖G‖, as are their variances; not squared."""

    def contrast(self, phi: float) -> float:
        """Return how sure it is that the noise scale is above `phi`, in standard errors of a normal."""
        return super().contrast(math.sqrt(phi))

    def bounds(self, z: float) -> tuple[float, float]:
        """Return the noise scales that the contrast does not reject at `z` standard errors, as (lower, upper)."""
        lower, upper = super().bounds(z)
        return lower**2, upper**2


def dual_noise_scale(moments: SmoothedMoments | None, *, level: float = 0.95) -> DualNoiseScale:
    """Read the noise scale off the smoothed pair (‖σ‖, ‖G‖): the square of the ratio and of its interval."""
    ratio = noise_scale(moments, level=level)
    values = {field.name: getattr(ratio, field.name) for field in fields(ratio)}
    squared = {name: None if values[name] is None else values[name] ** 2 for name in ("value", "lower", "upper")}
    return DualNoiseScale(**{**values, **squared})


def sign_factor() -> float:
    """Return E|x| of a standard normal."""
    return math.sqrt(2 / math.pi)


@functools.lru_cache(maxsize=256)
def spectral_factor(rows: int, columns: int) -> float:
    """Return E‖X‖_*/(m·√n) of a matrix of standard normals with m ≤ n sides: 8/(3π) if square, near 1 if long.

    m·√n is tr(Σ_row^{1/2}). By the law of Marchenko and Pastur (1967), which is within 1 % from 4 rows on.
    """
    small, large = sorted((rows, columns))
    ratio = small / large
    first, last = 1 - math.sqrt(ratio), 1 + math.sqrt(ratio)
    count = 2000
    width = (last - first) / count
    points = (first + (i + 0.5) * width for i in range(count))
    return sum(math.sqrt((s * s - first**2) * (last**2 - s * s)) for s in points) * width / (math.pi * ratio)
