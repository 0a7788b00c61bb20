"""What follows from a noise scale φ alone: learning rate, efficiency, gain; closed forms of one number.

φ and every batch are in samples. φ may be infinite ("at least" open above): each form has its limit.
"""

from __future__ import annotations

import math


def learning_rate_share(phi: float, *, batch: float) -> float:
    """Return ε_opt(B)/ε_max = 1/(1 + φ/B): the best learning rate at batch B as a share of the full-batch one.

    McCandlish et al. 2018, equation 2.6. The same factor is the share of the best possible loss decrease of one
    step that batch B reaches (equation 2.7).
    """
    return 1 / (1 + phi / batch)


def efficiency(phi: float, *, batch: float, reference_batch: float) -> float:
    """Return the progress per sample at `batch` relative to `reference_batch`: (φ + B0)/(φ + B).

    Pollux (Qiao et al. 2021, OSDI), equation 5.
    """
    if math.isinf(phi):
        return 1.0
    return (phi + reference_batch) / (phi + batch)


def gain(phi: float, *, batch: float, reference_batch: float) -> float:
    """Return AdaScale's gain r: how many steps at `reference_batch` one step at `batch` is worth.

    r = (σ² + μ²)/(σ²/s + μ²) with s = B/B0, between 1 and s (Johnson et al. 2020, arXiv 2007.05105); it equals
    s times the efficiency, and ε_opt(B)/ε_opt(B0).
    """
    return batch / reference_batch * efficiency(phi, batch=batch, reference_batch=reference_batch)


def expert_noise_scale(phi_routed: float, *, probability: float) -> float:
    """Return the noise scale of an expert in samples of the batch: (φ_h + 1 − p)/p.

    A sample reaches the expert with probability p and brings the gradient h, else it brings zero. That choice is noise
    as well: E|rh|² = p·E|h|² and |E rh|² = p²·|E h|². So an expert's noise scale is above φ_h/p, by what routing adds.

    Args:
        phi_routed: φ_h, the noise scale over the samples that are routed to it, in such samples.
        probability: p, that a sample is routed to it, above 0 and up to 1.
    """
    return (phi_routed + 1 - probability) / probability


def routed_noise_scale(phi: float, *, probability: float) -> float:
    """Return the noise scale in routed samples of an expert whose noise scale in samples is φ: p·φ − 1 + p.

    Args:
        phi: of the expert's group in `attach(..., groups="experts")`.
        probability: p, that a sample is routed to it.
    """
    return probability * phi - 1 + probability
