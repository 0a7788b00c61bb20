"""How long a step takes, by its shape: fitted to the steps already done; pure, so the clock is the caller's.

The model is T = per_step_s + accumulation_steps × (per_pass_s + per_sample_s × micro_batch_size). The literature has
others for the pass: flat up to saturation and linear from there on, or a table of what was measured. Ours is the
straight line with a constant: it holds on CPUs, its constant stands for the flat part of a GPU, and three numbers are
known after as many shapes, where a knee would need shapes on both of its sides. Nearest the knee it is too slow by
what the constant and the line have in common; `StepTimeModel.error` says how far it was off on the shapes of this run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from statistics import median
from typing import Any

from dptrain.errors import CheckpointError

_MOST_SHAPES = 32
_MOST_SECONDS = 15
"""Durations kept of a shape, the latest ones: their median stands still under a few stragglers."""
_FEWEST_SECONDS = 3
"""Durations from which on a shape counts: the median of fewer may be a straggler."""
_SKIPPED_OF_A_NEW_SHAPE = 3
"""Steps left out when this process meets a shape: compilation, allocation, the wrapper's second layout of buckets."""
_SKIPPED_OF_A_CHANGE = 1
_ASSUMED_WEIGHT = 0.2
"""Weight of the assumed split, in square roots of a duration: any two shapes that differ drown it."""


@dataclass(frozen=True, kw_only=True)
class StepShape:
    """What the time of an optimizer step depends on.

    Attributes:
        micro_batch_size: samples in one forward and backward pass on one replica.
        accumulation_steps: passes of each replica.
        world_size: number of replicas.
    """

    micro_batch_size: int
    accumulation_steps: int
    world_size: int

    @property
    def global_batch_size(self) -> int:
        """Samples in the step, all replicas together."""
        return self.micro_batch_size * self.accumulation_steps * self.world_size


@dataclass(frozen=True, kw_only=True)
class StepTimeModel:
    """T = per_step_s + accumulation_steps × (per_pass_s + per_sample_s × micro_batch_size), on one number of replicas.

    Attributes:
        per_step_s: all-reduce, optimizer, and what else a step costs however many samples it has.
        per_pass_s: what a forward and backward pass costs however many samples it has: launches, small kernels.
        per_sample_s: what each further sample of a micro-batch adds.
        world_size: the number of replicas that it holds for.
        is_split_known: whether steps of at least two batches were timed. If not, the time of the only one is right
            and its split is assumed: half per step, half per sample.
        error: relative error of its predictions of shapes that had not been timed yet, the median; None where none
            was predicted so far.
    """

    per_step_s: float
    per_pass_s: float
    per_sample_s: float
    world_size: int
    is_split_known: bool
    error: float | None

    def seconds(self, shape: StepShape) -> float:
        """Return the time of a step of `shape`."""
        return self.step_s(micro_batch_size=shape.micro_batch_size, accumulation_steps=shape.accumulation_steps)

    def step_s(self, *, micro_batch_size: float, accumulation_steps: float) -> float:
        """Return the time of a step, of sizes that may lie between those that run."""
        return self.per_step_s + accumulation_steps * (self.per_pass_s + self.per_sample_s * micro_batch_size)


@dataclass(frozen=True, kw_only=True)
class TimedShape:
    """What is remembered of one shape.

    Attributes:
        shape: which one.
        seconds: its latest durations, oldest first.
        to_skip: how many of its next steps are left out.
        predicted_s: what the model said before any step of it was timed; None where it could not say.
    """

    shape: StepShape
    seconds: tuple[float, ...] = ()
    to_skip: int = _SKIPPED_OF_A_NEW_SHAPE
    predicted_s: float | None = None

    @property
    def is_settled(self) -> bool:
        """Whether enough steps of it were timed."""
        return len(self.seconds) >= _FEWEST_SECONDS

    @property
    def median_s(self) -> float:
        """The median of its durations."""
        return median(self.seconds)


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """The steps timed so far, as a record of bounded size: `asdict` writes it, `from_json` reads it.

    Stragglers do not move it, for it goes by the median of each shape. The first steps of a shape that is new to the
    process are left out, and the first after each change.

    Attributes:
        shapes: what was timed, the present one last.
    """

    shapes: tuple[TimedShape, ...] = ()

    def timed(self, shape: StepShape, seconds: float) -> StepTimes:
        """Take in one measured step.

        Args:
            shape: of the step.
            seconds: its duration, the same number on all ranks; left out where it is not positive and finite.
        """
        if not 0 < seconds < math.inf:
            return self
        known = next((entry for entry in self.shapes if entry.shape == shape), None)
        if known is None:
            known = TimedShape(shape=shape, predicted_s=self._prediction(shape))
        elif known is not self.shapes[-1]:
            known = replace(known, to_skip=max(known.to_skip, _SKIPPED_OF_A_CHANGE))
        if known.to_skip:
            after = replace(known, to_skip=known.to_skip - 1)
        else:
            after = replace(known, seconds=(*known.seconds, seconds)[-_MOST_SECONDS:])
        others = (entry for entry in self.shapes if entry.shape != shape)
        return StepTimes(shapes=(*others, after)[-_MOST_SHAPES:])

    def model(self) -> StepTimeModel | None:
        """Return what the steps on the present number of replicas say; None before a shape has settled."""
        return self._model(self.shapes[-1].shape.world_size) if self.shapes else None

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> StepTimes:
        """Return what `asdict` wrote, for a new process: to it all shapes are new again.

        Raises:
            CheckpointError: where the record is not one.
        """
        try:
            return cls(
                shapes=tuple(
                    TimedShape(
                        shape=StepShape(**entry["shape"]),
                        seconds=tuple(map(float, entry["seconds"])),
                        predicted_s=entry["predicted_s"],
                    )
                    for entry in record["shapes"]
                )
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"not a record of step times: {error!r} is missing or wrong") from error

    def _prediction(self, shape: StepShape) -> float | None:
        model = self._model(shape.world_size)
        return model.seconds(shape) if model is not None and model.is_split_known else None

    def _model(self, world_size: int) -> StepTimeModel | None:
        settled = [entry for entry in self.shapes if entry.is_settled and entry.shape.world_size == world_size]
        if not settled:
            return None
        errors = [abs(entry.predicted_s / entry.median_s - 1) for entry in settled if entry.predicted_s is not None]
        per_step_s, per_pass_s, per_sample_s = _fit(settled)
        return StepTimeModel(
            per_step_s=per_step_s,
            per_pass_s=per_pass_s,
            per_sample_s=per_sample_s,
            world_size=world_size,
            is_split_known=len({entry.shape.global_batch_size for entry in settled}) > 1,
            error=median(errors) if errors else None,
        )


def _fit(settled: Sequence[TimedShape]) -> tuple[float, float, float]:
    """Return the three times, none negative, with the least squares of relative errors.

    What the shapes leave open is taken from an assumed split of the latest one's time: half per step, half per
    sample. So a pass costs what the samples cost until a second number of accumulation steps says otherwise: a law
    that thinks accumulation too cheap tries it, and is put right; one that thinks it too dear never does.
    """
    import numpy as np

    present = settled[-1]
    unit = present.median_s / _costs(present.shape)  # of the shares of the present step's time
    rows = [np.sqrt(len(entry.seconds)) * _costs(entry.shape) * unit / entry.median_s for entry in settled]
    ones = [np.sqrt(len(entry.seconds)) for entry in settled]
    matrix = np.vstack([*rows, _ASSUMED_WEIGHT * np.eye(3)])
    right = np.array([*ones, _ASSUMED_WEIGHT / 2, 0.0, _ASSUMED_WEIGHT / 2])
    normal, projected = matrix.T @ matrix, matrix.T @ right
    best, least = np.zeros(3), math.inf
    # The best of all subsets of three numbers with nothing negative: that is the bounded optimum, and is 7 lines.
    for free in (list(subset) for size in (1, 2, 3) for subset in combinations(range(3), size)):
        shares = np.zeros(3)
        shares[free] = np.linalg.solve(normal[np.ix_(free, free)], projected[free])
        misfit = float(np.sum((matrix @ shares - right) ** 2))
        if (shares >= 0).all() and misfit < least:
            best, least = shares, misfit
    per_step_s, per_pass_s, per_sample_s = (best * unit).tolist()
    return per_step_s, per_pass_s, per_sample_s


def _costs(shape: StepShape) -> Any:  # noqa: ANN401 - a numpy array, and numpy is imported late
    """Return how often a step of `shape` pays each of the three times."""
    import numpy as np

    return np.array([1.0, shape.accumulation_steps, shape.accumulation_steps * shape.micro_batch_size])
