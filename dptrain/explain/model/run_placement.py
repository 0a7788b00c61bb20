"""The steps and samples of a run against the fixed batches that its own noise scale implies."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dptrain.control import CriticalRatio
from dptrain.explain.model.adaptive import adaptive_side
from dptrain.explain.record import SAMPLES, RunRecord, column, is_resolved, noise_scales

if TYPE_CHECKING:
    from numpy.typing import NDArray

RESOLVED_SHARE = 0.5
"""Part of the samples that must have a resolved noise scale; chosen by hand, and named where it is missed."""


_LEAST_SAVING = 0.005  # half a per cent is less than what the estimate leaves out


@dataclass(frozen=True, kw_only=True)
class ImpliedFrontier:
    """What fixed batches would have needed for the progress of a run, by its noise scale φ alone.

    A step at batch B makes 1/(1 + φ/B) of the progress of one without noise, if the learning rate suits each batch;
    a fixed batch then takes S = S_min + E_min/B steps and E = E_min + B·S_min samples, see `adaptive`.

    Attributes:
        min_steps: S_min, fewest steps, by ever larger batches.
        min_samples: E_min, fewest samples, by ever smaller ones.
    """

    min_steps: float
    min_samples: float

    @property
    def noise_scale(self) -> float:
        """E_min/S_min in samples: the noise scale averaged over the run's progress. Not fitted, so no B_crit."""
        return self.min_samples / self.min_steps

    def steps(self, batch: float) -> float:
        """Return the steps that a fixed batch takes."""
        return self.min_steps + self.min_samples / batch

    def samples(self, batch: float) -> float:
        """Return the samples that a fixed batch takes."""
        return self.min_samples + self.min_steps * batch

    def saving(self, *, steps: float, samples: float) -> float:
        """Return which part of the steps, and of the samples, a point saves against a fixed batch in its direction.

        That is the fixed batch samples/steps, the point's own mean; negative where it needs fewer of both.
        """
        return 1 - 1 / (self.min_steps / steps + self.min_samples / samples)


@dataclass(frozen=True, kw_only=True)
class RunPlacement:
    """The steps and samples of a run, with fixed batches at the measured noise scale and both ends of its interval.

    Attributes:
        steps: optimizer steps that it took.
        samples: samples that it saw.
        implied: by the estimates.
        low: by the lower ends of all intervals at once.
        high: by the upper ends of all intervals at once; more pessimistic than the interval's level.
        best_saving: part of both that a batch which follows the noise scale exactly saves against the best fixed one.
    """

    steps: float
    samples: float
    implied: ImpliedFrontier
    low: ImpliedFrontier
    high: ImpliedFrontier
    best_saving: float

    @property
    def batch(self) -> float:
        """The mean batch, in samples."""
        return self.samples / self.steps

    @property
    def saving(self) -> float | None:
        """Part of steps and samples saved against a fixed batch of the same mean; negative where more were needed.

        None where it is no more than a rounding, or has not the same sign at both ends of the interval.
        """
        curves = (self.implied, self.low, self.high)
        saved = [curve.saving(steps=self.steps, samples=self.samples) for curve in curves]
        proven = min(saved) >= _LEAST_SAVING or max(saved) <= -_LEAST_SAVING
        return saved[0] if proven else None


def resolved_share(record: RunRecord) -> float:
    """Return the part of the samples that were seen while both ends of the interval were known."""
    _, samples = _increments(record)
    resolved = np.array([is_resolved(row) for row in record.train])
    return float(samples[resolved].sum() / samples.sum())


def position(record: RunRecord, *, up_to_samples: float = math.inf) -> RunPlacement | None:
    """Place a run, or its beginning, among fixed batches; None where its noise scale was resolved too rarely.

    Steps without a resolved noise scale count with that of the nearest step before them, or else after them.

    Args:
        record: the run.
        up_to_samples: where the beginning ends; at least one row.
    """
    if resolved_share(record) < RESOLVED_SHARE:
        return None
    steps, samples = _increments(record)
    inside = column(record.train, SAMPLES) <= up_to_samples
    inside[0] = True
    steps, samples = steps[inside], samples[inside]
    curves = [
        adaptive_side(
            noise_scales=noise_scales(record, name)[inside], global_batch_sizes=samples / steps, num_steps=steps
        )
        for name in ("value", "lower", "upper")
    ]
    implied, low, high = (ImpliedFrontier(min_steps=side.min_steps, min_samples=side.min_samples) for side in curves)
    return RunPlacement(
        steps=curves[0].steps,
        samples=curves[0].samples,
        implied=implied,
        low=low,
        high=high,
        best_saving=curves[0].largest_saving,
    )


def critical_ratio(record: RunRecord) -> float:
    """Return critical batch size over noise scale: the run's own setting, or what the batch law has by default.

    Law, plan and report use this one.
    """
    own = record.setting("control.critical_ratio")
    return float(own) if own else CriticalRatio().median


def _increments(record: RunRecord) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the steps and samples that each row stands for: where not every step is logged, more than its own."""
    samples, batches = column(record.train, SAMPLES), column(record.train, "batch/global")
    numbers = column(record.train, "step")
    steps = np.diff(numbers, prepend=0.0) if np.isfinite(numbers).all() else np.ones_like(samples)
    return np.maximum(steps, 1.0), np.maximum(np.diff(samples, prepend=record.start), batches)
