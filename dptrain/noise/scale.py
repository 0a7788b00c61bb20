"""The noise scale as a reader gets it: value, interval, and the state of what is known of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from dptrain.errors import ConfigError
from dptrain.noise.smoothing import SmoothedMoments

_ROUNDING = 1e-15
_RESOLVED_BY = 2.0
"""How many times the half-width of its interval |G|² must be before a ratio is printed.

At 1 the ratio appears when chance makes |G|² large: the first value printed was 0.4 to 0.6 of the truth (median; B =
φ/16, two small batches, 20 and 100 directions of noise), at 2 it was 0.9, at 2.5 0.9 to 0.95 after twice the steps.
"""
_HEAVY_SHARE, _FEWEST_HEAVY = 0.004, 1.5
"""Share of values of tr(Σ) beyond five standard errors of their prediction, and their least count, from which tails are
called heavy. Of whole-sample Student t in 20 directions, 32 samples a step, 400 steps, the median run has 0.25 % at ν
= 4, 0.75 % at 3 and 1 % at 2.5 (0.5 % in the mildest twentieth); normal noise in 20 directions has none."""
_ROUNDING_TRACE = 1e-6
"""Of |G|²: equal small batches leave so much of either sign in single precision."""
_INCONSISTENT_Z = 5.0
"""Standard errors below zero from which on tr(Σ) is inconsistent: by chance 3 times in 10 million readings."""
_LARGEST_T = 1e60
"""Stands for infinity: a t that nothing passes, whose fourth power is finite."""


class Resolution(StrEnum):
    """What the measurement so far allows to be said."""

    RESOLVED = "resolved"
    """Both ends of the interval are known."""
    AT_LEAST = "at least"
    """|G|² is not distinguishable from zero: only the lower end is known."""
    NOT_RESOLVED = "not resolved yet"
    """Neither |G|² nor tr(Σ) is distinguishable from zero."""
    INCONSISTENT = "inconsistent"
    """tr(Σ), which is a sum of squares in truth, is below zero by far more than chance explains: a misuse."""


@dataclass(frozen=True, kw_only=True)
class NoiseScale:
    """An estimate of the simple noise scale φ = tr(Σ)/|G|², in samples, with what is known of it.

    The interval is Fieller's (1954) for the ratio of two correlated means, by Student's t. The pair and its covariance
    are those of the present, the mean over the last 1 % of the measured steps and 20 at least, unless they were read
    off a window; see `docs/noise-scale.md`.

    Attributes:
        noise_trace: tr(Σ) at present; signed.
        grad_sq_norm: |G|² at present; signed.
        var_trace: variance of the error of `noise_trace`.
        var_grad: variance of `grad_sq_norm`.
        cov: covariance of the two.
        effective_steps: how many steps of equal weight |G|² is worth; 0 before the first.
        degrees_of_freedom: of the variances.
        num_steps: steps measured since the start.
        num_samples: samples measured since the start.
        level: confidence of `lower` and `upper`, such as 0.95.
        state: what may be said.
        value: the ratio, in samples; None unless resolved.
        lower: lower end, in samples; 0 where nothing is known.
        upper: upper end, in samples; infinite where open.
        window_mean: the ratio of the running means, whose half-life is 20 % of the run, where this is the
            present; None where it is not known.
        warnings: what makes the number doubtful, a sentence each.
    """

    noise_trace: float
    grad_sq_norm: float
    var_trace: float
    var_grad: float
    cov: float
    effective_steps: float
    degrees_of_freedom: float
    num_steps: int
    num_samples: float
    level: float
    state: Resolution
    value: float | None
    lower: float
    upper: float
    window_mean: float | None = None
    warnings: tuple[str, ...] = ()

    def contrast(self, phi: float) -> float:
        """Return how sure it is that the noise scale is above `phi`, in standard errors of a normal.

        Tests tr(Σ) − phi·|G|² > 0, which needs no resolved ratio: where the batch is far too small, |G|² drowns
        in noise for long while this linear contrast is known within tens of steps. Positive: above; negative:
        below; 0 where nothing is known.

        Args:
            phi: a noise scale in samples.
        """
        # Divided by the larger of 1 and phi, so that no square overflows.
        unit = max(abs(phi), 1.0)
        a, b = 1 / unit, phi / unit
        difference = a * self.noise_trace - b * self.grad_sq_norm
        independent = a * a * self.var_trace + b * b * self.var_grad
        if not math.isfinite(independent) or difference == 0:
            return 0.0
        # Where the two are all but proportional, rounding must not turn a small variance into none.
        variance = max(independent - 2 * a * b * self.cov, _ROUNDING * independent)
        if variance == 0:
            return math.copysign(math.inf, difference)
        return _normal_of_t(difference / math.sqrt(variance), self.degrees_of_freedom)

    def bounds(self, z: float) -> tuple[float, float]:
        """Return the noise scales that the contrast does not reject at `z` standard errors, as (lower, upper).

        (0, inf) where nothing is known, and where tr(Σ) is inconsistent: a misuse tells nothing of either end.
        """
        if self.state is Resolution.INCONSISTENT:
            return 0.0, math.inf
        return _fieller(self, _t_of_normal(z, self.degrees_of_freedom))

    def steps_until(self, relative_error: float) -> float | None:
        """Estimate how many further steps bring the relative standard error of the ratio to `relative_error`.

        The relative variance, by first-order propagation, falls as one over the number of steps as long as nothing
        drifts. None where |G|² or tr(Σ) is not positive yet, so that no ratio exists to speak of.

        Raises:
            ConfigError: where `relative_error` is not positive.
        """
        if not relative_error > 0:
            raise ConfigError(f"relative_error must be positive, such as 0.1, got {relative_error!r}")
        if not (self.noise_trace > 0 and self.grad_sq_norm > 0 and math.isfinite(self.var_trace)):
            return None
        relative_variance = (
            self.var_trace / self.noise_trace / self.noise_trace
            + self.var_grad / self.grad_sq_norm / self.grad_sq_norm
            - 2 * self.cov / self.noise_trace / self.grad_sq_norm
        )
        return max(0.0, self.num_steps * (relative_variance / relative_error / relative_error - 1))

    def __str__(self) -> str:
        if self.state is Resolution.RESOLVED and not self.value:  # tr(Σ) is at or below zero
            return f"at most {_short(self.upper)}"
        if self.state is Resolution.RESOLVED:
            return f"{_short(self.value)} [{_short(self.lower)}, {_short(self.upper)}]"
        if self.state is Resolution.AT_LEAST:
            return f"at least {_short(self.lower)}"
        return str(self.state)


def noise_scale(
    moments: SmoothedMoments | None,
    *,
    level: float = 0.95,
    window: SmoothedMoments | None = None,
    warnings: tuple[str, ...] = (),
) -> NoiseScale:
    """Read the noise scale off the pair. This is the only place where the two are divided.

    Args:
        moments: the pair; None before the first step.
        level: confidence of the interval, between 0 and 1.
        window: means over the window, where `moments` is the present.
        warnings: what makes the pair doubtful.
    """
    if not 0 < level < 1:
        raise ConfigError(f"level must lie between 0 and 1, such as 0.95, got {level!r}")
    if moments is None:
        moments = _NOTHING
    lower, upper = _fieller(moments, _t_of_level(level, moments.degrees_of_freedom))
    half_width = _t_of_level(level, moments.degrees_of_freedom) * math.sqrt(moments.var_grad)
    if _below_zero(moments if window is None else window):
        state, value, lower, upper = Resolution.INCONSISTENT, None, 0.0, math.inf
    elif math.isfinite(upper) and moments.grad_sq_norm >= _RESOLVED_BY * half_width:
        state, value = Resolution.RESOLVED, max(moments.noise_trace, 0.0) / moments.grad_sq_norm
    elif 0 < lower < math.inf:
        state, value, upper = Resolution.AT_LEAST, None, math.inf
    else:  # infinite too, where |G|² is zero without any error
        state, value, lower, upper = Resolution.NOT_RESOLVED, None, 0.0, math.inf
    return NoiseScale(
        noise_trace=moments.noise_trace,
        grad_sq_norm=moments.grad_sq_norm,
        var_trace=moments.var_trace,
        var_grad=moments.var_grad,
        cov=moments.cov,
        effective_steps=moments.effective_steps,
        degrees_of_freedom=moments.degrees_of_freedom,
        num_steps=moments.num_steps,
        num_samples=moments.num_samples,
        level=level,
        state=state,
        value=value,
        lower=lower,
        upper=upper,
        window_mean=None if window is None else noise_scale(window, level=level).value,
        warnings=warnings,
    )


def heavy_tails(lone_share: float, *, num_steps: int) -> str | None:
    """Return a warning where the share of values that stand alone is that of heavy tails, else None.

    Args:
        lone_share: share of steps beyond five standard errors of their prediction.
        num_steps: of which it is the share.
    """
    if lone_share < _HEAVY_SHARE or lone_share * num_steps < _FEWEST_HEAVY:
        return None
    return (
        f"heavy tails: {lone_share:.1%} of steps lie beyond 5 standard errors; the interval may be too narrow, and "
        "tr(Σ) too small"
    )


def _below_zero(moments: SmoothedMoments) -> bool:
    """Say whether tr(Σ) is significantly negative."""
    if not (moments.noise_trace < 0 and math.isfinite(moments.var_trace)):
        return False
    if moments.var_trace == 0:
        return moments.noise_trace < -_ROUNDING_TRACE * abs(moments.grad_sq_norm)
    t = moments.noise_trace / math.sqrt(moments.var_trace)
    return _normal_of_t(t, moments.degrees_of_freedom) < -_INCONSISTENT_Z


_NOTHING = SmoothedMoments(
    noise_trace=0.0,
    grad_sq_norm=0.0,
    var_trace=math.inf,
    var_grad=math.inf,
    cov=0.0,
    effective_steps=0.0,
    degrees_of_freedom=1.0,
    num_steps=0,
    num_samples=0.0,
)


def _fieller(pair: NoiseScale | SmoothedMoments, t: float) -> tuple[float, float]:
    """Return the ends of the set of φ ≥ 0 with (S − φG)² ≤ t²·Var(S − φG), as (lower, upper).

    S and G are first moved to zero where chance made them negative: both are squares in truth, and a negative
    |G|² must widen the interval towards infinity, never turn it over.
    """
    if not (math.isfinite(pair.var_trace) and math.isfinite(pair.var_grad)):
        return 0.0, math.inf
    s, g = max(pair.noise_trace, 0.0), max(pair.grad_sq_norm, 0.0)
    # All is of order one in these units, whatever the scale of the gradients.
    unit_s = max(s, math.sqrt(pair.var_trace)) or 1.0
    unit_g = max(g, math.sqrt(pair.var_grad)) or 1.0
    s, g, t = s / unit_s, g / unit_g, min(t, _LARGEST_T)
    var_s = t * t * (pair.var_trace / unit_s / unit_s)
    var_g = t * t * (pair.var_grad / unit_g / unit_g)
    cov = t * t * (pair.cov / unit_s / unit_g)
    # a·φ² − 2b·φ + c ≤ 0, with the discriminant b² − ac written so that s²g² has cancelled already.
    a, b, c = g * g - var_g, s * g - cov, s * s - var_s
    root = math.sqrt(max(s * s * var_g + g * g * var_s - 2 * s * g * cov - (var_s * var_g - cov * cov), 0.0))
    if a > 0:
        # The smaller root through the product of the two, c/a, for its difference form loses digits.
        upper = (b + root) / a
        lower = c / (b + root) if b + root > 0 else 0.0
    elif c > 0:
        # |G|² is not distinguishable from zero but tr(Σ) is: the set is open above, and 0 is not in it.
        lower, upper = (c / (b + root) if b + root > 0 else math.inf), math.inf
    else:
        lower, upper = 0.0, math.inf
    lower, upper = max(lower, 0.0) * unit_s / unit_g, max(upper, 0.0) * unit_s / unit_g
    if a > 0:
        # Rounding must not put the ratio itself outside.
        ratio = max(pair.noise_trace, 0.0) / pair.grad_sq_norm
        lower, upper = min(lower, ratio), max(upper, ratio)
    return lower, upper


def _t_of_level(level: float, degrees_of_freedom: float) -> float:
    from scipy.special import stdtrit

    # Here and below the lower tail, which keeps its digits where the upper one rounds to 1.
    return abs(float(stdtrit(degrees_of_freedom, (1 - level) / 2)))


def _t_of_normal(z: float, degrees_of_freedom: float) -> float:
    from scipy.special import ndtr, stdtrit

    return abs(float(stdtrit(degrees_of_freedom, float(ndtr(-z)))))


def _normal_of_t(t: float, degrees_of_freedom: float) -> float:
    from scipy.special import ndtri, stdtr

    return math.copysign(float(-ndtri(stdtr(degrees_of_freedom, -abs(t)))), t)


def _short(value: float | None) -> str:
    """Write a count with two to three digits and a letter for thousands and millions."""
    if value is None or not math.isfinite(value):
        return "∞"
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.3g}"
