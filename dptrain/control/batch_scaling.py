"""What follows the batch beside the learning rate: Adam's betas and the weight decay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

BetaRuleName = Literal["none", "square_root", "half_life"]
"""What a user writes to choose how Adam's betas follow the batch."""
DecayRuleName = Literal["none", "timescale"]
"""What a user writes to choose how the weight decay follows the batch."""

_LOWEST_BETA2 = 0.9
"""Tuned on: the MLP on `digits` with AdamW at 32 times the batch, where β₂ = 0.19 ends at losses of 0.30 to 204,000
over five seeds and this floor at 0.048 to 0.064."""
_LOWEST_BETA1 = 0.8
"""Tuned on: the same runs."""


@dataclass(frozen=True, kw_only=True)
class Betas:
    """Adam's betas for a batch.

    Attributes:
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        is_floored: whether the rule asked for less than a floor allows.
    """

    beta1: float
    beta2: float
    is_floored: bool = False


def adam_betas(rule: BetaRuleName, betas: tuple[float, float], *, batch: float, reference_batch: float) -> Betas:
    """Return Adam's β₁ and β₂ for a batch.

    none: as they are. square_root: 1 − β in proportion to the batch, for both, which belongs to the rate rule of that
    name (Malladi et al. 2022, arXiv 2205.10287). half_life: both forget over equal numbers of samples, β^(B/B0) (for β₂
    Marek et al. 2025, arXiv 2507.07101). For small 1 − β the two agree.

    Both have floors, β₁ ≥ 0.8 and β₂ ≥ max(0.9, β₁²), or the tuned value where that is lower: Adam divides by the root
    of an average over 1/(1 − β₂) steps, and one over a step or two is a normalisation of each coordinate by itself,
    with β₂ < β₁² a direction may grow without bound (Reddi et al. 2018, arXiv 1904.09237).

    torch corrects Adam's bias by 1 − β^step, as though β had been the same all along. Once β^step is all but 0 there
    is nothing to correct: let β change after the first few 1/(1 − β₂) steps, or warm the rate up over them.

    Args:
        rule: which one.
        betas: β₁ and β₂ tuned at the reference batch.
        batch: in force, in samples.
        reference_batch: in samples.
    """
    ratio = 1.0 if rule == "none" else batch / reference_batch
    asked = [1 - ratio * (1 - beta) if rule == "square_root" else beta**ratio for beta in betas]
    beta1 = max(asked[0], min(betas[0], _LOWEST_BETA1))
    beta2 = max(asked[1], min(betas[1], max(_LOWEST_BETA2, beta1**2)))
    return Betas(beta1=beta1, beta2=beta2, is_floored=beta1 > asked[0] + 1e-12 or beta2 > asked[1] + 1e-12)


def weight_decay_factor(rule: DecayRuleName, *, batch: float, reference_batch: float, rate_factor: float) -> float:
    """Return the factor on the weight decay for a batch.

    timescale: keeps τ = B/(η·λ·D), the part of the data over which decoupled decay forgets (Power Lines, Bergsma et al.
    2025, arXiv 2505.13738). The rate follows the batch by `rate_factor`, so λ follows by (B/B0)/rate_factor: √(B/B0)
    under the root rule, 1 under the linear one.

    Args:
        rule: which one.
        batch: in force, in samples.
        reference_batch: that the weight decay was tuned at, in samples.
        rate_factor: of the learning-rate rule at this batch.
    """
    if rule == "none" or rate_factor <= 0:
        return 1.0
    return batch / reference_batch / rate_factor
