"""The unbiased, signed estimates of |G|² and tr(Σ) from one step's squared norms; nothing is averaged over steps."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dptrain.noise.stats import SquaredNorms


@dataclass(frozen=True, kw_only=True)
class Moments:
    """One step's estimates. Both are unbiased, so either may be negative: never clamp them before averaging.

    Attributes:
        noise_trace: tr(Σ), trace of the covariance of per-sample gradients.
        grad_sq_norm: |G|², squared norm of the true gradient.
        num_samples: the samples that this step averaged over: its weight in a mean over steps.
        num_small: K, the small batches that were compared; the scatter of both estimates depends on it (F4).
    """

    noise_trace: float
    grad_sq_norm: float
    num_samples: float
    num_small: int = 2


def unbiased_moments(norms: SquaredNorms, *, population: int | None = None) -> Moments | None:
    """Estimate tr(Σ) and |G|² from one step, for any sizes and weights of the small batches.

    E Σ w_k‖g_k‖² = |G|² + c1·tr(Σ) and E‖Σ w_k g_k‖² = |G|² + c2·tr(Σ) are solved for the two unknowns. With
    equal sizes this is McCandlish et al. 2018 (arXiv 1812.06162), appendix A.1.

    Args:
        norms: the step's squared norms.
        population: number of samples in the data set, where a step draws from it without replacement and it
            is small: then ‖g‖² carries less noise than independent draws would give it, and the deficit
            tr(Σ)/population is added back, so that |G|² is the squared gradient of the whole data set.
            None for data without end.

    Returns:
        The estimates, or None where the step says nothing: fewer than two small batches, no samples, or a value
        that is not finite.
    """
    contrast = norms.inverse_small - norms.inverse_large
    # Rounding leaves a contrast of some 1e-17 where a single batch was seen: it is the count that decides.
    if norms.num_small < 2 or contrast <= 0:  # noqa: PLR2004 - two is what a difference needs
        return None
    noise_trace = (norms.small - norms.large) / contrast
    grad_sq_norm = norms.large - noise_trace * norms.inverse_large
    if population is not None:
        grad_sq_norm += noise_trace / population
    if not (math.isfinite(noise_trace) and math.isfinite(grad_sq_norm) and 0 < norms.num_samples < math.inf):
        return None
    return Moments(
        noise_trace=noise_trace, grad_sq_norm=grad_sq_norm, num_samples=norms.num_samples, num_small=norms.num_small
    )
