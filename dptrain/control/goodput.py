"""The law that makes the progress per second greatest, from the noise scale and the measured time of a step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from dptrain.control.base import Decision, Law, Measurement
from dptrain.control.noise_law import IntervalLaw
from dptrain.control.step_time import StepTimeModel
from dptrain.errors import ConfigError

_ROUNDING = 1e-14
_EXPONENTS = (-60.0, 40.0)
_MOST_GUESSES = 60
_LARGEST = 1e300
"""Stands for an infinite noise scale."""
_CLOSE = 1e-9
"""Octaves from which on a batch, or its noise scale, is met."""
_LARGEST_DOUBT = 0.5
"""Share of the mean time of a sample that a further one is taken to need at least where the step-time model is off by
more, or where that is not known yet: as in the split that is assumed while one batch was timed."""


@dataclass(frozen=True, kw_only=True)
class FastestLaw(IntervalLaw):
    """B with the most progress per second, B/((B + κφ)·T(B)), for a known time T of a step.

    Progress per sample is 1/(B + κφ) up to a factor (McCandlish et al. 2018, arXiv 1812.06162, equation 2.7; Pollux,
    Qiao et al. 2021, OSDI, equation 5; both with κ = 1). With T = α + βB the best batch is √(κφ·α/β): at κ = 1
    `ExchangeRateLaw` with r = α/β. For any other T that rises ever faster, or as fast, a batch B is right for the
    noise scale at which B/√2 and √2·B are equally fast: on a ladder of powers of two, whose rungs they are, that is
    the best rung itself.

    Attributes:
        seconds: T, in any unit, for a global batch that may lie between those that run.
        critical_ratio: κ, critical batch size over noise scale: `derived.CRITICAL_RATIOS`, with a margin.
    """

    seconds: Callable[[float], float]
    critical_ratio: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.critical_ratio < math.inf:
            raise ConfigError(
                f"critical_ratio (critical batch over noise scale) must be positive, got {self.critical_ratio}"
            )

    def noise_scale_for(self, batch: float) -> float:
        """Return the noise scale at which B/√2 and √2·B make the same progress per second; ∞ where none does."""
        smaller, larger = self.seconds(batch / math.sqrt(2)), self.seconds(batch * math.sqrt(2))
        saved = 2 * smaller - larger  # by one step of the larger instead of two of the smaller
        if not saved > _ROUNDING * larger:
            return math.inf
        return math.sqrt(2) * batch * (larger - smaller) / saved / self.critical_ratio

    def batch_for(self, noise_scale: float) -> float:
        """Return the smallest batch that is right for `noise_scale` or for a larger one."""
        if not noise_scale > 0:
            return noise_scale  # 0, or NaN
        wanted = math.log2(min(noise_scale, _LARGEST))

        def miss(exponent: float) -> float:
            right = self.noise_scale_for(2**exponent)
            return math.log2(right) - wanted if right > 0 else -math.inf

        (low, high), below, above = _EXPONENTS, -math.inf, miss(_EXPONENTS[1])
        if above < 0:
            return math.inf
        # Each decision asks twice. In logarithms the noise scale is nearly a line, whose crossing takes a few guesses
        # where halving takes forty (regula falsi; an end that stays twice counts half: Illinois).
        stayed = 0.0
        for _ in range(_MOST_GUESSES):
            if high - low <= _CLOSE:
                break
            guess = (low * above - high * below) / (above - below) if math.isfinite(above - below) else (low + high) / 2
            found = miss(guess)
            if abs(found) <= _CLOSE:
                return 2**guess
            if found < 0:
                low, below, above = guess, found, above / 2 if stayed < 0 else above
            else:
                high, below, above = guess, below / 2 if stayed > 0 else below, found
            stayed = found
        return 2**high

    def samples_per_step(self, batch: float) -> float:
        """Return r, the samples that one step fewer is worth near `batch`: α/β where T = α + βB."""
        right = self.noise_scale_for(batch)
        return batch * batch / (self.critical_ratio * right) if right > 0 else math.inf


@dataclass(frozen=True, kw_only=True)
class GoodputLaw(Law):
    """B with the most progress per second on the hardware at hand, by the times that its steps took.

    As the batch grows the micro-batch rises first, up to the largest, and then the accumulation steps do: a
    GPU that is not full takes more samples for little. Where nothing was timed yet, or only steps of one batch, half
    of the present step's time is taken to be per step: then r is the present batch, and B goes half of the way (in log
    space) to the noise scale, which times a second batch. Where that would stay at the first, which is right only by
    the assumption, the law asks for the double, once: without it the run could stay far from the best for ever. The
    double and not the half, because a run often begins at the smallest batch that runs. In the part of a run in
    which the batch is not to shrink it asks for the double in place of less, too.

    A model that is off by a tenth cannot tell a sample that takes no time from one that takes a tenth of the mean: so
    at the present batch a further sample is taken to need that share of the mean at least, or a half where the model is
    off by more. Else a few noisy steps make a step worth infinitely many samples, and the batch is soon too large.
    Where the batch ends, the doubt costs that share of the progress per second at most.

    Attributes:
        largest_micro_batch_size: in samples.
        least_accumulation_steps: passes of a replica in a step, however small the batch.
        grow_only_samples: from the start, in which `limited` lets the batch grow alone.
        critical_ratio: critical batch size over noise scale, as for `FastestLaw`.
        z: standard errors of a normal at which a noise scale counts as rejected.
    """

    largest_micro_batch_size: int
    least_accumulation_steps: int = 1
    grow_only_samples: int = 0
    critical_ratio: float = 1.0
    z: float = 1.0

    def __post_init__(self) -> None:
        for name in ("largest_micro_batch_size", "least_accumulation_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        self._fastest(float)

    def decide(self, measurement: Measurement) -> Decision:
        """Ask `FastestLaw` with the time that a step takes by now."""
        batch, model = measurement.global_batch_size, measurement.step_time
        if model is None or not model.is_split_known:
            return self._without_split(measurement)
        fitted = self.step_time(model, present=batch)
        doubted = _doubted(fitted, present=batch, error=model.error)
        law = self._fastest(doubted)
        decision = law.decide(measurement)
        samples = f"{law.samples_per_step(batch):.3g} samples{'' if doubted is fitted else ' at most'}"
        return replace(decision, reason=f"a step is worth {samples} ({_split(model)}); {decision.reason}")

    def _without_split(self, measurement: Measurement) -> Decision:
        """Decide while steps of one batch were timed at most."""
        batch, phi = measurement.global_batch_size, measurement.noise_scale
        law = self._fastest(lambda other: batch + other)
        decision = law.decide(measurement)
        reason = f"a step is worth {batch} samples (assumed: one batch was timed); {decision.reason}"
        is_measured = abs(phi.contrast(law.noise_scale_for(batch))) > 0
        may_shrink = measurement.samples_seen >= self.grow_only_samples
        is_moving = decision.global_batch_size > batch or (decision.global_batch_size < batch and may_shrink)
        if measurement.step_time is None or is_moving or not is_measured:
            return replace(decision, reason=reason)
        return Decision(global_batch_size=2 * batch, reason=f"{reason}; to time another, grow to {2 * batch}")

    def _fastest(self, seconds: Callable[[float], float]) -> FastestLaw:
        return FastestLaw(seconds=seconds, critical_ratio=self.critical_ratio, z=self.z)

    def step_time(self, model: StepTimeModel, *, present: float) -> Callable[[float], float]:  # noqa: ARG002 - Pollux' asks
        """Return the time of a step against its global batch, laid out as it will be.

        Args:
            model: fitted to the steps so far.
            present: the global batch in force.
        """
        return lambda batch: model.step_s(**self.layout(model, batch))

    def layout(self, model: StepTimeModel, batch: float) -> dict[str, float]:
        """Return the micro-batch and the accumulation steps of a global batch, which may lie between those that run."""
        share = batch / model.world_size
        accumulation_steps = max(share / self.largest_micro_batch_size, self.least_accumulation_steps)
        return {"micro_batch_size": share / accumulation_steps, "accumulation_steps": accumulation_steps}


def _doubted(seconds: Callable[[float], float], *, present: float, error: float | None) -> Callable[[float], float]:
    """Return T, with more per sample where a further one at `present` needs less than `error` of the mean's time."""
    further = seconds(present * math.sqrt(2)) - seconds(present / math.sqrt(2))
    mean = seconds(present) / present
    missing = min(_LARGEST_DOUBT if error is None else error, _LARGEST_DOUBT) * mean - math.sqrt(2) * further / present
    return (lambda batch: seconds(batch) + missing * batch) if missing > 0 else seconds


def _split(model: StepTimeModel) -> str:
    parts = f"{_time(model.per_step_s)} a step, {_time(model.per_pass_s)} a pass, {_time(model.per_sample_s)} a sample"
    if model.full_at_samples:
        parts = f"{parts} from {model.full_at_samples:.3g} a pass on"
    return parts if model.error is None else f"{parts}, off by {model.error:.0%}"


def _time(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.3g} s"
    return f"{1e3 * seconds:.3g} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.3g} µs"  # noqa: PLR2004 - a millisecond
