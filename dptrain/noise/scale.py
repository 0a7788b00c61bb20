"""The noise scale as a reader gets it: value, interval, and the state of what is known of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from dptrain.errors import ConfigError
from dptrain.noise.smoothing import SmoothedMoments


class Resolution(StrEnum):
    """What the measurement so far allows to be said."""

    RESOLVED = "resolved"
    """Both ends of the interval are known."""
    AT_LEAST = "at least"
    """|G|² cannot be told from zero: only the lower end is known."""
    NOT_RESOLVED = "not resolved yet"
    """Neither |G|² nor tr(Σ) can be told from zero."""


@dataclass(frozen=True, kw_only=True)
class NoiseScale:
    """An estimate of the simple noise scale φ = tr(Σ)/|G|², in samples, with what is known of it.

    The interval is Fieller's (1954) for the ratio of two correlated means, by Student's t with the effective
    number of steps less one as degrees of freedom. It is an interval for the mean over the memory of the
    smoothing.

    Attributes:
        noise_trace: smoothed tr(Σ); signed.
        grad_sq_norm: smoothed |G|²; signed.
        var_trace: variance of `noise_trace`.
        var_grad: variance of `grad_sq_norm`.
        cov: covariance of the two.
        degrees_of_freedom: of the variances.
        num_steps: steps measured since the start.
        num_samples: samples measured since the start.
        level: confidence of `lower` and `upper`, such as 0.95.
        state: what may be said.
        value: the ratio, in samples; None unless resolved.
        lower: lower end, in samples; 0 where nothing is known.
        upper: upper end, in samples; infinite where open.
    """

    noise_trace: float
    grad_sq_norm: float
    var_trace: float
    var_grad: float
    cov: float
    degrees_of_freedom: float
    num_steps: int
    num_samples: float
    level: float
    state: Resolution
    value: float | None
    lower: float
    upper: float

    def contrast(self, phi: float) -> float:
        """Return how sure it is that the noise scale is above `phi`, in standard errors of a normal.

        tests tr(Σ) − phi·|G|² > 0, which needs no resolved ratio: where the batch is far too small, |G|² drowns
        in noise for long while this linear contrast is known within tens of steps. Positive: above; negative:
        below; 0 where nothing is known.

        Args:
            phi: a noise scale in samples, finite.
        """
        variance = self.var_trace + phi * phi * self.var_grad - 2 * phi * self.cov
        difference = self.noise_trace - phi * self.grad_sq_norm
        if not math.isfinite(variance) or difference == 0:
            return 0.0
        if variance <= 0:
            return math.copysign(math.inf, difference)
        return _normal_of_t(difference / math.sqrt(variance), self.degrees_of_freedom)

    def bounds(self, z: float) -> tuple[float, float]:
        """Return the noise scales that the contrast does not reject at `z` standard errors, as (lower, upper).

        (0, inf) where nothing is known.
        """
        return _fieller(self, _t_of_normal(z, self.degrees_of_freedom))

    def steps_until(self, relative_error: float) -> float | None:
        """Estimate how many further steps bring the relative standard error of the ratio to `relative_error`.

        The present relative variance, by first-order propagation, falls as one over the number of steps. None
        where |G|² or tr(Σ) is not positive yet, so that no ratio exists to speak of.
        """
        if not (self.noise_trace > 0 and self.grad_sq_norm > 0 and math.isfinite(self.var_trace)):
            return None
        relative_variance = (
            self.var_trace / self.noise_trace**2
            + self.var_grad / self.grad_sq_norm**2
            - 2 * self.cov / (self.noise_trace * self.grad_sq_norm)
        )
        return max(0.0, self.num_steps * (relative_variance / relative_error**2 - 1))

    def __str__(self) -> str:
        level = f"{self.level:.0%}"
        if self.state is Resolution.RESOLVED:
            return f"{_short(self.value)} ({_short(self.lower)}–{_short(self.upper)}, {level})"
        if self.state is Resolution.AT_LEAST:
            return f"at least {_short(self.lower)} ({level})"
        return str(self.state)


def noise_scale(moments: SmoothedMoments | None, *, level: float = 0.95) -> NoiseScale:
    """Read the noise scale off the smoothed pair. This is the only place where the two are divided.

    Args:
        moments: the smoothed pair; None before the first step.
        level: confidence of the interval, between 0 and 1.
    """
    if not 0 < level < 1:
        raise ConfigError(f"level must lie between 0 and 1, such as 0.95, got {level!r}")
    if moments is None:
        moments = SmoothedMoments(
            noise_trace=0.0,
            grad_sq_norm=0.0,
            var_trace=math.inf,
            var_grad=math.inf,
            cov=0.0,
            effective_steps=0.0,
            num_steps=0,
            num_samples=0.0,
        )
    fields = {
        "noise_trace": moments.noise_trace,
        "grad_sq_norm": moments.grad_sq_norm,
        "var_trace": moments.var_trace,
        "var_grad": moments.var_grad,
        "cov": moments.cov,
        "degrees_of_freedom": max(moments.effective_steps - 1, 1.0),
    }
    scale = _Pair(**fields)
    lower, upper = _fieller(scale, _t_of_level(level, scale.degrees_of_freedom))
    if math.isfinite(upper):
        state, value = Resolution.RESOLVED, max(moments.noise_trace, 0.0) / moments.grad_sq_norm
    else:
        state, value = (Resolution.AT_LEAST if lower > 0 else Resolution.NOT_RESOLVED), None
    return NoiseScale(
        **fields,
        num_steps=moments.num_steps,
        num_samples=moments.num_samples,
        level=level,
        state=state,
        value=value,
        lower=lower,
        upper=upper,
    )


@dataclass(frozen=True, kw_only=True)
class _Pair:
    """The part of a noise scale that Fieller's theorem reads."""

    noise_trace: float
    grad_sq_norm: float
    var_trace: float
    var_grad: float
    cov: float
    degrees_of_freedom: float


def _fieller(pair: NoiseScale | _Pair, t: float) -> tuple[float, float]:
    """Solve (S − φG)² ≤ t²·Var(S − φG) for φ ≥ 0.

    S and G are first moved to zero where chance made them negative: both are squares in truth, and a negative
    |G|² must widen the interval towards infinity, never turn it over.
    """
    s, g = max(pair.noise_trace, 0.0), max(pair.grad_sq_norm, 0.0)
    if not (math.isfinite(pair.var_trace) and math.isfinite(pair.var_grad)):
        return 0.0, math.inf
    a = g * g - t * t * pair.var_grad
    b = s * g - t * t * pair.cov
    c = s * s - t * t * pair.var_trace
    root = math.sqrt(max(b * b - a * c, 0.0))
    if a > 0:
        # The larger root in its stable form; the smaller one through the product of the roots, c/a.
        upper = (b + root) / a if b >= 0 else c / (b - root) if b != root else 0.0
        lower = c / (b + root) if b + root > 0 else (b - root) / a
        return max(lower, 0.0), max(upper, 0.0)
    if c > 0:
        # |G|² is not told from zero but tr(Σ) is: the set is open above, and 0 is not in it.
        denominator = b + root
        return (c / denominator if denominator > 0 else math.inf), math.inf
    return 0.0, math.inf


def _t_of_level(level: float, degrees_of_freedom: float) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(degrees_of_freedom, 0.5 + level / 2))


def _t_of_normal(z: float, degrees_of_freedom: float) -> float:
    from scipy.special import ndtr, stdtrit

    return float(stdtrit(degrees_of_freedom, float(ndtr(z))))


def _normal_of_t(t: float, degrees_of_freedom: float) -> float:
    from scipy.special import ndtri, stdtr

    # The lower tail keeps its digits where the upper one rounds to 1.
    return math.copysign(float(-ndtri(stdtr(degrees_of_freedom, -abs(t)))), t)


def _short(value: float | None) -> str:
    """Write a count with two to three digits and a letter for thousands and millions."""
    if value is None or not math.isfinite(value):
        return "∞"
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.3g}"
