"""The running mean of the pair (tr(Σ), |G|²) over steps, weighted and decayed in samples, with its covariance."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

from dptrain.errors import ConfigError
from dptrain.noise.moments import Moments

# Beyond these a square in the sums would overflow, or lose its digits and feign certainty.
_LARGEST_PAIR = 1e100
_LARGEST_BATCH = 1e20


@dataclass(frozen=True, kw_only=True)
class MomentSums:
    """All that is remembered of the past: plain sums, so that JSON carries them bit for bit.

    Step t has the pair x_t = (tr(Σ), |G|²) and the weight ω_t: its samples, decayed since. `trace` and `grad` are
    Σ ω x of the two halves. The `change` sums run over the changes x_t − x_(t−1) of neighbouring steps, with the
    weights ω_t², and so start at the second step.
    """

    steps: int = 0
    samples: float = 0.0
    weight: float = 0.0
    trace: float = 0.0
    grad: float = 0.0
    square_weight: float = 0.0
    change_weight: float = 0.0
    change_trace_trace: float = 0.0
    change_grad_grad: float = 0.0
    change_trace_grad: float = 0.0
    change_square_weight: float = 0.0
    change_lag_weight: float = 0.0
    last_trace: float = 0.0
    last_grad: float = 0.0
    last_change_weight: float = 0.0

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
        values = {name: float(value) for name, value in record.items() if name != "steps"}
        return cls(steps=int(record["steps"]), **values)


@dataclass(frozen=True, kw_only=True)
class SmoothedMoments:
    """The weighted means with the covariance of their error.

    Attributes:
        noise_trace: mean tr(Σ).
        grad_sq_norm: mean |G|².
        var_trace: variance of `noise_trace`; infinite after a single step, as are its kin.
        var_grad: variance of `grad_sq_norm`.
        cov: covariance of the two.
        effective_steps: how many steps of equal weight the decayed ones are worth.
        degrees_of_freedom: of the variances, at least 1.
        num_steps: steps measured since the start.
        num_samples: samples measured since the start.
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


@dataclass(frozen=True, kw_only=True)
class Smoothing:
    """How fast the past is forgotten.

    The noise scale drifts on the time scale of the training itself, which differs by orders of magnitude between
    problems and stages. So by default the memory grows with the run: the half-life is the fraction `memory` of
    the run so far, which makes the mean an average over roughly its last quarter at every stage, with 0.4 of all steps
    as its effective number. A run is counted in samples and in steps, and the faster of the two forgets: below the
    noise scale training goes on with the samples, above it with the steps, and a run that began at far too large a
    batch has seen more samples in a few steps than it will see in hundreds of its later ones. A fixed half-life is for
    those who know theirs.

    Attributes:
        memory: half-life as a fraction of what was measured so far, of samples or of steps, whichever forgets faster.
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
        # Solves d(ln weight)/d(samples) = −ln 2 / (memory · samples) over the step exactly, and the same in steps.
        kept = min(sums.samples / (sums.samples + num_samples), sums.steps / (sums.steps + 1))
        return math.pow(kept, math.log(2) / self.memory)

    def update(self, sums: MomentSums, moments: Moments) -> MomentSums:
        """Fade the past by this step's samples and add its pair with its samples as weight.

        A pair whose squares a float cannot hold (not finite, beyond 1e±100) is refused: the sums come back as
        they were.
        """
        if not fits(moments):
            return sums
        x, y, w = moments.noise_trace, moments.grad_sq_norm, moments.num_samples
        dx, dy = x - sums.last_trace, y - sums.last_grad
        square = w * w
        change = square if sums.steps else 0.0
        keep = self._keep(sums, w)
        keep_2 = keep * keep
        keep_4 = keep_2 * keep_2
        return MomentSums(
            steps=sums.steps + 1,
            samples=sums.samples + w,
            weight=keep * sums.weight + w,
            trace=keep * sums.trace + w * x,
            grad=keep * sums.grad + w * y,
            square_weight=keep_2 * sums.square_weight + square,
            change_weight=keep_2 * sums.change_weight + change,
            change_trace_trace=keep_2 * sums.change_trace_trace + change * dx * dx,
            change_grad_grad=keep_2 * sums.change_grad_grad + change * dy * dy,
            change_trace_grad=keep_2 * sums.change_trace_grad + change * dx * dy,
            change_square_weight=keep_4 * sums.change_square_weight + change * change,
            change_lag_weight=keep_4 * sums.change_lag_weight + keep_2 * sums.last_change_weight * change,
            last_trace=x,
            last_grad=y,
            last_change_weight=change,
        )


def fits(moments: Moments) -> bool:
    """Return whether a float holds the squares of a pair and of its weight."""
    x, y, w = moments.noise_trace, moments.grad_sq_norm, moments.num_samples
    if not (math.isfinite(x) and math.isfinite(y)):
        return False
    size = max(abs(x), abs(y))
    return (size == 0 or 1 / _LARGEST_PAIR < size < _LARGEST_PAIR) and 1 / _LARGEST_BATCH < w < _LARGEST_BATCH


def smoothed(sums: MomentSums) -> SmoothedMoments | None:
    """Return the de-biased means with the covariance of their error; None before the first step.

    The error is that against the same mean of the true |G|² and tr(Σ) along the way. Each step draws its own
    samples, so given the parameters its error is independent of all before, and the covariance of the mean is
    Σ ω² Cov(x_t) / (Σ ω)². Here Cov(x_t) is half the mean square change from step to step (von Neumann 1941). That
    needs no model of the noise, stays right when the batch, and with it the variance of a step, changes on the
    way, and is blind to the slow drift of the truth: the spread about the mean would count the drift as noise, and
    a measured correlation of neighbours, which drift causes, would widen the interval several times.

    Not covered is data whose neighbouring batches resemble each other, such as a stream read unshuffled: there
    the error itself is correlated, and the interval too narrow.
    """
    if sums.steps == 0:
        return None
    var_trace, var_grad, cov, degrees_of_freedom = math.inf, math.inf, 0.0, 1.0
    if sums.change_weight > 0:
        share = sums.square_weight / sums.weight / sums.weight
        var_trace, var_grad, cov = (
            share * change / (2 * sums.change_weight)
            for change in (sums.change_trace_trace, sums.change_grad_grad, sums.change_trace_grad)
        )
        # Satterthwaite's number for normal errors: two neighbouring changes share a step, whence the lag.
        degrees_of_freedom = 2 * sums.change_weight**2 / (2 * sums.change_square_weight + sums.change_lag_weight)
    return SmoothedMoments(
        noise_trace=sums.trace / sums.weight,
        grad_sq_norm=sums.grad / sums.weight,
        var_trace=var_trace,
        var_grad=var_grad,
        cov=cov,
        effective_steps=sums.weight * (sums.weight / sums.square_weight),
        degrees_of_freedom=max(degrees_of_freedom, 1.0),
        num_steps=sums.steps,
        num_samples=sums.samples,
    )
