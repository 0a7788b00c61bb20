"""The one factor between what was seen and what `.grad` holds, from checksums and the variance of their rounding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

_MARGIN = 5.0
"""Deviations, in standard deviations of rounding, from which on a check contradicts. The model of rounding is on the
wide side (1.6 times what is seen at least), so that this is eight of those that occur."""
_EACH, _TOGETHER = 6.0, 20.0
"""Checks, in the same unit, in each of two and together, from which on a factor is known: to 5 % of it, and so that it
is contradicted where one parameter has none of it."""
_EXACT = 1e-5
"""Distance from 1 that is no factor: it moves |G|² by 0.002 % at a noise scale of the batch."""
_SLIGHT = 1e-3
"""Distance from 1, beside what rounding explains, from which on gradients are said to be rescaled."""


@dataclass(frozen=True, kw_only=True)
class CommonFactor:
    """A factor that all checks agree on.

    Attributes:
        value: by least squares, so that rounding leaves it unbiased; it is not set to 1 where 1 is as likely, for the
            factors that are missed so would add up over the steps of a run. 1.0 only for what is exact.
        error: its standard error, relative to it.
        resolved: whether it is known well enough to be divided out.
        agrees: whether the checks are explained without a factor, too.
    """

    value: float
    error: float
    resolved: bool
    agrees: bool

    @property
    def rescales(self) -> bool:
        """Whether the gradients were changed by it beyond doubt."""
        return self.resolved and abs(self.value - 1) > _SLIGHT + _MARGIN * self.error * abs(self.value)


def common_factor(seen: Sequence[float], variances: Sequence[float], combined: Sequence[float]) -> CommonFactor | None:
    """Return the factor between `combined` and `seen`; None where there is no one factor.

    Args:
        seen: checksums of what the backward passes brought, averaged as the wrapper does.
        variances: of their rounding, in the same unit squared.
        combined: checksums of `.grad`.
    """
    checks = [(s, math.sqrt(v), c) for s, v, c in zip(seen, variances, combined, strict=True)]
    agrees = all(abs(s - c) <= _MARGIN * deviation for s, deviation, c in checks)
    # In units of what rounding explains; a check without rounding has no gradient, and then .grad must have none.
    if any(deviation == 0 and s != c for s, deviation, c in checks):
        return None
    scaled = [(s / deviation, c / deviation) for s, deviation, c in checks if deviation > 0]
    signal = sum(s * s for s, _ in scaled)
    if signal == 0:
        return CommonFactor(value=1.0, error=math.inf, resolved=False, agrees=True) if agrees else None
    value = sum(s * c for s, c in scaled) / signal
    # Rounding is relative to what `.grad` holds, so a small factor does not excuse a large difference.
    alike = value != 0 and all(abs(c - value * s) <= _MARGIN * abs(value) for s, c in scaled)
    known = signal > _MARGIN**2
    # Negated gradients, of a loop that ascends, have the factor −1; cleared ones have none.
    if not agrees and not (alike and known):
        return None
    return CommonFactor(
        value=1.0 if abs(value - 1) <= _EXACT else value,
        error=1 / math.sqrt(signal),
        resolved=alike and signal > _TOGETHER**2 and sum(abs(s) > _EACH for s, _ in scaled) > 1,
        agrees=agrees,
    )


def with_reduction(seen: Sequence[float], variances: Sequence[float], *, roundoff: float, ranks: float) -> list[float]:
    """Return the variances with that of a sum of equal summands, one from each rank, added up one after another.

    With Σ_ρ (ρ·x/R)² = R·x²/3 of a total x it is (u²/3)·(R/3)·Σ_e r_e²·x_e², in R − 1 additions. That sum over the
    elements of a check is taken to be the square of the check, or what the mean of all checks says of it where its own
    is small by chance. Ranks that agree to less than the rounding of their sum, in each element, are not provided for:
    their errors repeat. 64 ranks that reduce in bfloat16 and agree to 5 % are such.

    Args:
        seen: as for `common_factor`.
        variances: without it.
        roundoff: u, of the coarsest format.
        ranks: R.
    """
    squares = [s * s / v for s, v in zip(seen, variances, strict=True) if v > 0]
    mean = sum(squares) / max(len(squares), 1)
    share = roundoff**2 * (ranks - 1) / 9
    return [v + share * (s * s + mean * v) for s, v in zip(seen, variances, strict=True)]


def combined_differs(
    combined: Sequence[float], squares: Sequence[float], seen: Sequence[float], variances: Sequence[float]
) -> bool:
    """Say whether `.grad` is not the same on all ranks.

    Args:
        combined: mean over the ranks of their checksums.
        squares: mean over the ranks of the squared checksums.
        seen: as for `common_factor`.
        variances: as for `common_factor`.
    """
    # Ranks whose gradients were unscaled differ by as much less.
    weighted = [(s / v, s, c) for s, v, c in zip(seen, variances, combined, strict=True) if v > 0]
    signal = sum(w * s for w, s, _ in weighted)
    scale = abs(sum(w * c for w, _, c in weighted)) / signal if signal else 1.0
    return any(
        math.sqrt(max(square - mean * mean, 0.0)) > _MARGIN * min(scale, 1.0) * math.sqrt(variance) + 1e-7 * abs(mean)
        for mean, square, variance in zip(combined, squares, variances, strict=True)
    )
