"""Ways to estimate the noise scale at present, beside the one that dptrain ships: each reads a run's whole history."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from benchmarks.tracking.drift_courses import Runs
from dptrain.noise import MomentSums, NoiseScale, SmoothedMoments, Smoothing, noise_scale, present_moments, smoothed
from dptrain.noise.drift import NOW_STEPS

Values = NDArray[np.float64]
Candidate = Callable[[Runs, int, int], NoiseScale]
"""(runs, number of the run, steps so far) → the noise scale that it would print."""

_LEPSKI_ERRORS = 2.0
_WINDOW_GROWTH = 1.3
_LEVEL_MEMORIES = (math.inf, 1 / 3, 1 / 9, 1 / 27, 1 / 81)


def shipped(runs: Runs, run: int, step: int) -> NoiseScale:
    """Dptrain's own."""
    return noise_scale(present_moments(runs.states(run, at={step})[step]))


def growing_window(runs: Runs, run: int, step: int) -> NoiseScale:
    """The window mean: half-life of 0.2 of the run so far."""
    sums, smoothing = MomentSums(), Smoothing()
    for at in range(step):
        sums = smoothing.update(sums, runs.moments(at, run))
    return noise_scale(smoothed(sums))


def last_steps(runs: Runs, run: int, step: int) -> NoiseScale:
    """The plain mean over the present itself."""
    return _of_windows(runs, run, step, trace_steps=NOW_STEPS, grad_steps=NOW_STEPS)


def lepski(runs: Runs, run: int, step: int) -> NoiseScale:
    """The longest plain window that agrees with all shorter ones within two standard errors (Lepski 1991)."""
    lengths = window_lengths(step)
    return _of_windows(
        runs,
        run,
        step,
        trace_steps=_longest_consistent(runs.trace[:step, run], lengths),
        grad_steps=_longest_consistent(runs.grad[:step, run], lengths),
    )


def local_level(runs: Runs, run: int, step: int) -> NoiseScale:
    """Local-level Kalman filters of several memories, believed by their likelihood: the drift variance is learned."""
    trace, grad = runs.trace[:step, run], runs.grad[:step, run]
    noise = np.cov(np.diff(trace), np.diff(grad)) / 2
    trace_mean, trace_var = _level(trace, noise=float(noise[0, 0]))
    grad_mean, grad_var = _level(grad, noise=float(noise[1, 1]))
    longest = max(noise[0, 0] / trace_var, noise[1, 1] / grad_var)
    return _read(trace_mean, grad_mean, trace_var, grad_var, float(noise[0, 1]) / longest, steps=step)


CANDIDATES: Mapping[str, Candidate] = {
    "window mean": growing_window,
    "last 20 steps": last_steps,
    "Lepski's window": lepski,
    "local level": local_level,
    "dptrain": shipped,
}


def window_lengths(step: int) -> list[int]:
    """Return the lengths of plain windows that are tried, from the present to the whole run."""
    lengths = [min(NOW_STEPS, step)]
    while lengths[-1] < step:
        lengths.append(min(step, math.ceil(_WINDOW_GROWTH * lengths[-1])))
    return lengths


def window_intervals(runs: Runs, step: int, length: int) -> tuple[Values, Values]:
    """Return lower and upper end of the plain window of the last `length` steps, for all runs."""
    scales = [_of_windows(runs, run, step, trace_steps=length, grad_steps=length) for run in range(runs.trace.shape[1])]
    return np.array([scale.lower for scale in scales]), np.array([scale.upper for scale in scales])


def _longest_consistent(values: Values, lengths: list[int]) -> int:
    means = [values[-length:].mean() for length in lengths]
    spreads = [(np.diff(values[-length:]) ** 2).mean() / 2 / length for length in lengths]
    for longer in range(1, len(lengths)):
        for shorter in range(longer):
            # The variance of the difference of nested means is the difference of their variances.
            room = _LEPSKI_ERRORS * math.sqrt(max(spreads[shorter] - spreads[longer], 0.0))
            if abs(means[longer] - means[shorter]) > room:
                return lengths[longer - 1]
    return lengths[-1]


def _of_windows(runs: Runs, run: int, step: int, *, trace_steps: int, grad_steps: int) -> NoiseScale:
    shortest, longest = min(trace_steps, grad_steps), max(trace_steps, grad_steps)
    trace, grad = runs.trace[:step, run], runs.grad[:step, run]
    changes = np.diff(trace[-longest:]), np.diff(grad[-longest:])
    return _read(
        float(trace[-trace_steps:].mean()),
        float(grad[-grad_steps:].mean()),
        float((np.diff(trace[-trace_steps:]) ** 2).mean()) / 2 / trace_steps,
        float((np.diff(grad[-grad_steps:]) ** 2).mean()) / 2 / grad_steps,
        float((changes[0] * changes[1]).mean()) / 2 / longest,
        steps=shortest,
    )


def _read(trace: float, grad: float, var_trace: float, var_grad: float, cov: float, *, steps: int) -> NoiseScale:
    return noise_scale(
        SmoothedMoments(
            noise_trace=trace,
            grad_sq_norm=grad,
            var_trace=var_trace,
            var_grad=var_grad,
            cov=cov,
            effective_steps=steps,
            degrees_of_freedom=2 / 3 * (steps - 1),
            num_steps=steps,
            num_samples=float(steps),
        )
    )


def _level(values: Values, *, noise: float) -> tuple[float, float]:
    count = len(_LEVEL_MEMORIES)
    level, var, belief = np.full(count, values[0]), np.full(count, noise), np.full(count, 1 / count)
    for step, value in enumerate(values[1:], start=2):
        gain = np.array([0.0 if math.isinf(share) else 1 / max(10.0, share * step) for share in _LEVEL_MEMORIES])
        var = var + noise * gain**2 / (1 - gain)
        error, width = value - level, var + noise
        logs = np.log(belief) - error**2 / width / 2 - np.log(width) / 2
        belief = np.exp(logs - logs.max())
        belief = 0.99 * belief / belief.sum() + 0.01 / count
        level, var = level + var / width * error, var * noise / width
    mean = float(belief @ level)
    return mean, float(belief @ (var + (level - mean) ** 2))
