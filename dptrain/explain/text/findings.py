"""What a run found, one short sentence per figure, computed from its record; no drawing."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from dptrain.explain.model.run_placement import resolved_share
from dptrain.explain.record import SAMPLES, Row, column, is_applied, is_resolved, known_lower

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from dptrain.explain.model.run_placement import RunPlacement
    from dptrain.explain.record import RunRecord

BITS_PER_BYTE = "eval/bits_per_byte"

CAVEAT = (
    "The noise scale is not the optimal batch size: it typically differs from the critical batch size by a factor of "
    "six (tasks in McCandlish et al. 2018)."
)

_NUM_MOMENTS = 20
"""Points of a run's noise scale over its loss: rows that follow each other differ little, and their bars overlap."""

_MIN_ROWS_PER_MEDIAN = 3
"""A throughput from fewer rows than this is not worth a comparison: the first step alone may be ten times slower."""


def about_loss(record: RunRecord) -> str:
    """Say how far the loss went: the held-out one where it was evaluated, else the smoothed training loss."""
    evals = [row for row in record.evals if row.get("eval/loss") is not None]
    values = column(evals, "eval/loss") if evals else record.smoothed("train/loss")[1]
    name = "Held-out loss" if evals else "Training loss, smoothed,"
    if not len(values):
        return "No finite loss was logged"
    detail = _metrics(evals[-1]) if evals else ""
    return f"{name} {_moved(values, unit=loss_unit(record))}{detail}{_dropped(record)}"


def loss_unit(record: RunRecord) -> str:
    """Name the unit of the loss: nats where the task converts it to bits, else unknown, hence empty."""
    return "nats" if any(BITS_PER_BYTE in row for row in record.evals) else ""


def about_batch(record: RunRecord) -> str:
    """Say how often the global batch moved, and from where to where; or that it was only advised to."""
    first, last = (f"{size:,.0f}" for size in first_and_last_batch(record))
    if num_changes := len(record.batch_changes):
        return f"Batch size: {first} → {last} samples in {count(num_changes, 'change')}"
    stayed = f"Batch size: constant, {first} samples"
    if advice := record.advice:
        return f"{stayed}; {count(len(advice), 'change')} advised, the last one to {advice[-1]['batch/after']:,.0f}"
    return stayed


def about_noise_scale(record: RunRecord) -> str:
    """Say what is known of the noise scale at the end, and of its change where the intervals prove one.

    It "grew" or "fell" only where the first and the last interval do not overlap.
    """
    known = record.first_and_last_known()
    if known is None:
        measured = any("noise_scale/state" in row for row in record.train)
        return f"The noise scale was not {'resolved' if measured else 'measured'} in this run"
    return f"The noise scale {_from_to(*known)}"


def about_noise_against_loss(record: RunRecord) -> str:
    """Say how the noise scale moved while the smoothed training loss did."""
    losses, rows = moments(record)
    if len(rows) < 2:  # noqa: PLR2004 - one moment shows no move
        return about_noise_scale(record)
    return f"The training loss {_moved(losses[[0, -1]])}; the noise scale {_from_to(rows[0], rows[-1])}"


def moments(record: RunRecord) -> tuple[NDArray[np.float64], list[Row]]:
    """Return smoothed training loss and row where the loss first fell to each of some levels, and at the end.

    The levels lie evenly between the loss at the first row with a resolved noise scale, or else with a bound, and the
    lowest; evenly in the logarithm where there is one.
    """
    begin = record.first_and_last_known()
    where, losses = record.smoothed("train/loss")
    if begin is None or not len(losses):
        return np.array([]), []
    known = [row for row in record.train if known_lower(row) is not None and row[SAMPLES] >= begin[0][SAMPLES]]
    at = np.interp(column(known, SAMPLES), where, losses)
    spaced = np.geomspace if at.min() > 0 else np.linspace
    fallen = np.minimum.accumulate(at)
    levels = np.maximum(spaced(at[0], at.min(), _NUM_MOMENTS), at.min())  # rounding must not pass by the lowest
    reached = [int(np.argmax(fallen <= level)) for level in levels]
    chosen = np.unique([*reached, len(known) - 1])
    return at[chosen], [known[index] for index in chosen]


def about_position(found: RunPlacement | None, record: RunRecord) -> str:
    """Say what the run took of steps and samples, against the fewest possible and against a fixed batch."""
    if found is None:
        if record.first_and_last_known() is None:
            return about_noise_scale(record)
        return f"No frontier: the noise scale was resolved for only {resolved_share(record):.0%} of the samples"
    steps, samples = found.steps / found.implied.min_steps, found.samples / found.implied.min_samples
    took = f"{short(steps, digits=2)}× the minimum steps, {short(samples, digits=2)}× the minimum samples"
    if not record.batch_changes:
        return f"Constant batch {short(found.batch)}: {took}"
    return f"This run: {took}; {about_saving(found)}"


def about_fewest(found: RunPlacement) -> str:
    """Say what no fixed batch can undercut."""
    fewest = found.implied
    return f"Dotted: minimum steps {short(fewest.min_steps)}, minimum samples {short(fewest.min_samples)}."


def about_saving(found: RunPlacement) -> str:
    """Say what the run saved against a fixed batch that spends steps and samples in the same proportion."""
    against = f"a constant batch of {short(found.batch, digits=2)}"
    if found.saving is None:
        return f"no gain over {against}"
    return f"{abs(found.saving):.0%} {'fewer' if found.saving > 0 else 'more'} steps and samples than {against}"


def about_groups(record: RunRecord) -> str:
    """Say how far apart the noise scales of parts of the model are, as far as their intervals prove it."""
    groups = {name: row for name, row in record.groups().items() if known_lower(row) is not None}
    if not groups:
        return "The noise scale of no group was resolved"
    least = min(groups, key=lambda name: groups[name]["noise_scale/upper"] or math.inf)
    most = max(groups, key=lambda name: float(groups[name]["noise_scale/lower"]))
    if groups[most]["noise_scale/lower"] <= (groups[least]["noise_scale/upper"] or math.inf):
        return f"{count(len(groups), 'group')} with a noise scale; no significant difference between any two"
    texts = (f"{noise_scale_text(groups[name])} in {name}" for name in (least, most))
    return f"The noise scale goes from {' to '.join(texts)}"


def about_learning_rate(record: RunRecord) -> str:
    """Say where the learning rate went, and the part of it that was its rule's, for the batch and the noise scale."""
    rates = column(record.train, "train/lr")
    rates = rates[np.isfinite(rates)]
    if not len(rates):
        return "No learning rate was logged"
    factor = _rate_factor(record)
    because = f" (scaling with the batch: ×{short(factor)})" if np.isfinite(factor) and factor != 1 else ""
    peak = rates.max()
    if peak > max(rates[0], rates[-1]) * 1.01:
        return f"Learning rate: peak {short(peak)}, final {short(rates[-1])}{because}"
    return f"The learning rate {_moved(rates)}{because}"


def _rate_factor(record: RunRecord) -> float:
    """Return the factor of the rule at the end; NaN where the log does not tell.

    A rule that reads the noise scale moves it at each step. A log of an earlier version has it for the latest change of
    the batch alone, which is the one at the end where the rule goes by the batch.
    """
    known = record.train[-1].get("batch/lr_factor")
    if known is not None:
        return float(known)
    if record.setting("optimizer.rule") not in ("none", "linear", "square_root"):
        return math.nan
    factors = column([row for row in record.decisions if is_applied(row)], "lr_factor/after")
    return float(factors[-1]) if len(factors) else 1.0


def about_throughput(record: RunRecord) -> str:
    """Say the median samples/s, at the first and at the last batch where the batch moved."""
    speeds, sizes = column(record.train, "throughput/samples_per_sec"), column(record.train, "batch/global")
    timed = np.isfinite(speeds)
    if not timed.any():
        return "No throughput was logged"
    first, last = first_and_last_batch(record)
    at_first, at_last = (speeds[timed & (sizes == size)] for size in (first, last))
    if first == last or min(len(at_first), len(at_last)) < _MIN_ROWS_PER_MEDIAN:
        return f"Throughput: {short(np.median(speeds[timed]))} samples/s (median)"
    return (
        f"Throughput: {short(np.median(at_first))} samples/s at batch {first:,.0f}, "
        f"{short(np.median(at_last))} samples/s at batch {last:,.0f} (medians)"
    )


def about_run(record: RunRecord) -> str:
    """Say in one line what was run, when, where, and whether it came to its end."""
    samples = record.last(SAMPLES, in_summary="samples_seen") or 0
    wall = record.last("progress/wall_s", in_summary="wall_s")
    backend = f" ({record.summary['backend']})" if record.summary.get("backend") else ""
    parts = [
        task(record) or record.name,
        *([f"{count(replicas, 'replica')}{backend}"] if (replicas := num_replicas(record)) else []),
        *_about_facts(record),
        *([f"branched off at sample {record.start:,.0f}"] if record.start else []),
        f"{max(samples - record.start, 0):,.0f} samples" + (f" in {wall:,.0f} s" if wall else ""),
        *([] if record.summary else ["not finished (no summary.json)"]),
    ]
    return " · ".join(parts)


def _about_facts(record: RunRecord) -> list[str]:
    """Return device, parameter count, date and version, those that are known."""
    facts = record.facts
    device, parameters = facts.get("device_name") or facts.get("device_type"), facts.get("num_parameters")
    return [
        *([str(device)] if device else []),
        *([f"{parameters:,.0f} parameters"] if isinstance(parameters, (int, float)) else []),
        *([f"started {facts['started']}"] if facts.get("started") else []),
        *([f"dptrain {facts['dptrain_version']}"] if facts.get("dptrain_version") else []),
        *([f"torch {facts['torch_version']}"] if facts.get("torch_version") else []),
    ]


def task(record: RunRecord) -> str:
    """Return the name of the task, empty where it is not known."""
    return str(record.summary.get("task") or record.setting("task") or "")


def about_geometry(record: RunRecord) -> str:
    """Say how the global batches were laid out, as ranges where they moved; empty where that was not logged."""
    micro, steps = (_range(column(record.train, f"batch/{name}")) for name in ("micro", "accumulation"))
    replicas = num_replicas(record)
    if not (micro and steps and replicas):
        return ""
    return f"Global batch = micro-batch {micro} × accumulation steps {steps} × {count(replicas, 'replica')}"


def about_averaging(record: RunRecord) -> str:
    """Say how precise the last noise scale is, in steps, and the level of its interval; empty where unknown."""
    steps = record.train[-1].get("noise_scale/effective_steps")
    known = level(record)
    interval = f", interval at {known}" if known else ""
    return f"Noise scale: as precise as a mean over {steps:,.0f} steps{interval}." if steps else ""


def level(record: RunRecord) -> str:
    """Return the level of the intervals, such as "95 %"; empty where it is not known."""
    value = record.setting("noise.level")
    return f"{100 * value:g} %" if isinstance(value, (int, float)) else ""


def noise_scale_text(row: Row) -> str:
    """Write the noise scale of a row with its interval, or the lower bound that is known of it.

    Two digits: the interval is never so narrow that a third would mean something.
    """
    if is_resolved(row):
        value, lower, upper = (short(row[f"noise_scale/{name}"], digits=2) for name in ("value", "lower", "upper"))
        return f"{value} [{lower}, {upper}]"
    return f"at least {short(row['noise_scale/lower'], digits=2)}"


def first_and_last_batch(record: RunRecord) -> tuple[float, float]:
    """Return the batches that were decided on: the last step of a run is often cut short by its end."""
    if moves := record.batch_changes:
        return moves[0]["batch/before"], moves[-1]["batch/after"]
    return (record.train[0]["batch/global"],) * 2


def num_replicas(record: RunRecord) -> int:
    """Return the world size; before the end of a run it follows from the layout of its first step. 0: not known."""
    row = record.train[0]
    passes = (row.get("batch/micro") or 0) * (row.get("batch/accumulation") or 0)
    return int(record.last("time/world_size", in_summary="world_size") or (passes and row["batch/global"] // passes))


def short(value: float, *, digits: int = 3) -> str:
    """Write a number with the digits that count, without an exponent where it has a size: 0.00123, 1.78, 12,300."""
    rounded = float(f"{value:.{digits}g}")
    return f"{rounded:,.0f}" if abs(rounded) >= 10**digits else f"{rounded:.{digits}g}"


def count(number: int, noun: str) -> str:
    """Write how many there are of something, such as "1 replica" or "2 replicas"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _from_to(first: Row, last: Row) -> str:
    if first is last:
        return f"was {noise_scale_text(last)} samples"
    return f"{_verb(first, last)} {noise_scale_text(first)} to {noise_scale_text(last)} samples"


def _verb(first: Row, last: Row) -> str:
    if is_resolved(first) and last["noise_scale/lower"] > first["noise_scale/upper"]:
        return "grew from"
    if is_resolved(first) and is_resolved(last) and last["noise_scale/upper"] < first["noise_scale/lower"]:
        return "fell from"
    return "went from"


def _moved(values: NDArray[np.float64], *, unit: str = "") -> str:
    before, after, unit = short(values[0]), short(values[-1]), f" {unit}" if unit else ""
    if len(values) == 1:
        return f"was {after}{unit}"
    if before == after:
        return f"stayed at {after}{unit}"
    return f"{'fell' if values[-1] < values[0] else 'rose'} from {before} to {after}{unit}"


def _metrics(row: Row) -> str:
    """Write the figures beside the loss of an evaluation, such as " (2.57 bits per byte)"."""
    names = [name for name in row if name.startswith("eval/") and name != "eval/loss" and row[name] is not None]
    texts = [f"{row[name]:#.3g}".rstrip(".") + f" {name.removeprefix('eval/').replace('_', ' ')}" for name in names]
    return f" ({', '.join(texts)})" if texts else ""


def _dropped(record: RunRecord) -> str:
    dropped = record.last("train/steps_dropped", in_summary="steps_dropped")
    return f"; {count(int(dropped), 'step')} skipped" if dropped else ""


def _range(values: Sequence[float] | NDArray[np.float64]) -> str:
    if not np.isfinite(values).all():
        return ""
    low, high = int(np.min(values)), int(np.max(values))
    return f"{low}" if low == high else f"{low}–{high}"


def _times(number: int) -> str:
    return {1: "once", 2: "twice"}.get(number, f"{number} times")
