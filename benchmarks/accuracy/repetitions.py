"""One row of the accuracy benchmark: many repetitions of a case against its known answer; nothing is measured here."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Any

from benchmarks.accuracy.wrappers import BEST_COMPILER
from dptrain.noise import NoiseScale, Resolution
from dptrain.tasks import KnownAnswer

LEVEL = 0.95
"""Of the meters' intervals."""


@dataclass(frozen=True, kw_only=True)
class Form:
    """How much is measured.

    Attributes:
        num_copies: of each model, in which as many repetitions run side by side.
        rounds: one after another.
        shortening: by which the number of steps of a repetition is divided.
        compiler: backend of torch.compile; None leaves out the compiled wrapper.
    """

    num_copies: int
    rounds: int
    shortening: int = 1
    compiler: str | None = BEST_COMPILER

    @property
    def num_repetitions(self) -> int:
        """Repetitions of each case."""
        return self.rounds * self.num_copies


FULL = Form(num_copies=40, rounds=12)
QUICK = Form(num_copies=20, rounds=1, shortening=4, compiler=None)  # compiling took a third of its time


def judged_row(
    *, problem: str, wrapper: str, layout: str, observer: str, truth: KnownAnswer, scales: list[NoiseScale]
) -> dict[str, Any]:
    """Return what a meter knew at the end of each repetition beside the truth.

    Args:
        problem: its name.
        wrapper: how the replicas are put together.
        layout: replicas × accumulation, or the shards in samples.
        observer: the meter's method.
        truth: what should have been found.
        scales: one for each repetition.
    """
    phi = truth.simple_noise_scale
    trace = _Mean.of([scale.noise_trace for scale in scales], truth=truth.noise_trace)
    grad = _Mean.of([scale.grad_sq_norm for scale in scales], truth=truth.grad_sq_norm)
    coverage = statistics.fmean(scale.lower <= phi <= scale.upper for scale in scales)
    return {
        "problem": problem,
        "wrapper": wrapper,
        "layout": layout,
        "observer": observer,
        "judged": True,
        "num_repetitions": len(scales),
        "num_steps": scales[0].num_steps,
        "true_trace": truth.noise_trace,
        "mean_trace": trace.mean,
        "trace_error": trace.relative_error,
        "trace_chance": trace.standard_error,
        "true_grad": truth.grad_sq_norm,
        "mean_grad": grad.mean,
        "grad_error": grad.relative_error,
        "grad_chance": grad.standard_error,
        "true_scale": phi,
        "scale": trace.mean / grad.mean,
        "coverage": coverage,
        "resolved": statistics.fmean(scale.state is Resolution.RESOLVED for scale in scales),
        # The scatter of one step as the meters estimate it: the variance of the mean, undone.
        "step_var_trace": statistics.fmean(scale.var_trace * scale.effective_steps for scale in scales),
        "step_var_grad": statistics.fmean(scale.var_grad * scale.effective_steps for scale in scales),
        "step_cov": statistics.fmean(scale.cov * scale.effective_steps for scale in scales),
        "shown_chance": f"{trace.standard_error:.2%}, {grad.standard_error:.2%}",
        "shown_coverage": f"{coverage:.1%}",
    }


def plain_row(
    *, problem: str, wrapper: str, layout: str, observer: str, truth: KnownAnswer, found: KnownAnswer
) -> dict[str, Any]:
    """Return a row of one long estimate that comes without an interval, and is not judged."""
    return {
        "problem": problem,
        "wrapper": wrapper,
        "layout": layout,
        "observer": observer,
        "judged": False,
        "true_trace": truth.noise_trace,
        "mean_trace": found.noise_trace,
        "trace_error": abs(found.noise_trace / truth.noise_trace - 1),
        "true_grad": truth.grad_sq_norm,
        "mean_grad": found.grad_sq_norm,
        "grad_error": abs(found.grad_sq_norm / truth.grad_sq_norm - 1),
        "true_scale": truth.simple_noise_scale,
        "scale": found.noise_trace / found.grad_sq_norm if found.grad_sq_norm > 0 else -1.0,
        "shown_chance": "",
        "shown_coverage": "no interval",
    }


@dataclass(frozen=True, kw_only=True)
class _Mean:
    """The mean of one half of the pair over all repetitions, relative to the truth; chance leaves `standard_error`."""

    mean: float
    relative_error: float
    standard_error: float

    @classmethod
    def of(cls, values: list[float], *, truth: float) -> _Mean:
        mean = statistics.fmean(values)
        return cls(
            mean=mean,
            relative_error=abs(mean / truth - 1),
            standard_error=statistics.stdev(values) / math.sqrt(len(values)) / truth,
        )
