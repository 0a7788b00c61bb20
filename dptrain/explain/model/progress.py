"""How far a run came, counted in steps without noise, and what runs at other batches would need to come as far."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from dptrain.errors import ConfigError
from dptrain.explain.model.run_placement import ImpliedFrontier, critical_ratio
from dptrain.explain.record import SAMPLES, column, is_resolved, noise_scales

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dptrain.explain.record import RunRecord

_SETTLED = 0.5
"""Part of a run that is left out of its trends: the first steep fall is another law.

Of 0.25, 0.4, 0.5 and 0.6, tried on eleven runs of two tasks, one half extrapolated best on both together.
"""
_FEWEST_POINTS = 5
_NUM_FLOORS = 100
_NEAREST_FLOOR = 0.99
"""Highest floor that is tried, as a part of the target: the law must reach it."""
_STEEPEST = 10.0
"""Largest exponent of the noise scale against the loss that is believed; Kaplan et al. 2020 found 4.76 for text."""


@dataclass(frozen=True, kw_only=True)
class Assumption:
    """Which noise scale the arithmetic goes by.

    Attributes:
        end: the estimate, or an end of its interval.
        factor: on all of it.
        grows: whether beyond the run it goes on along its trend, or stays as it was at the end.
    """

    end: Literal["value", "lower", "upper"] = "value"
    factor: float = 1.0
    grows: bool = True


MEASURED = Assumption()
LOW = Assumption(end="lower", grows=False)
HIGH = Assumption(end="upper")
HISTORY = (Assumption(factor=1 / 6), Assumption(factor=6.0))
"""By how much the noise scale missed the critical batch size in the published tasks of McCandlish et al. 2018."""


@dataclass(frozen=True, kw_only=True)
class LossCurve:
    """The loss of a run over samples seen.

    Attributes:
        name: which loss it is.
        samples: (points,) ascending, above 0.
        losses: (points,) finite.
    """

    name: str
    samples: NDArray[np.float64]
    losses: NDArray[np.float64]

    @property
    def lowest(self) -> float:
        """The lowest loss that was reached."""
        return float(self.losses.min())


@dataclass(frozen=True, kw_only=True)
class Course:
    """The progress of a run, in steps of a batch without noise: a step at batch B makes 1/(1 + φ/B) of one.

    Attributes:
        start: position in samples at which the run began.
        samples: (rows,) position at the end of each row.
        progress: (rows,) made by then, since `start`.
        noise_scales: (rows,) φ in each row, in samples, times `critical_ratio`.
        growth: exponent of φ against one over the loss, for what lies beyond the run; at least 0.
    """

    start: float
    samples: NDArray[np.float64]
    progress: NDArray[np.float64]
    noise_scales: NDArray[np.float64]
    growth: float


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What it takes to come to a loss.

    Attributes:
        implied: S_min and E_min, from which any batch's steps and samples follow.
        error: relative standard error of both, for a loss beyond the run; 0 within it.
        samples_of_run: after how many samples of its own the run itself was there; None where it was not.
    """

    implied: ImpliedFrontier
    error: float
    samples_of_run: float | None


def loss_curve(record: RunRecord) -> LossCurve:
    """Return the held-out loss of a run where it was evaluated often enough, else its training loss, smoothed.

    Raises:
        ConfigError: where neither has enough finite values.
    """
    evals = [row for row in record.evals if row.get("eval/loss") is not None and row[SAMPLES] > 0]
    if len(evals) >= _FEWEST_POINTS:
        return LossCurve(name="held-out loss", samples=column(evals, SAMPLES), losses=column(evals, "eval/loss"))
    samples, losses = record.smoothed("train/loss")
    if len(samples) < _FEWEST_POINTS:
        raise ConfigError(
            f"{record.name} has {len(samples)} rows with a loss, and at least {_FEWEST_POINTS} are needed"
        )
    return LossCurve(name="training loss (smoothed)", samples=samples, losses=losses)


def course(record: RunRecord, curve: LossCurve, assumption: Assumption = MEASURED) -> Course:
    """Return the progress of a run under an assumption on its noise scale.

    Rows without a resolved noise scale count with that of the nearest row before them, or else after them.

    Raises:
        ConfigError: where the noise scale was never resolved.
    """
    if not any(map(is_resolved, record.train)):
        raise ConfigError(
            f"the noise scale of {record.name} was never resolved; other batches cannot be compared: train on, "
            f"or on more replicas or accumulation steps, which measure it faster"
        )
    samples, batches = column(record.train, SAMPLES), column(record.train, "batch/global")
    scales = assumption.factor * critical_ratio(record) * noise_scales(record, assumption.end)
    steps = np.diff(samples, prepend=record.start) / batches
    progress = np.cumsum(steps / (1 + scales / batches))
    growth = _growth(record, curve) if assumption.grows else 0.0
    return Course(start=record.start, samples=samples, progress=progress, noise_scales=scales, growth=growth)


def needs(course: Course, curve: LossCurve, *, target: float) -> Needs:
    """Return what it takes to come to a loss for the first time.

    Within the run that is read off its own curve. Beyond it the loss is taken to go on as a power law in the progress,
    fitted to the second half of the run, and φ to grow as L^-growth with it; a learning rate that is yet to fall
    is not foreseen.

    Raises:
        ConfigError: where the loss lies beyond the run and cannot be extrapolated, as from a run that began in the
            middle of another: the power law counts from the beginning.
    """
    reached = np.flatnonzero(curve.losses <= target)
    if len(reached):
        at = _crossing(curve, int(reached[0]), target=target)
        return Needs(implied=_within(course, at), error=0.0, samples_of_run=at - course.start)
    progress, error = _extrapolated(course, curve, target=target)
    growth = (curve.lowest / target) ** course.growth
    return Needs(implied=_beyond(course, progress, growth=growth), error=error, samples_of_run=None)


def _crossing(curve: LossCurve, index: int, *, target: float) -> float:
    """Return where the straight line to the first point at or below the target crosses it."""
    if index == 0:
        return float(curve.samples[0])
    (x0, x1), (y0, y1) = curve.samples[index - 1 : index + 1], curve.losses[index - 1 : index + 1]
    return float(x0 + (x1 - x0) * (y0 - target) / (y0 - y1))


def _within(course: Course, samples: float) -> ImpliedFrontier:
    """Return what it took to come to a position of the run."""
    parts = np.diff(course.progress, prepend=0.0)
    # A row may stand where the one before it does.
    lengths = np.maximum(np.diff(course.samples, prepend=course.start), 1e-9)
    shares = np.clip((samples - (course.samples - lengths)) / lengths, 0.0, 1.0)
    done = parts * shares
    return ImpliedFrontier(min_steps=float(done.sum()), min_samples=float((course.noise_scales * done).sum()))


def _beyond(course: Course, progress: float, *, growth: float) -> ImpliedFrontier:
    """Return what it takes to come beyond the end, where φ has grown by a factor, as a power of the progress."""
    whole, last = _within(course, float(course.samples[-1])), float(course.noise_scales[-1])
    further = math.log(progress / whole.min_steps)
    power = 1 + (math.log(growth) / further if further > 0 else 0.0)
    samples = last * whole.min_steps * math.expm1(power * further) / power
    return ImpliedFrontier(min_steps=progress, min_samples=whole.min_samples + samples)


def _extrapolated(course: Course, curve: LossCurve, *, target: float) -> tuple[float, float]:
    """Return the progress at a loss beyond the run, and its relative standard error.

    By L = F + A·s^-a. A curve that still falls says little about its floor F: tried on eleven runs, the one that fits
    best came up to ten times too late and none at all up to half too early, so ln s is averaged over all floors, each
    by how well it fits.
    """
    beyond = f"a {curve.name} of {target:.4g} lies beyond the run, whose lowest is {curve.lowest:.4g}"
    if course.start:
        raise ConfigError(
            f"{beyond} and which began after {course.start:,.0f} samples of another: the progress up to there is not "
            f"in it; give a --target that the run has reached, or plan from a run from the beginning on"
        )
    settled = curve.samples >= _SETTLED * curve.samples[-1]
    losses = curve.losses[settled]
    if settled.sum() < _FEWEST_POINTS or min(losses.min(), target) <= 0:
        raise ConfigError(
            f"{beyond}, and a power law needs {_FEWEST_POINTS} positive losses in its second half and a positive "
            f"target: give a --target that the run has reached, or evaluate more often"
        )
    x = np.log(np.interp(curve.samples[settled], course.samples, course.progress))
    highest = _NEAREST_FLOOR * min(target, float(losses.min()))
    laws = [_Law.fitted(x, losses, floor=floor) for floor in np.linspace(0.0, highest, _NUM_FLOORS)]
    plain = laws[0]
    # A slope that is no more than its own error away from level has no end in sight.
    if not (plain.slope < 0 and plain.deviation(target) < -plain.slope):
        raise ConfigError(f"{beyond}, and the loss no longer falls clearly: give a --target that the run has reached")
    falling = [law for law in laws if law.slope < 0]
    goals, misfits = np.array([[law.goal(target), law.misfit] for law in falling]).T
    variance = max(float(misfits.min()), np.finfo(np.float64).tiny) / (len(x) - 3)
    weights = np.exp((misfits.min() - misfits) / (2 * variance))
    goal = float(np.average(goals, weights=weights))
    spread = float(np.average((goals - goal) ** 2, weights=weights))
    # The curve's last point may lie above the line; what was reached is not beyond.
    progress = max(math.exp(goal), float(course.progress[-1]))
    # The curve that will be measured scatters as this one does: a prediction is less sure than the line.
    return progress, math.hypot(math.sqrt(spread), plain.deviation(target) / -plain.slope, plain.scatter / -plain.slope)


@dataclass(frozen=True, kw_only=True)
class _Law:
    """L = floor + exp(intercept)·s^slope, fitted to ln(L − floor) over x = ln s."""

    floor: float
    slope: float
    intercept: float
    misfit: float
    x: NDArray[np.float64]

    @classmethod
    def fitted(cls, x: NDArray[np.float64], losses: NDArray[np.float64], *, floor: float) -> _Law:
        slope, intercept = np.polyfit(x, np.log(losses - floor), 1)
        # Of the losses themselves, so that laws with different floors can be compared.
        misfit = np.sum(np.log((floor + np.exp(intercept + slope * x)) / losses) ** 2)
        return cls(floor=floor, slope=float(slope), intercept=float(intercept), misfit=float(misfit), x=x)

    def goal(self, target: float) -> float:
        """Return ln s at a loss."""
        return (math.log(target - self.floor) - self.intercept) / self.slope if self.slope else math.inf

    @property
    def scatter(self) -> float:
        """The standard deviation of a loss about the law, in ln L."""
        return math.sqrt(self.misfit / (len(self.x) - 2))

    def deviation(self, target: float) -> float:
        """Return the standard error of the line at a loss, in ln L; of a law without a floor."""
        count, far = len(self.x), self.goal(target) - float(self.x.mean())
        spread = float(np.sum((self.x - self.x.mean()) ** 2))
        return self.scatter * math.sqrt(1 / count + far**2 / spread)


def _growth(record: RunRecord, curve: LossCurve) -> float:
    """Return the exponent of the noise scale against one over the loss, over the second half of the run.

    The loss is what both lie on in the fits of Kaplan et al. 2020, and what a target is given in.
    """
    rows = [row for row in record.train if is_resolved(row) and row[SAMPLES] >= _SETTLED * record.train[-1][SAMPLES]]
    losses = np.interp(column(rows, SAMPLES), curve.samples, curve.losses)
    scales = column(rows, "noise_scale/value")
    usable = (losses > 0) & (scales > 0)
    if usable.sum() < _FEWEST_POINTS or np.ptp(losses[usable]) == 0:
        return 0.0
    slope = np.polyfit(-np.log(losses[usable]), np.log(scales[usable]), 1)[0]
    return float(np.clip(slope, 0.0, _STEEPEST))
