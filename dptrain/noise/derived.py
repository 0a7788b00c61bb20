"""What follows from a noise scale φ alone: learning rate, efficiency, gain; closed forms of one number.

φ and every batch are in samples. φ may be infinite ("at least" open above): each form has its limit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType

CRITICAL_RATIOS: Mapping[str, float] = MappingProxyType({"sgd": 1.0, "adamw": 3.0})
"""Critical batch size, at which the samples to a loss double, over the noise scale, by optimizer.

With the best rate at each batch a step makes 1/(1 + φ/B) of the progress of one without noise (McCandlish et al. 2018,
for SGD), and the samples to a loss double at B = φ. Adam's update has the size of its rate however noisy it is, and of
it the part 1/√(1 + φ/B) lies along the gradient. At a rate that follows √B the samples go as √(B + φ), which doubles at
B = 3φ. So φ counts threefold for such an optimizer, in the form that has a fewest number of steps; beyond some batch
the root rule must end, and where is not known. On our tasks a factor of 3 to 6 was right (`benchmarks.plan`).
"""

MARGINS: Mapping[str, float] = MappingProxyType({"sgd": 1.0, "adamw": 2 / 3})
"""How many times the critical batch a controller had better count on, by optimizer.

Of the batches that are about as fast the smaller ones take fewer samples: a third less of the noise scale costs 1 % of
the progress per second at most. Where a batch that is too small confirms itself, the limits of a run lead out of it.
Tried in docs/decisions/0024-a-longer-way-down.md.
"""


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


def half_batch_cosine(phi: float, *, batch: float) -> float:
    """Return the cosine between the gradients of a batch's two halves: 1/(1 + 2φ/B), SimiGrad's measure.

    It is the ratio of the expectations, which the mean cosine approaches where the noise fills many directions.
    """
    return 1 / (1 + 2 * phi / batch)


def norm_test_batch(phi: float, *, tolerance: float) -> float:
    """Return the smallest batch at which the norm test with `tolerance` η holds: φ/η²."""
    return phi / tolerance**2


def gradient_diversity(phi: float, *, batch: float) -> float:
    """Return the gradient diversity of a set of `batch` samples, φ being the set's own: (1 + φ)/B (Yin et al. 2018)."""
    return (1 + phi) / batch
