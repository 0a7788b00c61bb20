"""The learning rate that goes with a batch (rules) and with a position (schedule): factors on the base rate.

Both are functions of the present state alone: a factor never multiplies the one before it, so a run that
resumes, or that changes its batch there and back, has the same rate as one that did not.

The literature does not agree on how the rate should follow the batch, so the rule is the user's choice and has no
default here. For SGD the linear rule holds while the batch is far below the noise scale, and AdaScale's gain and
the noise rule continue it above. For Adam the square root is the usual choice, with 1 − β scaled along (Malladi et
al. 2022, arXiv 2205.10287); Li et al. 2024 (arXiv 2405.14578) find a rate that rises and falls again with its
peak at the noise scale; Marek et al. 2025 (arXiv 2507.07101) change β₂ rather than the rate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, Protocol

from dptrain.errors import ConfigError
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
        ...


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


def gain(noise_scale: NoiseScale, /, *, batch: float, reference_batch: float) -> float:
    """Return AdaScale's gain (φ + B0)/(φ + B)·B/B0, between 1 and B/B0 (Johnson et al. 2020, arXiv 2007.05105).

    Assumes SGD with a rate tuned at B0; linear far below the noise scale φ, level far above. Where φ is not
    resolved, it is the smallest gain that φ's interval allows: too small a rate is slow, too large a one can
    diverge. That is 1 for a batch above the reference of which nothing is known, and B/B0 for one below it.
    """
    known = [noise_scale.lower, noise_scale.upper] if noise_scale.value is None else [noise_scale.value]
    return min(closed_form.gain(phi, batch=batch, reference_batch=reference_batch) for phi in known)


def noise(noise_scale: NoiseScale, /, *, batch: float, reference_batch: float) -> float:  # noqa: ARG001 - a rule's form
    """Return ε_opt(B)/ε_max = 1/(1 + φ/B) (McCandlish et al. 2018, arXiv 1812.06162, equation 2.6).

    The base rate is ε_max here, the largest that the loss stands without noise, and no reference batch enters.
    Assumes SGD and a curvature that is alike in all directions. Where φ is not resolved, its lower end stands for
    it, and the factor is an upper bound on the right one (1 where nothing is known: a warm-up covers that time).
    The open upper end would give 0, which never trains.
    """
    phi = noise_scale.lower if noise_scale.value is None else noise_scale.value
    return closed_form.learning_rate_share(phi, batch=batch)


RuleName = Literal["none", "linear", "square_root", "gain", "noise"]
"""What a user writes to choose a rule."""

RULES: Mapping[RuleName, LearningRateRule] = MappingProxyType(
    {"none": none, "linear": linear, "square_root": square_root, "gain": gain, "noise": noise}
)
"""The rules by their names."""


@dataclass(frozen=True, kw_only=True)
class LearningRateSchedule:
    """The base rate against position: a linear warm-up, then constant, a half cosine or a straight line.

    A closed form of the position in samples, so that it does not depend on how the samples were cut into steps.
    """

    kind: Literal["constant", "cosine", "linear"] = "constant"
    """Course after the warm-up."""
    warmup_samples: int = 0
    """Samples over which the rate rises from 0 to its full height."""
    max_samples: int | None = None
    """Position at which the fall ends, in samples; needed for cosine and linear."""
    final_fraction: float = 0.0
    """Share of the full height that is left at `max_samples` and after."""

    def __post_init__(self) -> None:
        if self.kind not in ("constant", "cosine", "linear"):
            raise ConfigError(f"learning rate schedule must be constant, cosine or linear, got {self.kind!r}")
        if self.warmup_samples < 0:
            raise ConfigError(f"warmup_samples must not be negative, got {self.warmup_samples}")
        if not 0 <= self.final_fraction <= 1:
            raise ConfigError(f"final_fraction must lie between 0 and 1, got {self.final_fraction}")
        if self.kind == "constant":
            if self.final_fraction != 0:
                raise ConfigError("final_fraction has no meaning for a constant learning rate: remove it")
        elif self.max_samples is None or self.max_samples <= self.warmup_samples:
            raise ConfigError(
                f"a {self.kind} learning rate needs max_samples above warmup_samples {self.warmup_samples}, "
                f"got {self.max_samples}"
            )

    def factor(self, samples_seen: float) -> float:
        """Return the factor on the base rate, between 0 and 1.

        Args:
            samples_seen: position at the *end* of the step, which is above 0 in the first: with the position at
                its beginning a warm-up would spend its first step on a rate of 0.
        """
        if samples_seen < self.warmup_samples:
            return samples_seen / self.warmup_samples
        if self.kind == "constant" or self.max_samples is None:
            return 1.0
        done = min((samples_seen - self.warmup_samples) / (self.max_samples - self.warmup_samples), 1.0)
        left = 1 - done if self.kind == "linear" else (1 + math.cos(math.pi * done)) / 2
        return self.final_fraction + (1 - self.final_fraction) * left
