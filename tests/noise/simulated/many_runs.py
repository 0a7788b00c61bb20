"""Simulated runs, many at once: each has tr(Σ) = 100·trace_t and |G|² = grad_t, so that φ = 100 at the start."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dptrain.noise import Moments, MomentSums, SmoothedMoments, Smoothing, noise_scale, smoothed

GROWING = Smoothing()
NUM_RUNS = 2000


def absorb(steps, *, smoothing=GROWING):
    sums = MomentSums()
    for trace, grad, num_samples in steps:
        sums = smoothing.update(sums, Moments(noise_trace=trace, grad_sq_norm=grad, num_samples=float(num_samples)))
    return sums


def by_step(value):
    """Return a number, or one per step, so that it broadcasts against (num_steps, num_runs)."""
    value = np.asarray(value, float)
    return value[:, None] if value.ndim == 1 else value


@dataclass(frozen=True, kw_only=True)
class Run:
    """A way to train: K small batches a step, d equal eigenvalues of Σ, and how truth and batch move on the way."""

    batches: np.ndarray
    K: int = 4
    d: int = 30
    trace: np.ndarray | float = 1.0
    grad: np.ndarray | float = 1.0
    smoothing: Smoothing = GROWING

    def measured(self, rng, *, num_runs=NUM_RUNS):
        """Draw every step of many runs and smooth them: the fields are arrays over runs.

        The estimates of a step come from the exact laws of their squared norms, ‖g_k − g‖² and ‖g‖², for normal
        gradients.
        """
        shape = (len(self.batches), num_runs)
        B, S, G = (by_step(v) for v in (self.batches, 100 * self.trace, self.grad))
        traces = S / self.d * rng.chisquare(self.d * (self.K - 1), shape) / (self.K - 1)
        large = S / self.d / B * rng.noncentral_chisquare(self.d, G * B * self.d / S, shape)
        grads = large - traces / B
        return smoothed(absorb(zip(traces, grads, self.batches, strict=True), smoothing=self.smoothing))

    def truth(self):
        """The ratio of the means of the true pair over the memory."""
        zero = np.zeros((len(self.batches), 1))
        S, G = (by_step(v) + zero for v in (100 * self.trace, self.grad))
        found = absorb(zip(S, G, self.batches, strict=True), smoothing=self.smoothing)
        return found.trace / found.grad


def readings(measured, *, level=0.95):
    """One noise scale per run."""
    shared = {
        name: getattr(measured, name) for name in ("effective_steps", "degrees_of_freedom", "num_steps", "num_samples")
    }
    columns = (measured.noise_trace, measured.grad_sq_norm, measured.var_trace, measured.var_grad, measured.cov)
    return [
        noise_scale(
            SmoothedMoments(noise_trace=s, grad_sq_norm=g, var_trace=vs, var_grad=vg, cov=c, **shared), level=level
        )
        for s, g, vs, vg, c in zip(*(column.tolist() for column in columns), strict=True)
    ]


def coverage(scales, truth):
    """Return the share of intervals that hold the truth, one truth for all or one each."""
    truths = np.broadcast_to(truth, len(scales))
    return np.mean([s.lower <= t <= s.upper for s, t in zip(scales, truths, strict=True)])


def constant(batch, num_steps):
    return np.full(num_steps, float(batch))
