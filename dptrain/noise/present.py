"""The pair (tr(Σ), |G|²) at present: two drifting quantities, with the noise of a step learned from step to step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from dptrain.errors import ConfigError
from dptrain.noise import drift as drifts
from dptrain.noise.drift import Drift
from dptrain.noise.moments import Moments
from dptrain.noise.smoothing import SmoothedMoments, fits

_FADING = 3.5
"""Power of the run with which the weight of a step in the noise fades: half of all steps count."""

_LARGEST_CHANGE = 25.0
"""Cap on a squared change, in units of the mean one: a spike of 260 standard errors would rule the noise for the rest
of the run, and normal changes exceed it once in two million."""

_FEW_CHANGES = 10
"""Changes before which none is capped: their own mean is not known yet."""

_HARDLY_KNOWN = 50
"""Steps before which the noise of the past is not rescaled by the level."""

_SMALLEST_NOISE = 1e-24
"""Least variance of a step, in units of the squared value: what rounding leaves of a signal without noise."""


class PresentState(NamedTuple):
    """All that the estimate of the present remembers: plain numbers, so that JSON carries them bit for bit.

    It is a tuple because one is made at each step: a frozen dataclass takes three times as long.

    Attributes:
        steps: measured.
        samples: measured.
        trace, grad: the two quantities as their filters see them; None before the first step.
        last_trace, last_grad: the last step's pair.
        last_unit_trace, last_unit_grad: what its variances were in theory but for one factor each (F4).
        batch, num_small: of the last step.
        weight, square_weight: Σω and Σω² of the changes below, ω fading with the run.
        trace_trace, grad_grad, trace_grad: Σω of squared changes (and their product) in units of theory.
    """

    steps: int = 0
    samples: float = 0.0
    trace: Drift | None = None
    grad: Drift | None = None
    last_trace: float = 0.0
    last_grad: float = 0.0
    last_unit_trace: float = 0.0
    last_unit_grad: float = 0.0
    batch: float = 0.0
    num_small: int = 0
    weight: float = 0.0
    square_weight: float = 0.0
    trace_trace: float = 0.0
    grad_grad: float = 0.0
    trace_grad: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Return the record; Python writes each float so that it reads back the same."""
        return {
            "steps": self.steps,
            "samples": self.samples,
            "trace": self.trace and self.trace.to_json(),
            "grad": self.grad and self.grad.to_json(),
            "batch": self.batch,
            "num_small": self.num_small,
            **{part: [getattr(self, name) for name in names] for part, names in _LISTS.items()},
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> PresentState:
        """Rebuild the record, or one of before, in which all had names.

        Raises:
            ConfigError: where a name is missing or unknown, so that a foreign record is never half read.
        """
        values = dict(record)
        if set(record) != set(cls._fields):
            expected = {"steps", "samples", "trace", "grad", "batch", "num_small", *_LISTS}
            if expected != set(record):
                raise ConfigError(f"not a noise state: names differ by {sorted(expected ^ set(record))}")
            for part, names in _LISTS.items():
                values |= zip(names, values.pop(part), strict=True)
        for name, value in values.items():
            if name in ("trace", "grad"):
                values[name] = None if value is None else Drift.from_json(value)
            else:
                values[name] = int(value) if name in ("steps", "num_small") else float(value)
        return cls(**values)


_LISTS = {
    "last": ("last_trace", "last_grad", "last_unit_trace", "last_unit_grad"),
    "changes": ("weight", "square_weight", "trace_trace", "grad_grad", "trace_grad"),
}
"""What the record holds as lists: name → the fields in their order."""


def present_updated(state: PresentState, moments: Moments) -> PresentState:
    """Take in one step's pair.

    A pair whose squares a float cannot hold is refused: the state comes back as it was.
    """
    if not fits(moments):
        return state
    x, y, batch, small = moments.noise_trace, moments.grad_sq_norm, moments.num_samples, moments.num_small
    if state.trace is None or state.grad is None:
        unit_trace, unit_grad = _units(max(x, 0.0), max(y, 0.0), batch=batch, num_small=small)
        return PresentState(
            steps=1,
            samples=batch,
            trace=drifts.begun(x, flicker=drifts.TRACE_FLICKER),
            grad=drifts.begun(y, flicker=drifts.GRAD_FLICKER),
            last_trace=x,
            last_grad=y,
            last_unit_trace=unit_trace,
            last_unit_grad=unit_grad,
            batch=batch,
            num_small=small,
        )
    level_trace, level_grad = drifts.level_of(state.trace.memories), drifts.level_of(state.grad.memories)
    levels = max(level_trace, 0.0), max(level_grad, 0.0)
    unit_trace, unit_grad = _units(*levels, batch=batch, num_small=small)
    # While the level is hardly known, only the sizes say how the noise changed: weights that follow a chance level
    # would draw tr(Σ) down (to 0.5 of the truth after 20 steps with one direction of noise).
    unit_trace_before, unit_grad_before = (
        _units(*levels, batch=state.batch, num_small=state.num_small)
        if state.steps < _HARDLY_KNOWN
        else (state.last_unit_trace, state.last_unit_grad)
    )
    weight, square_weight, trace_trace, grad_grad, trace_grad = _changes(
        state, x=x, y=y, unit_trace=unit_trace, unit_grad=unit_grad
    )
    step = state.steps + 1
    return PresentState(
        steps=step,
        samples=state.samples + batch,
        trace=drifts.updated(
            state.trace,
            x,
            level=level_trace,
            noise=_noise(trace_trace / weight, unit=unit_trace, size=x),
            rescale=_ratio(unit_trace, unit_trace_before),
            step=step,
            flicker=drifts.TRACE_FLICKER,
        ),
        grad=drifts.updated(
            state.grad,
            y,
            level=level_grad,
            noise=_noise(grad_grad / weight, unit=unit_grad, size=y),
            rescale=_ratio(unit_grad, unit_grad_before),
            step=step,
            flicker=drifts.GRAD_FLICKER,
        ),
        last_trace=x,
        last_grad=y,
        last_unit_trace=unit_trace,
        last_unit_grad=unit_grad,
        batch=batch,
        num_small=small,
        weight=weight,
        square_weight=square_weight,
        trace_trace=trace_trace,
        grad_grad=grad_grad,
        trace_grad=trace_grad,
    )


def _units(trace: float, grad: float, *, batch: float, num_small: int) -> tuple[float, float]:
    """Return the variances of a step's tr(Σ) and |G|² but for one factor each (F4), by level and sizes.

    With all eigenvalues of Σ equal, in d directions, the factor is 1/d. It is measured, so what counts is how the
    variances follow the levels, the batch and the number of small batches.
    """
    share = num_small / (num_small - 1)
    noise = trace / batch
    return 2 * trace * trace / (num_small - 1), 2 * noise * noise * share + 4 * grad * noise


def _ratio(unit: float, before: float) -> float:
    return unit / before if unit > 0 and before > 0 else 1.0


def _noise(factor: float, *, unit: float, size: float) -> float:
    return max(factor * unit, _SMALLEST_NOISE * size * size, 1e-300)


def _changes(
    state: PresentState, *, x: float, y: float, unit_trace: float, unit_grad: float
) -> tuple[float, float, float, float, float]:
    """Return the faded sums over squared changes with the newest one, of which half is the variance of a step.

    They are `weight`, `square_weight`, `trace_trace`, `grad_grad` and `trace_grad` of the new state.

    von Neumann (1941): a slow drift all but cancels in the change from step to step.
    """
    keep = (state.steps / (state.steps + 1)) ** _FADING
    a = _change(x - state.last_trace, unit_trace + state.last_unit_trace)
    b = _change(y - state.last_grad, unit_grad + state.last_unit_grad)
    a *= _shrink(a, mean_square=state.trace_trace / state.weight if state.steps > _FEW_CHANGES else math.inf)
    b *= _shrink(b, mean_square=state.grad_grad / state.weight if state.steps > _FEW_CHANGES else math.inf)
    return (
        keep * state.weight + 1,
        keep * keep * state.square_weight + 1,
        keep * state.trace_trace + a * a,
        keep * state.grad_grad + b * b,
        keep * state.trace_grad + a * b,
    )


def _change(difference: float, unit: float) -> float:
    return difference / math.sqrt(unit) if unit > 0 else 0.0


def _shrink(change: float, *, mean_square: float) -> float:
    square = change * change
    return math.sqrt(_LARGEST_CHANGE * mean_square / square) if square > _LARGEST_CHANGE * mean_square else 1.0


def present_moments(state: PresentState) -> SmoothedMoments | None:
    """Return the pair at present with the covariance of its error; None before the first step.

    The present is the mean over about the last 1 % of the measured steps, and 20 at least.
    """
    if state.trace is None or state.grad is None:
        return None
    if not state.weight > 0:
        return SmoothedMoments(
            noise_trace=state.last_trace,
            grad_sq_norm=state.last_grad,
            var_trace=math.inf,
            var_grad=math.inf,
            cov=0.0,
            effective_steps=1.0,
            degrees_of_freedom=1.0,
            num_steps=state.steps,
            num_samples=state.samples,
        )
    noise_trace = _noise(state.trace_trace / state.weight, unit=state.last_unit_trace, size=state.last_trace)
    noise_grad = _noise(state.grad_grad / state.weight, unit=state.last_unit_grad, size=state.last_grad)
    noise_both = state.trace_grad / state.weight * math.sqrt(state.last_unit_trace * state.last_unit_grad)
    effective = state.weight * state.weight / state.square_weight
    trace, var_trace = drifts.present(state.trace, noise=noise_trace, step=state.steps)
    grad, var_grad = drifts.present(state.grad, noise=noise_grad, step=state.steps)
    # A variance is zero where gradients are so small that its squares underflow.
    steps_trace = noise_trace / var_trace if var_trace > 0 else effective
    steps_grad = noise_grad / var_grad if var_grad > 0 else effective
    return SmoothedMoments(
        noise_trace=trace,
        grad_sq_norm=grad,
        var_trace=var_trace,
        var_grad=var_grad,
        # Two means share the noise of the steps that both hold: that of the longer one covers the other's.
        cov=noise_both / max(steps_trace, steps_grad),
        effective_steps=steps_grad,
        # As for the window: neighbouring changes share a step, which costs a third (Satterthwaite).
        degrees_of_freedom=max(2 / 3 * effective, 1.0),
        num_steps=state.steps,
        num_samples=state.samples,
    )
