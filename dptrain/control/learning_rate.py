"""The rules by which the learning rate follows the batch: factors on the base rate.

A factor is a function of the present state alone and never multiplies the one before it, so a run that resumes, or
that changes its batch there and back, has the same rate as one that did not.

The literature does not agree on how the rate should follow the batch. For SGD the linear rule holds while the batch is
far below the noise scale, and AdaScale's gain and the noise rule continue it above. For Adam the square root is the
usual choice (Malladi et al. 2022, arXiv 2205.10287); Li et al. 2024 (arXiv 2405.14578) find a rate that rises and
falls again with its peak at the noise scale; Marek et al. 2025 (arXiv 2507.07101) change β₂ rather than the rate.

A rule that reads the noise scale returns the mean of its factor over what is known of φ, by the same ten values of
equal probability that the batch law uses. So the rate moves with the interval, and does not jump where the ratio is
resolved.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Literal, Protocol

from dptrain.control.progress_rate import quantiles
from dptrain.noise import NoiseScale
from dptrain.noise import derived as closed_form


class LearningRateRule(Protocol):
    """The factor on the base learning rate for a batch, in [0, ∞)."""

    def __call__(self, noise_scale: NoiseScale, /, *, batch: float, reference_batch: float) -> float:
        """Return the factor.

        Args:
            noise_scale: what is known of it.
            batch: in force, in samples.
            reference_batch: the batch that the base rate was tuned at, in samples.
        """


def none(_noise_scale: NoiseScale, /, *, batch: float, reference_batch: float) -> float:  # noqa: ARG001 - a rule's form
    """Return 1: the rate does not follow the batch. Assumes a base rate that is right for every batch of the run."""
    return 1.0


def linear(_noise_scale: NoiseScale, /, *, batch: float, reference_batch: float) -> float:
    """Return B/B0: a step on twice the samples goes twice as far (Goyal et al. 2017, arXiv 1706.02677).

    Assumes SGD and batches far below the noise scale; above it the rate is too large.
    """
    return batch / reference_batch


def square_root(_noise_scale: NoiseScale, /, *, batch: float, reference_batch: float) -> float:
    """Return √(B/B0): the usual rule for Adam (Malladi et al. 2022, arXiv 2205.10287).

    Assumes a gradient that is mostly noise, which Adam divides by its size. Malladi et al. scale 1 − β₁, 1 − β₂
    and ε along with it; this rule leaves them alone.
    """
    return math.sqrt(batch / reference_batch)


def _mean(noise_scale: NoiseScale, factor: Callable[..., float], **batches: float) -> float:
    """Return the mean of a factor over what is known of φ; before anything is, that of its two limits."""
    phis = quantiles(noise_scale)
    return math.fsum(factor(phi, **batches) for phi in phis) / len(phis)


def gain(noise_scale: NoiseScale, /, *, batch: float, reference_batch: float) -> float:
    """Return AdaScale's gain (φ + B0)/(φ + B)·B/B0, between 1 and B/B0 (Johnson et al. 2020, arXiv 2007.05105).

    Assumes SGD with a rate tuned at B0; linear far below the noise scale φ, level far above.
    """
    return _mean(noise_scale, closed_form.gain, batch=batch, reference_batch=reference_batch)


def root_gain(noise_scale: NoiseScale, /, *, batch: float, reference_batch: float) -> float:
    """Return the root of AdaScale's gain, between 1 and √(B/B0): AdaptDL's rule for Adam (Qiao et al. 2021, OSDI).

    As the square root below the noise scale, for the same reason, and level above it, where larger batches have no
    noise left to average away and a rate that went on rising would come to the largest that the loss stands.
    """
    batches = {"batch": batch, "reference_batch": reference_batch}
    return _mean(noise_scale, lambda phi: math.sqrt(closed_form.gain(phi, **batches)))


def noise(noise_scale: NoiseScale, /, *, batch: float, reference_batch: float) -> float:  # noqa: ARG001 - a rule's form
    """Return ε_opt(B)/ε_max = 1/(1 + φ/B) (McCandlish et al. 2018, arXiv 1812.06162, equation 2.6).

    The base rate is ε_max here, the largest that the loss stands without noise, and no reference batch enters.
    Assumes SGD and a curvature that is alike in all directions. Before anything is known it is ½.
    """
    return _mean(noise_scale, closed_form.learning_rate_share, batch=batch)


def surge(noise_scale: NoiseScale, /, *, batch: float, reference_batch: float) -> float:
    """Return √(B/B0)·(φ + B0)/(φ + B): as the square root below φ, and falling again above (Li et al. 2024).

    It is the ratio of ε_opt ∝ 2/(√(φ/B) + √(B/φ)) at the two batches (arXiv 2405.14578), so that the base rate
    is the one tuned at B0, as for `gain`; the maximum, at B = φ, need not be known. Assumes updates by
    the sign of a Gaussian gradient, which stands for Adam.
    """
    efficiency = _mean(noise_scale, closed_form.efficiency, batch=batch, reference_batch=reference_batch)
    return math.sqrt(batch / reference_batch) * efficiency


RuleName = Literal["none", "linear", "square_root", "gain", "root_gain", "noise", "surge"]
"""What a user writes to choose a rule."""

RULES: Mapping[RuleName, LearningRateRule] = MappingProxyType(
    {
        "none": none,
        "linear": linear,
        "square_root": square_root,
        "gain": gain,
        "root_gain": root_gain,
        "noise": noise,
        "surge": surge,
    }
)
"""The rules by their names."""
