"""The squared norms of one optimizer step together with the sizes of what was averaged; no estimate lives here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class SquaredNorms:
    """What an observer hands on: squared gradient norms that carry their own sizes.

    K small batches of b_k samples, with mean gradients g_k, were combined into g = Σ w_k g_k, where the
    weights add up to one. For the mean over all samples w_k = b_k / B, but a loop that averages micro-batches
    of unequal size with equal weights is described just as well (formula F3 of the derivation in
    `docs/noise-scale.md`).

    Attributes:
        small: Σ w_k ‖g_k‖², the weighted mean of the small batches' squared norms.
        large: ‖g‖², the squared norm of the combined gradient.
        inverse_small: c1 = Σ w_k / b_k, the noise in `small`, in units of tr(Σ); 1/samples.
        inverse_large: c2 = Σ w_k² / b_k, the noise in `large`, in units of tr(Σ); 1/samples.
        num_small: K, the number of small batches.
        num_samples: B = Σ b_k.
    """

    small: float
    large: float
    inverse_small: float
    inverse_large: float
    num_small: int
    num_samples: float

    @classmethod
    def of(
        cls,
        small_sq_norms: Sequence[float],
        *,
        sizes: Sequence[float],
        large_sq_norm: float,
        weights: Sequence[float] | None = None,
    ) -> SquaredNorms:
        """Collect the norms of one step from lists, one entry for each small batch.

        Args:
            small_sq_norms: ‖g_k‖² of each small batch's mean gradient.
            sizes: b_k in samples.
            large_sq_norm: ‖Σ w_k g_k‖².
            weights: w_k, adding up to one; each batch's share of the samples where not given.
        """
        total = float(sum(sizes))
        weights = [size / total for size in sizes] if weights is None else weights
        return cls(
            small=sum(w * s for w, s in zip(weights, small_sq_norms, strict=True)),
            large=large_sq_norm,
            inverse_small=sum(w / b for w, b in zip(weights, sizes, strict=True)),
            inverse_large=sum(w * w / b for w, b in zip(weights, sizes, strict=True)),
            num_small=len(sizes),
            num_samples=total,
        )
