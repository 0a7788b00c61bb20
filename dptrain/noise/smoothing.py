"""The running mean of the pair (tr(Σ), |G|²) over steps, weighted and decayed in samples, with its covariance."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

from dptrain.errors import ConfigError
from dptrain.noise.moments import Moments


@dataclass(frozen=True, kw_only=True)
class MomentSums:
    """All that is remembered of the past: plain sums, so that JSON carries them bit for bit.

    Step t has the pair x_t = (tr(Σ), |G|²) and the weight ω_t: its samples, decayed since. Names: `trace` and
    `grad` are the two halves of the pair, `square` sums carry ω², `lag` sums carry ω_t·ω_(t−1).
    """

    steps: int = 0
    samples: float = 0.0
    weight: float = 0.0
    trace: float = 0.0
    grad: float = 0.0
    square_weight: float = 0.0
    square_trace: float = 0.0
    square_grad: float = 0.0
    square_trace_trace: float = 0.0
    square_grad_grad: float = 0.0
    square_trace_grad: float = 0.0
    lag_weight: float = 0.0
    lag_trace: float = 0.0
    lag_grad: float = 0.0
    lag_trace_trace: float = 0.0
    lag_grad_grad: float = 0.0
    last_weight: float = 0.0
    last_trace: float = 0.0
    last_grad: float = 0.0

    def to_json(self) -> dict[str, float]:
        """Return the record as a flat mapping; Python writes each float so that it reads back the same."""
        return asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, float]) -> MomentSums:
        """Rebuild the record.

        Raises:
            ConfigError: where a name is missing or unknown, so that a foreign record is never half read.
        """
        names = {field.name for field in fields(cls)}
        if names != set(record):
            raise ConfigError(f"not a noise state: names differ by {sorted(names ^ set(record))}")
        return cls(**{**record, "steps": int(record["steps"])})  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class SmoothedMoments:
    """The weighted means with the covariance of their error.

    Attributes:
        noise_trace: mean tr(Σ).
        grad_sq_norm: mean |G|².
        var_trace: variance of `noise_trace`.
        var_grad: variance of `grad_sq_norm`.
        cov: covariance of the two.
        effective_steps: number of independent steps that carry as much information as the decayed, correlated
            ones; below 2 the variances are infinite.
        num_steps: steps measured since the start.
        num_samples: samples measured since the start.
    """

    noise_trace: float
    grad_sq_norm: float
    var_trace: float
    var_grad: float
    cov: float
    effective_steps: float
    num_steps: int
    num_samples: float


@dataclass(frozen=True, kw_only=True)
class Smoothing:
    """How fast the past is forgotten: always by samples, so that a change of batch rescales nothing.

    The noise scale drifts on the time scale of the training itself, which differs by orders of magnitude between
    problems and stages. So by default the memory grows with the run: the half-life is the fraction `memory` of
    the samples measured so far, which makes the mean an average over roughly the last quarter of the run at
    every stage, with 0.4 of all steps as its effective number. A fixed half-life is for those who know theirs.

    Attributes:
        memory: half-life as a fraction of the samples measured so far.
        half_life_samples: a fixed half-life instead, in samples.
    """

    memory: float = 0.2
    half_life_samples: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.memory < math.inf:
            raise ConfigError(f"memory must be a positive fraction of the run, got {self.memory!r}")
        if self.half_life_samples is not None and not self.half_life_samples > 0:
            raise ConfigError(f"half_life_samples must be positive, got {self.half_life_samples!r}")

    def _keep(self, sums: MomentSums, num_samples: float) -> float:
        """Return the factor by which `num_samples` more samples fade what is remembered."""
        if sums.samples == 0:
            return 0.0
        if self.half_life_samples is not None:
            return math.pow(0.5, num_samples / self.half_life_samples)
        # Solves d(ln weight)/d(samples) = −ln 2 / (memory · samples) over the step exactly, so that the result
        # does not depend on how the samples were cut into steps.
        return math.pow(sums.samples / (sums.samples + num_samples), math.log(2) / self.memory)

    def update(self, sums: MomentSums, moments: Moments) -> MomentSums:
        """Fade the past by this step's samples and add its pair with its samples as weight."""
        x, y, w = moments.noise_trace, moments.grad_sq_norm, moments.num_samples
        keep = self._keep(sums, w)
        keep_square = keep * keep
        square = w * w
        lag = w * keep * sums.last_weight
        return MomentSums(
            steps=sums.steps + 1,
            samples=sums.samples + w,
            weight=keep * sums.weight + w,
            trace=keep * sums.trace + w * x,
            grad=keep * sums.grad + w * y,
            square_weight=keep_square * sums.square_weight + square,
            square_trace=keep_square * sums.square_trace + square * x,
            square_grad=keep_square * sums.square_grad + square * y,
            square_trace_trace=keep_square * sums.square_trace_trace + square * x * x,
            square_grad_grad=keep_square * sums.square_grad_grad + square * y * y,
            square_trace_grad=keep_square * sums.square_trace_grad + square * x * y,
            lag_weight=keep_square * sums.lag_weight + lag,
            lag_trace=keep_square * sums.lag_trace + lag * (x + sums.last_trace),
            lag_grad=keep_square * sums.lag_grad + lag * (y + sums.last_grad),
            lag_trace_trace=keep_square * sums.lag_trace_trace + lag * x * sums.last_trace,
            lag_grad_grad=keep_square * sums.lag_grad_grad + lag * y * sums.last_grad,
            last_weight=w,
            last_trace=x,
            last_grad=y,
        )


def smoothed(sums: MomentSums) -> SmoothedMoments | None:
    """Return the de-biased means with the covariance of their error; None before the first step.

    The covariance is the empirical one, Σ ω²(x − x̄)(x − x̄)ᵀ / (Σω)², which needs no model of the noise and stays
    right when the batch, and with it the variance of a step, changes on the way. Steps that follow each other are
    correlated where the gradient drifts slowly; the correlation ρ of neighbours is measured, and where it is
    larger than chance would give it the variance is multiplied by (1 + ρ)/(1 − ρ), the long-run factor of a
    first-order autoregression. That the drift within the memory also widens the spread is left in: the interval
    is one for the mean over the memory, and says so by being wider where that mean is a poor summary.
    """
    if sums.steps == 0 or sums.weight <= 0:
        return None
    x, y = sums.trace / sums.weight, sums.grad / sums.weight
    kish = sums.weight**2 / sums.square_weight
    effective = kish / _correlation_factor(sums, x, y, kish)
    if effective > 1 and kish > 1:
        # kish/(kish − 1) undoes the loss of one degree of freedom to the mean.
        scale = kish / (kish - 1) * (kish / effective) / sums.weight**2
        var_trace, var_grad, cov = (scale * spread for spread in _spreads(sums, x, y))
        bound = math.sqrt(var_trace * var_grad)
        cov = min(max(cov, -bound), bound)
    else:
        var_trace, var_grad, cov = math.inf, math.inf, 0.0
    return SmoothedMoments(
        noise_trace=x,
        grad_sq_norm=y,
        var_trace=var_trace,
        var_grad=var_grad,
        cov=cov,
        effective_steps=effective,
        num_steps=sums.steps,
        num_samples=sums.samples,
    )


def _spreads(sums: MomentSums, x: float, y: float) -> tuple[float, float, float]:
    """Return Σ ω²(x_t − x)², Σ ω²(y_t − y)² and Σ ω²(x_t − x)(y_t − y)."""
    w = sums.square_weight
    trace = sums.square_trace_trace - 2 * x * sums.square_trace + x * x * w
    grad = sums.square_grad_grad - 2 * y * sums.square_grad + y * y * w
    both = sums.square_trace_grad - x * sums.square_grad - y * sums.square_trace + x * y * w
    return max(trace, 0.0), max(grad, 0.0), both


def _correlation_factor(sums: MomentSums, x: float, y: float, kish: float) -> float:
    """Return how many correlated steps count as one independent step; at least 1."""
    trace_spread, grad_spread, _ = _spreads(sums, x, y)
    lag_trace = sums.lag_trace_trace - x * sums.lag_trace + x * x * sums.lag_weight
    lag_grad = sums.lag_grad_grad - y * sums.lag_grad + y * y * sums.lag_weight
    rho = max(
        lag_trace / trace_spread if trace_spread > 0 else 0.0,
        lag_grad / grad_spread if grad_spread > 0 else 0.0,
    )
    # Under independence ρ scatters by 1/√steps: twice that is the bar, so that white noise costs nothing.
    if not rho > 2 / math.sqrt(max(kish, 1.0)):
        return 1.0
    rho = min(rho, 0.95)
    return (1 + rho) / (1 - rho)
