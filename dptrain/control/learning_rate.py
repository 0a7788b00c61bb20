"""The learning rate and Adam's β that go with a batch (rules), and the rate's course (schedule): factors on the base.

Both are functions of the present state alone: a factor never multiplies the one before it, so a run that
resumes, or that changes its batch there and back, has the same rate as one that did not.

The literature does not agree on how the rate should follow the batch, so the rule is the user's choice and has no
default here. For SGD the linear rule holds while the batch is far below the noise scale, and AdaScale's gain and
the noise rule continue it above. For Adam the square root is the usual choice, with 1 − β scaled along (Malladi et
al. 2022, arXiv 2205.10287); Li et al. 2024 (arXiv 2405.14578) find a rate that rises and falls again with its
peak at the noise scale; Marek et al. 2025 (arXiv 2507.07101) change β₂ rather than the rate. The betas are a second
choice, apart from the first.
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


def gain(noise_scale: NoiseScale, /, *, batch: float, reference_batch: float) -> float:
    """Return AdaScale's gain (φ + B0)/(φ + B)·B/B0, between 1 and B/B0 (Johnson et al. 2020, arXiv 2007.05105).

    Assumes SGD with a rate tuned at B0; linear far below the noise scale φ, level far above. Where φ is not
    resolved, it is the smallest gain that φ's interval allows: too small a rate is slow, too large a one can
    diverge. That is 1 for a batch above the reference of which nothing is known, and B/B0 for one below it.
    """
    known = [noise_scale.lower, noise_scale.upper] if noise_scale.value is None else [noise_scale.value]
    return min(closed_form.gain(phi, batch=batch, reference_batch=reference_batch) for phi in known)


def root_gain(noise_scale: NoiseScale, /, *, batch: float, reference_batch: float) -> float:
    """Return the root of AdaScale's gain, between 1 and √(B/B0): AdaptDL's rule for Adam (Qiao et al. 2021, OSDI).

    As the square root below the noise scale, for the same reason, and level above it, where larger batches have no
    noise left to average away and a rate that went on rising would come to the largest that the loss stands. Where φ
    is not resolved, it is the smallest that φ's interval allows, as for `gain`.
    """
    return math.sqrt(gain(noise_scale, batch=batch, reference_batch=reference_batch))


def noise(noise_scale: NoiseScale, /, *, batch: float, reference_batch: float) -> float:  # noqa: ARG001 - a rule's form
    """Return ε_opt(B)/ε_max = 1/(1 + φ/B) (McCandlish et al. 2018, arXiv 1812.06162, equation 2.6).

    The base rate is ε_max here, the largest that the loss stands without noise, and no reference batch enters.
    Assumes SGD and a curvature that is alike in all directions. Where φ is not resolved, its lower end stands for
    it, and the factor is an upper bound on the right one (1 where nothing is known: a warm-up covers that time).
    The open upper end would give 0, which never trains.
    """
    phi = noise_scale.lower if noise_scale.value is None else noise_scale.value
    return closed_form.learning_rate_share(phi, batch=batch)


def surge(noise_scale: NoiseScale, /, *, batch: float, reference_batch: float) -> float:
    """Return √(B/B0)·(φ + B0)/(φ + B): as the square root below φ, and falling again above (Li et al. 2024).

    It is the ratio of ε_opt ∝ 2/(√(φ/B) + √(B/φ)) at the two batches (arXiv 2405.14578), so that the base rate
    is the one tuned at B0, as for `gain`; the maximum, at B = φ, need not be known. Assumes updates by
    the sign of a Gaussian gradient, which stands for Adam. Where φ is not resolved, it is the smallest factor that φ's
    interval allows, as for `gain`: for a batch above the reference of which nothing is known, √(B0/B).
    """
    known = [noise_scale.lower, noise_scale.upper] if noise_scale.value is None else [noise_scale.value]
    least = min(closed_form.efficiency(phi, batch=batch, reference_batch=reference_batch) for phi in known)
    return math.sqrt(batch / reference_batch) * least


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

BetaRuleName = Literal["none", "square_root", "half_life"]
"""What a user writes to choose how Adam's β follow the batch."""


def adam_betas(
    rule: BetaRuleName, betas: tuple[float, float], *, batch: float, reference_batch: float
) -> tuple[float, float]:
    """Return Adam's β₁ and β₂ for a batch.

    none: as they are. square_root: 1 − β in proportion to the batch, for both, which belongs to the rate rule of that
    name (Malladi et al. 2022, arXiv 2205.10287; they scale ε by √(B0/B) too, which we leave alone); a batch so large
    that nothing would be remembered gets 0. half_life: β₂^(B/B0), which forgets over equal numbers of samples (Marek
    et al. 2025, arXiv 2507.07101); β₁ stays. For small 1 − β₂ the two agree on β₂.

    torch corrects Adam's bias by 1 − β^step, as though β had been the same all along. Once β^step is all but 0 there
    is nothing to correct: let β change after the first few 1/(1 − β₂) steps, or warm the rate up over them.

    Args:
        rule: which one.
        betas: β₁ and β₂ tuned at the reference batch.
        batch: in force, in samples.
        reference_batch: in samples.
    """
    first, second = betas
    ratio = batch / reference_batch
    if rule == "square_root":
        return max(1 - ratio * (1 - first), 0.0), max(1 - ratio * (1 - second), 0.0)
    if rule == "half_life":
        return first, second**ratio
    assert rule == "none", f"unknown rule of Adam's β: {rule!r}"
    return first, second


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
