"""The learning rate that goes with a batch (rules), and its course over a run (schedule): factors on the base rate.

Both are functions of the present state alone: a factor never multiplies the one before it, so a run that
resumes, or that changes its batch there and back, has the same rate as one that did not.

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
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal, Protocol

from dptrain.control.progress_rate import quantiles
from dptrain.errors import ConfigError
from dptrain.noise import NoiseScale
from dptrain.noise import derived as closed_form

DECAY_FRACTION = 0.2
"""Share of the run over which a wsd schedule decays, where none is given."""


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


def _mean(noise_scale: NoiseScale, factor: Callable[[float], float]) -> float:
    """Return the mean of a factor over what is known of φ; before anything is, that of its two limits."""
    phis = quantiles(noise_scale)
    return math.fsum(map(factor, phis)) / len(phis)


def gain(noise_scale: NoiseScale, /, *, batch: float, reference_batch: float) -> float:
    """Return AdaScale's gain (φ + B0)/(φ + B)·B/B0, between 1 and B/B0 (Johnson et al. 2020, arXiv 2007.05105).

    Assumes SGD with a rate tuned at B0; linear far below the noise scale φ, level far above.
    """
    return _mean(noise_scale, lambda phi: closed_form.gain(phi, batch=batch, reference_batch=reference_batch))


def root_gain(noise_scale: NoiseScale, /, *, batch: float, reference_batch: float) -> float:
    """Return the root of AdaScale's gain, between 1 and √(B/B0): AdaptDL's rule for Adam (Qiao et al. 2021, OSDI).

    As the square root below the noise scale, for the same reason, and level above it, where larger batches have no
    noise left to average away and a rate that went on rising would come to the largest that the loss stands.
    """
    return _mean(
        noise_scale, lambda phi: math.sqrt(closed_form.gain(phi, batch=batch, reference_batch=reference_batch))
    )


def noise(noise_scale: NoiseScale, /, *, batch: float, reference_batch: float) -> float:  # noqa: ARG001 - a rule's form
    """Return ε_opt(B)/ε_max = 1/(1 + φ/B) (McCandlish et al. 2018, arXiv 1812.06162, equation 2.6).

    The base rate is ε_max here, the largest that the loss stands without noise, and no reference batch enters.
    Assumes SGD and a curvature that is alike in all directions. Before anything is known it is ½.
    """
    return _mean(noise_scale, lambda phi: closed_form.learning_rate_share(phi, batch=batch))


def surge(noise_scale: NoiseScale, /, *, batch: float, reference_batch: float) -> float:
    """Return √(B/B0)·(φ + B0)/(φ + B): as the square root below φ, and falling again above (Li et al. 2024).

    It is the ratio of ε_opt ∝ 2/(√(φ/B) + √(B/φ)) at the two batches (arXiv 2405.14578), so that the base rate
    is the one tuned at B0, as for `gain`; the maximum, at B = φ, need not be known. Assumes updates by
    the sign of a Gaussian gradient, which stands for Adam.
    """
    root = math.sqrt(batch / reference_batch)
    return root * _mean(
        noise_scale, lambda phi: closed_form.efficiency(phi, batch=batch, reference_batch=reference_batch)
    )


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


@dataclass(frozen=True, kw_only=True)
class LearningRateSchedule:
    """The base rate against position: a linear warm-up, then constant, a half cosine, a straight line, or late decay.

    A closed form of the position in samples, so that it does not depend on how the samples were cut into steps.
    """

    kind: Literal["constant", "cosine", "linear", "wsd"] = "constant"
    """Course after the warm-up. wsd: constant, and a straight line at the end (Hu et al. 2024, arXiv 2404.06395)."""
    warmup_samples: int = 0
    """Samples over which the rate rises from 0 to its full height."""
    max_samples: int | None = None
    """Position at which the fall ends, in samples; needed for all but constant."""
    final_fraction: float = 0.0
    """Share of the full height that is left at `max_samples` and after."""
    decay_fraction: float | None = None
    """Share of `max_samples` over which a wsd schedule falls. Default: 0.2 (Hägele et al. 2024, arXiv 2405.18392)."""

    def __post_init__(self) -> None:
        if self.kind not in ("constant", "cosine", "linear", "wsd"):
            raise ConfigError(f"learning rate schedule must be constant, cosine, linear or wsd, got {self.kind!r}")
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
        self._check_decay()

    def _check_decay(self) -> None:
        if self.kind != "wsd":
            if self.decay_fraction is not None:
                raise ConfigError(f"decay_fraction has no meaning for a {self.kind} learning rate: remove it")
        elif not 0 < self._decay_fraction <= 1 or self._decay_start < self.warmup_samples:
            raise ConfigError(
                f"a wsd learning rate decays over the last decay_fraction {self._decay_fraction} of max_samples "
                f"{self.max_samples}, which must be in (0, 1] and begin after warmup_samples {self.warmup_samples}"
            )

    @property
    def _decay_fraction(self) -> float:
        return DECAY_FRACTION if self.decay_fraction is None else self.decay_fraction

    @property
    def _decay_start(self) -> float:
        """Where the fall begins, in samples."""
        assert self.max_samples is not None, "a constant rate does not fall"
        if self.kind == "wsd":
            return (1 - self._decay_fraction) * self.max_samples
        return self.warmup_samples

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
        start = self._decay_start
        done = min(max(samples_seen - start, 0.0) / (self.max_samples - start), 1.0)
        left = (1 + math.cos(math.pi * done)) / 2 if self.kind == "cosine" else 1 - done
        return self.final_fraction + (1 - self.final_fraction) * left


@dataclass(frozen=True, kw_only=True)
class RateCheck:
    """Whether the learning rate may be too high for the batch: the loss has stopped falling at a small noise scale.

    SGD that bounces in a bowl of curvature h has φ = 2B/(εh) − B: below B where ε is above 1/h, within a factor of two
    of divergence, and far above it where the loss stands still because it has arrived.

    Attributes:
        patience_samples: samples without a lower loss after which the loss counts as standing still.
        lowest: lowest smoothed loss so far.
        since: position of that.
        has_warned: whether it was said; it is said once.
    """

    patience_samples: int
    lowest: float = math.inf
    since: int = 0
    has_warned: bool = False

    def after(
        self, noise_scale: NoiseScale, *, batch: int, samples_seen: int, loss: float | None
    ) -> tuple[RateCheck, str | None]:
        """Return the check after one more step, and the warning where it is due."""
        if loss is None or self.has_warned:
            return self, None
        if loss < self.lowest:
            return replace(self, lowest=loss, since=samples_seen), None
        upper = noise_scale.bounds(1.0)[1]
        if samples_seen - self.since < self.patience_samples or not upper < batch:
            return self, None
        warning = (
            f"learning rate may be too high for this batch size: noise scale at most {upper:.3g} at batch {batch}, "
            f"loss not below {self.lowest:.4g} for {samples_seen - self.since:,} samples"
        )
        return replace(self, has_warned=True), warning
