"""The time of an optimizer step as a posterior over three positive parts, from the medians of the shapes timed so far.

T = per_step_s + accumulation_steps × (per_micro_batch_s + per_sample_s × max(m, k)) for a micro-batch of m samples,
which is flat below k, where the device is not full. The prior is uniform over how the time of the present step splits
into its three parts, so no part of the posterior mean is 0 or a boundary. Others in use are non-negative least
squares, whose answer for few noisy shapes is often "a sample costs nothing", and the line without a knee (Pollux, Qiao
et al. 2021).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from dptrain.batch import BatchPlan

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_DIVISIONS = 32
"""Of the side of the triangle of splits: 1,024 of them, 3 % apart, as far as a median can be trusted. What is below the
resolution, such as a shape of 1/32 of the present one's time, must be given with a variance to match."""


@dataclass(frozen=True, kw_only=True)
class StepTimeModel:
    """Posterior mean and covariance of the three parts of a step's time, on some number of replicas.

    Attributes:
        per_step_s: all-reduce, optimizer, and what else a step costs however many samples it has.
        per_micro_batch_s: what a forward–backward costs however many samples it has.
        per_sample_s: what each further sample of a micro-batch adds.
        covariance: of the three, row by row, in s².
        full_at_samples: k, the micro-batch up to which a forward–backward takes no longer; 0 where none is seen.
        world_size: number of replicas that it holds for.
        timed_batches: the global batches that it was fitted to, rising.
        recent_batches: those of them that were timed lately.
        error: relative error of its predictions of shapes not timed before, the median; None where it made none.
    """

    per_step_s: float
    per_micro_batch_s: float
    per_sample_s: float
    covariance: tuple[tuple[float, float, float], ...]
    full_at_samples: float
    world_size: int
    timed_batches: tuple[int, ...]
    recent_batches: tuple[int, ...]
    error: float | None

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> StepTimeModel:
        """Return what `asdict` wrote; JSON has lists for tuples."""
        first, second, third = (tuple(row) for row in record["covariance"])
        batches = {name: tuple(record[name]) for name in ("timed_batches", "recent_batches")}
        return cls(**{**record, **batches, "covariance": (first, second, third)})

    @property
    def is_split_known(self) -> bool:
        """Whether two batches were timed; with one, its time is right and the split is the prior's."""
        return len(self.timed_batches) > 1

    def seconds(self, shape: BatchPlan) -> float:
        """Return the time of a step of `shape`."""
        return self.step_s(shape.micro_batch_size, shape.accumulation_steps)

    def step_s(self, micro_batch_size: float, accumulation_steps: float) -> float:
        """Return the time of a step, of sizes that may lie between those that run."""
        return self.per_step_s + accumulation_steps * self.micro_batch_s(micro_batch_size)

    def micro_batch_s(self, micro_batch_size: float) -> float:
        """Return the time of one forward–backward."""
        return self.per_micro_batch_s + self.per_sample_s * max(micro_batch_size, self.full_at_samples)

    def log_ratio(self, one: tuple[float, float], other: tuple[float, float]) -> tuple[float, float]:
        """Return mean and variance of ln T(one) − ln T(other), to first order in the covariance.

        Args:
            one: micro-batch size and accumulation steps.
            other: the same of another step.
        """
        times = self.step_s(*one), self.step_s(*other)
        costs = _costs(*one, self.full_at_samples), _costs(*other, self.full_at_samples)
        slope = [a / times[0] - b / times[1] for a, b in zip(*costs, strict=True)]
        variance = math.fsum(slope[i] * slope[j] * self.covariance[i][j] for i in range(3) for j in range(3))
        return math.log(times[0] / times[1]), max(variance, 0.0)


@dataclass(frozen=True, kw_only=True)
class ShapeTime:
    """The time of one shape, for `fit`.

    Attributes:
        shape: which one.
        seconds: median of its durations.
        variance: of the logarithm of that.
        is_recent: whether it was timed lately.
    """

    shape: BatchPlan
    seconds: float
    variance: float
    is_recent: bool = True


def fit(times: Sequence[ShapeTime], *, error: float | None = None) -> StepTimeModel:
    """Return the posterior given the times of some shapes on equally many replicas.

    Each split of the present step's time is weighed by the squared misfit of the logarithms of all medians; the level
    is profiled out. Of the knees the one with the most evidence is taken: before anything was timed none is as likely
    as one at any of the places together.

    Args:
        times: at least one, the present shape last.
        error: kept in the model.
    """
    import numpy as np

    seconds = np.log([time.seconds for time in times])
    precision = 1 / np.array([time.variance for time in times])
    shapes = [(float(time.shape.micro_batch_size), time.shape.accumulation_steps) for time in times]
    knees = _knees([micro_batch_size for micro_batch_size, _ in shapes])

    def posterior(knee: float) -> tuple[float, float, NDArray[np.float64], NDArray[np.float64]]:
        costs = np.array([_costs(*shape, knee) for shape in shapes])
        residuals = seconds - np.log(_splits() @ (costs / costs[-1]).T)
        level = residuals @ precision / precision.sum()
        misfits = (residuals - level[:, None]) ** 2 @ precision
        weights = np.exp((misfits.min() - misfits) / 2) / (len(knees) - 1 if knee else 1)
        evidence = math.log(weights.sum()) - misfits.min() / 2
        return evidence, knee, weights / weights.sum(), np.exp(level)[:, None] * _splits() / costs[-1]

    _, knee, weights, parts = max(map(posterior, knees), key=itemgetter(0))
    mean = weights @ parts
    covariance = ((parts - mean) * weights[:, None]).T @ (parts - mean)
    return StepTimeModel(
        per_step_s=float(mean[0]),
        per_micro_batch_s=float(mean[1]),
        per_sample_s=float(mean[2]),
        covariance=tuple((float(a), float(b), float(c)) for a, b, c in covariance),
        full_at_samples=knee,
        world_size=times[-1].shape.world_size,
        timed_batches=tuple(sorted({time.shape.global_batch_size for time in times})),
        recent_batches=tuple(sorted({time.shape.global_batch_size for time in times if time.is_recent})),
        error=error,
    )


@cache
def _splits() -> NDArray[np.float64]:
    """Return (1024, 3) positive shares of a step's time, each row adding up to 1: the centres of equal triangles."""
    import numpy as np

    n = _DIVISIONS
    upright = [(i + 1 / 3, j + 1 / 3) for i in range(n) for j in range(n - i)]
    inverted = [(i + 2 / 3, j + 2 / 3) for i in range(n) for j in range(n - 1 - i)]
    two = np.array(upright + inverted) / n
    return np.column_stack([two, 1 - two.sum(axis=1)])


def _costs(micro_batch_size: float, accumulation_steps: float, knee: float) -> tuple[float, float, float]:
    """Return how often a step pays per_step_s, per_micro_batch_s and per_sample_s."""
    return 1.0, accumulation_steps, accumulation_steps * max(micro_batch_size, knee)


def _knees(micro_batch_sizes: Sequence[float]) -> list[float]:
    """Return where the time may begin to rise: 0, or from the second micro-batch on, with those in between."""
    timed = sorted(set(micro_batch_sizes))
    if len(timed) <= 2:  # noqa: PLR2004 - a line goes through two
        return [0.0]
    return [0.0, *timed[1:-1], *(math.sqrt(smaller * larger) for smaller, larger in pairwise(timed))]
