"""`noise_scale(...)`: the estimate from squared norms and sizes, for people with hooks of their own."""

from __future__ import annotations

import math
from collections.abc import Sequence

from dptrain.errors import ConfigError
from dptrain.noise import scale
from dptrain.noise.moments import unbiased_moments
from dptrain.noise.smoothing import MomentSums, Smoothing, smoothed
from dptrain.noise.stats import SquaredNorms

_NO_DECAY = Smoothing(half_life_samples=1e300)


def noise_scale(
    small_sq_norms: Sequence[Sequence[float]],
    large_sq_norms: Sequence[float],
    *,
    sizes: Sequence[float] | float,
    weights: Sequence[float] | None = None,
    population: int | None = None,
    level: float = 0.95,
) -> scale.NoiseScale:
    """Return the noise scale tr(Σ)/|G|² with its interval, from the squared gradient norms of some steps.

    Each step has K small batches with mean gradients g_k, combined into g = Σ w_k g_k. The estimates of |G|² and tr(Σ)
    are unbiased for any sizes and weights (McCandlish et al. 2018, arXiv 1812.06162, appendix A.1, for equal ones);
    they are averaged over the steps, and divided last.

    Args:
        small_sq_norms: ‖g_k‖², one row of K numbers for each step; arrays and tensors do, too.
        large_sq_norms: ‖g‖², one number for each step.
        sizes: samples in each of the K small batches, or one number for all.
        weights: w_k, adding up to one; by default each batch's share of the samples.
        population: samples in the data set where it is small and drawn without replacement.
        level: confidence of the interval.

    Raises:
        ConfigError: where lengths differ, K is below two, a size is not positive, or the weights do not add up to one.

    Example:
        >>> print(noise_scale([[5.1, 4.9], [4.8, 5.2], [5.0, 5.3]], [3.0, 2.9, 3.1], sizes=8))  # doctest: +SKIP
    """
    rows = [[float(value) for value in row] for row in small_sq_norms]
    large = [float(value) for value in large_sq_norms]
    num_small = len(rows[0]) if rows else 0
    each = [float(sizes)] * num_small if isinstance(sizes, int | float) else [float(size) for size in sizes]
    _check(rows, large, sizes=each, weights=weights)
    sums = MomentSums()
    for row, large_sq_norm in zip(rows, large, strict=True):
        norms = SquaredNorms.of(row, sizes=each, large_sq_norm=large_sq_norm, weights=weights)
        moments = unbiased_moments(norms, population=population)
        sums = sums if moments is None else _NO_DECAY.update(sums, moments)
    return scale.noise_scale(smoothed(sums), level=level)


def _check(
    rows: Sequence[Sequence[float]],
    large: Sequence[float],
    *,
    sizes: Sequence[float],
    weights: Sequence[float] | None,
) -> None:
    if len(rows) != len(large):
        raise ConfigError(f"small_sq_norms has {len(rows)} steps and large_sq_norms {len(large)}: give one for each")
    if not rows or len(sizes) < 2:  # noqa: PLR2004 - two is what a difference needs
        raise ConfigError(f"each of at least one step needs two small batches, got {len(rows)} steps of {len(sizes)}")
    if any(len(row) != len(sizes) for row in rows):
        raise ConfigError(f"each step needs {len(sizes)} squared norms, one for each size")
    if not all(0 < size < math.inf for size in sizes):
        raise ConfigError(f"sizes must be positive numbers of samples, got {list(sizes)}")
    if weights is not None and (len(weights) != len(sizes) or not math.isclose(sum(weights), 1.0, rel_tol=1e-6)):
        raise ConfigError(f"weights must be {len(sizes)} numbers that add up to one, got {list(weights)}")
