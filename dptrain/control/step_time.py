"""How long a step takes, by its shape: fitted to the steps already done; pure, so the clock is the caller's.

The model is T = per_step_s + accumulation_steps × pass time, the pass time a straight line in the micro-batch m, and
flat below a micro-batch k at which the device is full: per_pass_s + per_sample_s × max(m, k). Others in use are the
line alone (Pollux, Qiao et al. 2021), which where it is right on both sides of a knee is twice too slow at it, and a
table of what was measured, which says nothing of the shape to be tried next. The knee is believed only where the
shapes need it, so that on a CPU the line alone is left.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise
from statistics import median
from typing import TYPE_CHECKING, Any

from dptrain.errors import CheckpointError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_MOST_SHAPES = 32
_MOST_SECONDS = 31
_MOST_STRIDE = 8
"""Of the latest 248 steps of a shape every eighth is kept: on a machine that others load, too, neighbours are alike."""
_FEWEST_SECONDS = 3
"""Durations from which on a shape counts: the median of fewer may be a straggler."""
_SKIPPED_OF_A_PROCESS = 3
"""Steps left out at first: compilation, allocation, the wrapper's second layout of buckets."""
_SKIPPED_OF_A_CHANGE = 1
"""Steps left out when the shape changes, to one that is new as well."""
_SLOWEST_LEFT_OUT = 2
"""Durations that do not count for a shape's median: a shape that is new may be compiled and allocated over three steps,
and where a batch is soon left again all that is known of it are three durations."""
_HALF_LIFE_STEPS = 100
"""Steps in which what is known of a shape that is not run any more loses half of its weight: machines have slow spells,
and a shape that was timed in one alone would keep the batch from it for ever. At 5 % of scatter the assumed split takes
over after some 1,000 steps, and the law then times another batch."""
_ASSUMED_ERROR = 0.5
"""Standard error of the assumed split, in shares of a step's time: any two shapes that differ clearly drown it."""
_LEAST_NOISE = 0.01
_PRICE_OF_A_KNEE = 9.0
"""What a knee must save of the squared errors, in variances: three standard errors."""


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
    """T = per_step_s + accumulation_steps × (per_pass_s + per_sample_s × max(micro_batch_size, k)), on some replicas.

    Attributes:
        per_step_s: all-reduce, optimizer, and what else a step costs however many samples it has.
        per_pass_s: what a forward and backward pass costs however many samples it has.
        per_sample_s: what each further sample of a micro-batch adds.
        full_at_samples: k, the micro-batch up to which a pass takes no longer, for the device is not full; 0 where
            none is known.
        world_size: the number of replicas that it holds for.
        is_split_known: whether steps of at least two batches were timed. If not, the time of the only one is right
            and its split is assumed: half per step, half per sample.
        error: relative error of its predictions of shapes that had not been timed yet, the median; None where none
            was predicted so far.
    """

    per_step_s: float
    per_pass_s: float
    per_sample_s: float
    full_at_samples: float
    world_size: int
    is_split_known: bool
    error: float | None

    def seconds(self, shape: StepShape) -> float:
        """Return the time of a step of `shape`."""
        return self.step_s(micro_batch_size=shape.micro_batch_size, accumulation_steps=shape.accumulation_steps)

    def step_s(self, *, micro_batch_size: float, accumulation_steps: float) -> float:
        """Return the time of a step, of sizes that may lie between those that run."""
        return self.per_step_s + accumulation_steps * self.pass_s(micro_batch_size)

    def pass_s(self, micro_batch_size: float) -> float:
        """Return the time of one forward and backward pass."""
        return self.per_pass_s + self.per_sample_s * max(micro_batch_size, self.full_at_samples)


@dataclass(frozen=True, kw_only=True)
class TimedShape:
    """What is remembered of one shape.

    Attributes:
        shape: which one.
        seconds: durations, oldest first, every `stride`-th of the latest.
        stride: 1, 2, 4 or 8; doubles each time that the durations have become too many.
        num_since: steps since the latest of the durations.
        latest: number of the latest step of it, counted over all shapes without those left out.
        to_skip: how many of its next steps are left out.
        predicted_s: what the model said before any step of it was timed; None where it could not say.
    """

    shape: StepShape
    seconds: tuple[float, ...] = ()
    stride: int = 1
    num_since: int = 0
    latest: int = 0
    to_skip: int = _SKIPPED_OF_A_PROCESS
    predicted_s: float | None = None

    def timed(self, seconds: float) -> TimedShape:
        """Take in one more duration."""
        if self.to_skip:
            return replace(self, to_skip=self.to_skip - 1)
        if self.num_since + 1 < self.stride:
            return replace(self, num_since=self.num_since + 1)
        kept, stride = (*self.seconds, seconds), self.stride
        if len(kept) > _MOST_SECONDS and stride < _MOST_STRIDE:
            kept, stride = kept[1::2], 2 * stride
        return replace(self, seconds=kept[-_MOST_SECONDS:], stride=stride, num_since=0)

    @property
    def is_settled(self) -> bool:
        """Whether enough steps of it were timed."""
        return len(self.seconds) >= _FEWEST_SECONDS

    @property
    def median_s(self) -> float:
        """The median of its durations but for the slowest two."""
        return median(sorted(self.seconds)[:-_SLOWEST_LEFT_OUT])


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """The steps timed so far, as a record of bounded size: `asdict` writes it, `from_json` reads it.

    Stragglers do not move it, for it goes by the median of each shape. The first steps of the process are left out, and
    the first after each change.

    Attributes:
        shapes: what was timed, the present one last.
        num_steps: steps taken in so far, without those left out.
    """

    shapes: tuple[TimedShape, ...] = ()
    num_steps: int = 0

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
            to_skip = _SKIPPED_OF_A_CHANGE if self.shapes else _SKIPPED_OF_A_PROCESS
            known = TimedShape(shape=shape, predicted_s=self._prediction(shape), to_skip=to_skip)
        elif known is not self.shapes[-1]:
            known = replace(known, to_skip=max(known.to_skip, _SKIPPED_OF_A_CHANGE))
        others = (entry for entry in self.shapes if entry.shape != shape)
        num_steps = self.num_steps + (known.to_skip == 0)
        after = replace(known.timed(seconds), latest=num_steps)
        return StepTimes(shapes=(*others, after)[-_MOST_SHAPES:], num_steps=num_steps)

    @property
    def has_just_settled(self) -> bool:
        """Whether the present shape counts from the latest step on."""
        return bool(self.shapes) and len(self.shapes[-1].seconds) == _FEWEST_SECONDS

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
                        stride=int(entry["stride"]),
                        latest=int(entry["latest"]),
                        predicted_s=entry["predicted_s"],
                    )
                    for entry in record["shapes"]
                ),
                num_steps=int(record["num_steps"]),
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
        per_step_s, per_pass_s, per_sample_s, full_at_samples = _fit(settled)
        return StepTimeModel(
            per_step_s=per_step_s,
            per_pass_s=per_pass_s,
            per_sample_s=per_sample_s,
            full_at_samples=full_at_samples,
            world_size=world_size,
            is_split_known=len({entry.shape.global_batch_size for entry in settled}) > 1,
            error=median(errors) if errors else None,
        )


def _fit(settled: Sequence[TimedShape]) -> tuple[float, float, float, float]:
    """Return the three times, none negative, and the knee, with the least squares of relative errors.

    What the shapes leave open is taken from an assumed split of the latest one's time: half per step, half per
    sample. So a pass costs what its samples cost until a second number of accumulation steps says otherwise: a law
    that thinks accumulation too cheap tries it, and is put right; one that thinks it too dear never does.
    """
    import numpy as np

    knees = _knees(settled)
    medians = np.array([entry.median_s for entry in settled])
    ages = settled[-1].latest - np.array([entry.latest for entry in settled])
    weights = np.sqrt([len(entry.seconds) for entry in settled] * 0.5 ** (ages / _HALF_LIFE_STEPS))
    shapes = [(entry.shape.micro_batch_size, entry.shape.accumulation_steps) for entry in settled]
    costs = np.array([[_costs(*shape, knee) for shape in shapes] for knee in knees])
    units = medians[-1] / costs[:, -1, :]  # so that what is solved for are shares of the present step's time
    rows = costs * units[:, None, :] * (weights / medians)[:, None]
    variance = math.pi / 2 * _noise(settled) ** 2  # of a duration's share in a median
    weight = math.sqrt(variance) / _ASSUMED_ERROR
    assumed = np.broadcast_to(weight * np.eye(3), (len(knees), 3, 3))
    right = np.array([*weights, weight / 2, 0.0, weight / 2])
    shares, misfits = _non_negative(np.concatenate([rows, assumed], axis=1), right)
    best = int(np.argmin(misfits + _PRICE_OF_A_KNEE * variance * (np.array(knees) > 0)))
    per_step_s, per_pass_s, per_sample_s = (shares[best] * units[best]).tolist()
    return per_step_s, per_pass_s, per_sample_s, knees[best]


def _knees(settled: Sequence[TimedShape]) -> list[float]:
    """Return where the pass time may begin to rise: 0, or from the second micro-batch on, with those in between."""
    timed = sorted({float(entry.shape.micro_batch_size) for entry in settled})
    return [0.0, *timed[1:-1], *(math.sqrt(smaller * larger) for smaller, larger in pairwise(timed) if len(timed) > 2)]  # noqa: PLR2004 - a line goes through two


def _costs(micro_batch_size: float, accumulation_steps: float, knee: float) -> tuple[float, float, float]:
    """Return how often a step pays each of the three times."""
    return 1.0, accumulation_steps, accumulation_steps * max(micro_batch_size, knee)


def _noise(settled: Sequence[TimedShape]) -> float:
    """Return the relative standard deviation of a duration, stragglers apart: 1.48 times the median deviation."""
    deviations = [abs(second / entry.median_s - 1) for entry in settled for second in entry.seconds]
    return max(1.48 * median(deviations), _LEAST_NOISE)


def _non_negative(matrices: NDArray[np.float64], right: NDArray[np.float64]) -> tuple[NDArray[np.float64], ...]:
    """Return the least-squares solution without negative numbers for each of some matrices, and its misfit.

    It is the best among the solutions in which some unknowns are 0 and the others free: seven for three unknowns.
    """
    import numpy as np

    transposed = np.swapaxes(matrices, 1, 2)
    normal, projected = transposed @ matrices, transposed @ right
    subsets = [list(subset) for size in (1, 2, 3) for subset in combinations(range(3), size)]
    solutions = np.zeros((len(subsets), *projected.shape))
    for solution, free in zip(solutions, subsets, strict=True):
        solution[:, free] = np.linalg.solve(normal[:, free][:, :, free], projected[:, free, None])[..., 0]
    misfits = np.sum((np.einsum("kij,skj->ski", matrices, solutions) - right) ** 2, axis=-1)
    misfits[(solutions < 0).any(axis=-1)] = math.inf
    best = (np.argmin(misfits, axis=0), np.arange(len(matrices)))
    return solutions[best], misfits[best]
