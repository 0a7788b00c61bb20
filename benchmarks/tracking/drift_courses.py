"""Simulated measurements whose tr(Σ) and |G|² follow a given course; nothing is estimated here."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dptrain.noise import Moments, PresentState
from dptrain.noise.drift import NOW_SHARE, NOW_STEPS

Values = NDArray[np.float64]


def _late(share: Values, *, start: float) -> Values:
    return np.clip((share - start) / (1 - start), 0, 1)


COURSES: Mapping[str, tuple[Callable[[Values], Values], Callable[[Values], Values]]] = {
    "constant": (np.ones_like, np.ones_like),
    "|G|² ÷10 over the run": (np.ones_like, lambda share: 10**-share),
    "|G|² ÷10 in the last quarter": (np.ones_like, lambda share: 10 ** -_late(share, start=0.75)),
    "|G|² ÷10 at once at 90 %": (np.ones_like, lambda share: np.where(share > 0.9, 0.1, 1.0)),
    "tr(Σ) ×10 in the last quarter": (lambda share: 10 ** _late(share, start=0.75), np.ones_like),
}
"""Share of the run → tr(Σ) and |G|², in units of their first values (problem 13)."""

JUMP = "|G|² ÷10 at once at 90 %"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How a simulated run measures.

    Attributes:
        num_steps: measured steps.
        num_small: K small batches a step, equal in size.
        directions: d equal eigenvalues of Σ.
        ratio: φ/B at the start.
    """

    num_steps: int
    num_small: int
    directions: int
    ratio: float

    def __str__(self) -> str:
        return (
            f"{self.num_steps} steps, K = {self.num_small}, {self.directions} directions, φ/B = {self.ratio:g} at first"
        )


@dataclass(frozen=True, kw_only=True)
class Runs:
    """Many runs on one course: arrays of shape (steps, runs), and the course itself, of shape (steps,)."""

    setting: Setting
    batch: float
    true_trace: Values
    true_grad: Values
    trace: Values
    grad: Values

    def truth(self, step: int) -> float:
        """Return φ at present, after `step` steps: the ratio of the means over the last 1 % of them, 20 at least."""
        window = slice(max(0, step - math.ceil(max(NOW_STEPS, NOW_SHARE * step))), step)
        return float(self.true_trace[window].mean() / self.true_grad[window].mean())

    def moments(self, step: int, run: int) -> Moments:
        """Return what one step of one run measured."""
        return Moments(
            noise_trace=float(self.trace[step, run]),
            grad_sq_norm=float(self.grad[step, run]),
            num_samples=self.batch,
            num_small=self.setting.num_small,
        )

    def states(self, run: int, *, at: set[int]) -> dict[int, PresentState]:
        """Return what the estimate of the present remembers of one run after the steps `at`."""
        from dptrain.noise import present_updated

        state, found = PresentState(), {}
        for step in range(max(at)):
            state = present_updated(state, self.moments(step, run))
            if step + 1 in at:
                found[step + 1] = state
        return found


def simulated(course: str, setting: Setting, *, num_runs: int, seed: int) -> Runs:
    """Draw the measurements of many runs.

    Those of a step come from the exact laws of ‖g_k − g‖² and ‖g‖² for normal gradients with d equal eigenvalues.
    """
    rng = np.random.default_rng(seed)
    share = np.arange(1, setting.num_steps + 1) / setting.num_steps
    of_trace, of_grad = COURSES[course]
    trace, grad = 100 * of_trace(share), of_grad(share)
    batch, d, K = 100 / setting.ratio, setting.directions, setting.num_small
    shape = (setting.num_steps, num_runs)
    traces = trace[:, None] / d * rng.chisquare(d * (K - 1), shape) / (K - 1)
    large = trace[:, None] / d / batch * rng.noncentral_chisquare(d, (grad * batch * d / trace)[:, None], shape)
    return Runs(
        setting=setting,
        batch=batch,
        true_trace=trace,
        true_grad=grad,
        trace=traces,
        grad=large - traces / batch,
    )
