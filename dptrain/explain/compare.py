"""Several runs side by side: what each needed to the loss that all reached, and one sentence per figure about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dptrain.explain.figures.figure import letter
from dptrain.explain.record import SAMPLES, Row, RunRecord, column, known_lower
from dptrain.explain.text.account import duration
from dptrain.explain.text.findings import first_and_last_batch, noise_scale_text, short, task

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

_MOST_NAMED = 5


@dataclass(frozen=True, kw_only=True)
class Target:
    """The lowest loss that every one of several runs reached.

    Attributes:
        loss: in the unit of the task.
        held_out: whether it is the held-out loss; else the training loss, smoothed.
    """

    loss: float
    held_out: bool

    def __str__(self) -> str:
        return f"a {'held-out' if self.held_out else 'smoothed training'} loss of {short(self.loss)}"


@dataclass(frozen=True, kw_only=True)
class Effort:
    """What a run needed to reach a target for the first time.

    Attributes:
        samples: position at which it was there.
        trained: samples of the run itself, without those of a run that it branched off from.
        steps: optimizer steps.
        wall_s: seconds of training; None where they were not logged.
    """

    samples: float
    trained: float
    steps: float
    wall_s: float | None


def common_target(records: Sequence[RunRecord]) -> Target | None:
    """Return the lowest loss that every run reached; held-out where all were evaluated.

    None where a run has no loss, or where the tasks differ: losses of two tasks have nothing in common but the name.
    """
    # Not the name in the summary, which a task gives itself: a run that has not ended has none.
    if len({record.setting("task") or task(record) for record in records}) > 1:
        return None
    held_out = all(len(losses_of(record, held_out=True)[0]) for record in records)
    lowest = [losses.min() for _, losses in (losses_of(record, held_out=held_out) for record in records) if len(losses)]
    return Target(loss=float(max(lowest)), held_out=held_out) if len(lowest) == len(records) else None


def effort(record: RunRecord, target: Target) -> Effort:
    """Return what a run needed to reach a target of `common_target`; between two evaluations, on the line between."""
    samples, losses = losses_of(record, held_out=target.held_out)
    reached = int(np.argmax(losses <= target.loss))
    before = max(reached - 1, 0)
    fall = losses[before] - losses[reached]
    part = (losses[before] - target.loss) / fall if fall > 0 else 1.0
    at = float(samples[before] + part * (samples[reached] - samples[before]))
    return Effort(
        samples=at,
        trained=max(at - record.start, 0.0),
        steps=_at(record, "step", samples=at) or 0.0,
        wall_s=_at(record, "progress/wall_s", samples=at),
    )


def losses_of(record: RunRecord, *, held_out: bool) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return where a run has a loss, in samples, and the loss there: the held-out one, or the smoothed one."""
    if not held_out:
        return record.smoothed("train/loss")
    samples, losses = column(record.evals, SAMPLES), column(record.evals, "eval/loss")
    finite = np.isfinite(losses)
    return samples[finite], losses[finite]


def row_at(record: RunRecord, *, samples: float) -> Row:
    """Return the last training row up to a position in samples, or the first one."""
    return record.train[max(0, int(np.searchsorted(column(record.train, SAMPLES), samples, side="right")) - 1)]


def about_losses(records: Sequence[RunRecord]) -> str:
    """Say how low the loss of each run went."""
    held_out = all(len(losses_of(record, held_out=True)[0]) for record in records)
    lowest = [losses_of(record, held_out=held_out)[1] for record in records]
    texts = [short(losses.min()) if len(losses) else "none" for losses in lowest]
    return f"Lowest {'held-out' if held_out else 'smoothed training'} loss: {listed(texts)}"


def about_seconds(records: Sequence[RunRecord], target: Target | None) -> str:
    """Say how long each run took to the common loss."""
    if target is None:
        return "The runs have no loss in common that their times could be compared at"
    times = [effort(record, target).wall_s for record in records]
    return f"To {target}: {listed(['not timed' if time is None else duration(time) for time in times])}"


def about_efforts(records: Sequence[RunRecord], target: Target | None) -> str:
    """Say what each run needed of steps and samples to the common loss."""
    if target is None:
        return "The runs have no loss in common: each is shown at its end"
    needed = [effort(record, target) for record in records]
    return f"To {target}: {listed([f'{each.steps:,.0f} steps, {each.trained:,.0f} samples' for each in needed])}"


def about_batches(records: Sequence[RunRecord]) -> str:
    """Say from where to where each batch moved."""
    texts = [
        f"{first:,.0f} to {last:,.0f}" if record.batch_changes else f"{first:,.0f} throughout"
        for record, (first, last) in ((record, first_and_last_batch(record)) for record in records)
    ]
    return f"Global batch: {listed(texts)}"


def about_noise_scales(records: Sequence[RunRecord], target: Target | None = None) -> str:
    """Say each noise scale with its interval: at the end, or where the run reached the common loss."""
    if target is None:
        rows, when = [record.train[-1] for record in records], "at the end"
    else:
        rows = [row_at(record, samples=effort(record, target).samples) for record in records]
        when = f"at {target}"
    texts = ["not resolved" if known_lower(row) is None else noise_scale_text(row) for row in rows]
    return f"Noise scale {when}, in samples: {listed(texts)}"


def about_learning_rates(records: Sequence[RunRecord]) -> str:
    """Say the peak of each learning rate."""
    rates = [column(record.train, "train/lr") for record in records]
    return f"Largest learning rate: {listed([_largest(values) for values in rates])}"


def about_throughputs(records: Sequence[RunRecord]) -> str:
    """Say the median throughput of each run."""
    speeds = [column(record.train, "throughput/samples_per_sec") for record in records]
    texts = [short(float(np.nanmedian(values))) if np.isfinite(values).any() else "not timed" for values in speeds]
    return f"Median samples/s: {listed(texts)}"


def listed(texts: Sequence[str]) -> str:
    """Write what is said of each run behind its letter; of many runs, the first few."""
    named = [f"{letter(index)} {text}" for index, text in enumerate(texts[:_MOST_NAMED])]
    return "; ".join([*named, *(["…"] if len(texts) > _MOST_NAMED else [])])


def _largest(values: NDArray[np.float64]) -> str:
    return short(float(np.nanmax(values))) if np.isfinite(values).any() else "not logged"


def _at(record: RunRecord, key: str, *, samples: float) -> float | None:
    values = column(record.train, key)
    finite = np.isfinite(values)
    if not finite.any():
        return None
    return float(np.interp(samples, column(record.train, SAMPLES)[finite], values[finite]))
