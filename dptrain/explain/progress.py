"""How far a run came, counted in steps without noise, and what runs at other batches would need to come as far."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from dptrain.errors import ConfigError
from dptrain.explain.position import ImpliedFrontier
from dptrain.explain.record import SAMPLES, column, is_resolved

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dptrain.explain.record import RunRecord

_SETTLED = 0.25
"""Part of a run that is left out of a trend: warm-up and the first steep fall are another law. A matter of taste."""
_FEWEST_POINTS = 5
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

    end: Literal["b_simple", "lower", "upper"] = "b_simple"
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
        samples: (rows,) seen at the end of each row.
        progress: (rows,) made by then.
        noise_scales: (rows,) φ in each row, in samples.
        growth: exponent of φ against one over the loss, for what lies beyond the run; at least 0.
    """

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
        samples_of_run: after how many samples the run itself was there; None where it was not.
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
    samples, batches = column(record.train, SAMPLES), column(record.train, "batch/global")
    scales = assumption.factor * _filled(record, assumption.end)
    steps = np.diff(samples, prepend=0.0) / batches
    progress = np.cumsum(steps / (1 + scales / batches))
    growth = _growth(record, curve) if assumption.grows else 0.0
    return Course(samples=samples, progress=progress, noise_scales=scales, growth=growth)


def needs(course: Course, curve: LossCurve, *, target: float) -> Needs:
    """Return what it takes to come to a loss for the first time.

    Within the run that is read off its own curve. Beyond it the loss is taken to go on as a power law in the progress,
    L ~ s^-a, fitted in logarithms to what followed the first quarter, and φ to grow as L^-growth with it; neither has
    a floor or an end of the learning rate's schedule, so this is the more hopeful the further it reaches.

    Raises:
        ConfigError: where the loss lies beyond the run and cannot be extrapolated.
    """
    reached = np.flatnonzero(curve.losses <= target)
    if len(reached):
        at = _crossing(curve, int(reached[0]), target=target)
        return Needs(implied=_within(course, at), error=0.0, samples_of_run=at)
    progress, error, decay = _extrapolated(course, curve, target=target)
    return Needs(implied=_beyond(course, progress, decay=decay), error=error, samples_of_run=None)


def _crossing(curve: LossCurve, index: int, *, target: float) -> float:
    """Return where the straight line to the first point at or below the target crosses it."""
    if index == 0:
        return float(curve.samples[0])
    (x0, x1), (y0, y1) = curve.samples[index - 1 : index + 1], curve.losses[index - 1 : index + 1]
    return float(x0 + (x1 - x0) * (y0 - target) / (y0 - y1))


def _within(course: Course, samples: float) -> ImpliedFrontier:
    """Return what it took to come to a position of the run."""
    parts = np.diff(course.progress, prepend=0.0)
    lengths = np.diff(course.samples, prepend=0.0)
    shares = np.clip((samples - (course.samples - lengths)) / lengths, 0.0, 1.0)
    done = parts * shares
    return ImpliedFrontier(min_steps=float(done.sum()), min_samples=float((course.noise_scales * done).sum()))


def _beyond(course: Course, progress: float, *, decay: float) -> ImpliedFrontier:
    """Return what it takes to come beyond the end, with φ ~ L^-growth ~ s^(decay·growth)."""
    whole, last = _within(course, float(course.samples[-1])), float(course.noise_scales[-1])
    power = 1 + decay * course.growth
    further = last * whole.min_steps * ((progress / whole.min_steps) ** power - 1) / power
    return ImpliedFrontier(min_steps=progress, min_samples=whole.min_samples + further)


def _extrapolated(course: Course, curve: LossCurve, *, target: float) -> tuple[float, float, float]:
    """Return the progress at a loss beyond the run, its relative standard error, and the exponent a."""
    settled = curve.samples >= _SETTLED * curve.samples[-1]
    losses = curve.losses[settled]
    beyond = f"a {curve.name} of {target:.4g} lies beyond the run, whose lowest is {curve.lowest:.4g}"
    if settled.sum() < _FEWEST_POINTS or min(losses.min(), target) <= 0:
        raise ConfigError(
            f"{beyond}, and a power law needs {_FEWEST_POINTS} positive losses after its first quarter and a positive "
            f"target: give a --target that the run has reached"
        )
    x = np.log(np.interp(curve.samples[settled], course.samples, course.progress))
    y = np.log(losses)
    slope, intercept = np.polyfit(x, y, 1)
    spread = float(np.sqrt(np.sum((y - intercept - slope * x) ** 2) / (len(x) - 2)))
    goal = float((math.log(target) - intercept) / slope) if slope else math.inf
    deviation = spread * math.sqrt(1 / len(x) + (goal - x.mean()) ** 2 / np.sum((x - x.mean()) ** 2))
    # A slope that is no more than its own error away from level has no end in sight.
    if not (slope < 0 and deviation < -slope):
        raise ConfigError(f"{beyond}, and the loss no longer falls clearly: give a --target that the run has reached")
    # The curve's last point may lie above the line; what was reached is not beyond.
    return max(math.exp(goal), float(course.progress[-1])), float(deviation / -slope), float(-slope)


def _growth(record: RunRecord, curve: LossCurve) -> float:
    """Return the exponent of the noise scale against one over the loss, over what followed the first quarter.

    The loss is what both lie on in the fits of Kaplan et al. 2020, and what a target is given in.
    """
    rows = [row for row in record.train if is_resolved(row) and row[SAMPLES] >= _SETTLED * record.train[-1][SAMPLES]]
    losses = np.interp(column(rows, SAMPLES), curve.samples, curve.losses)
    scales = column(rows, "gns/b_simple")
    usable = (losses > 0) & (scales > 0)
    if usable.sum() < _FEWEST_POINTS or np.ptp(losses[usable]) == 0:
        return 0.0
    slope = np.polyfit(-np.log(losses[usable]), np.log(scales[usable]), 1)[0]
    return float(np.clip(slope, 0.0, _STEEPEST))


def _filled(record: RunRecord, end: str) -> NDArray[np.float64]:
    values = np.array([row[f"gns/{end}"] if is_resolved(row) else np.nan for row in record.train], dtype=np.float64)
    known = np.flatnonzero(np.isfinite(values))
    if not len(known):
        raise ConfigError(
            f"the noise scale of {record.name} was never resolved, and no other batch can be told from it: train on, "
            f"or on more replicas or accumulation steps, which measure it faster"
        )
    latest = known[np.maximum(np.searchsorted(known, np.arange(len(values)), side="right") - 1, 0)]
    return np.maximum(values[latest], np.finfo(np.float64).tiny)
