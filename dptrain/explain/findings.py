"""What a run found, one short sentence per curve, computed from its record; no drawing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dptrain.explain.record import Row, column
from dptrain.noise import Resolution

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from dptrain.explain.record import RunRecord

BITS_PER_BYTE = "eval/bits_per_byte"

_MIN_ROWS_PER_MEDIAN = 3
"""A throughput from fewer rows than this is not worth a comparison: the first step alone may be ten times slower."""


def about_loss(record: RunRecord, *, smoothed: NDArray[np.float64]) -> str:
    """Say how far the loss went: the held-out one where it was evaluated, else the smoothed training loss."""
    evals = [row for row in record.evals if row.get("eval/loss") is not None]
    values = column(evals, "eval/loss") if evals else smoothed
    name = "Held-out loss" if evals else "Training loss, smoothed,"
    values = values[np.isfinite(values)]
    if not len(values):
        return "No finite loss was logged"
    detail = _metrics(evals[-1]) if evals else ""
    return f"{name} {_moved(values, unit=loss_unit(record))}{detail}{_dropped(record)}"


def loss_unit(record: RunRecord) -> str:
    """Name the unit of the loss: nats where the task converts it to bits, else unknown, hence empty."""
    return "nats" if any(BITS_PER_BYTE in row for row in record.evals) else ""


def about_batch(record: RunRecord) -> str:
    """Say how often the global batch moved, and from where to where."""
    first, last = (f"{size:,.0f}" for size in _first_and_last_batch(record))
    count = len(record.batch_changes)
    if not count:
        return f"The global batch stayed at {first} samples"
    return f"The batch moved {_times(count)}, from {first} to {last} samples"


def about_noise_scale(record: RunRecord) -> str:
    """Say what is known of the noise scale at the end, and of its change where the intervals prove one.

    It "grew" or "fell" only where the first and the last interval do not overlap.
    """
    known = [row for row in record.train if known_lower(row) is not None]
    if not known:
        measured = any("gns/state" in row for row in record.train)
        return f"The noise scale was not {'resolved' if measured else 'measured'} in this run"
    resolved = [row for row in known if is_resolved(row)]
    first, last = (resolved or known)[0], known[-1]
    if first is last:
        return f"The noise scale was {noise_scale_text(last)} samples"
    return f"The noise scale {_verb(first, last)} {noise_scale_text(first)} to {noise_scale_text(last)} samples"


def about_learning_rate(record: RunRecord) -> str:
    """Say where the learning rate went, and the part of it that the batch changes asked for."""
    rates = column(record.train, "train/lr")
    rates = rates[np.isfinite(rates)]
    if not len(rates):
        return "No learning rate was logged"
    factors = column(record.decisions, "lr_factor/after")
    factor = factors[-1] if len(factors) else 1.0
    because = f" (batch changes: × {_short(factor)})" if np.isfinite(factor) and factor != 1 else ""
    peak = rates.max()
    if peak > max(rates[0], rates[-1]) * 1.01:
        return f"The learning rate rose to {_short(peak)} and ended at {_short(rates[-1])}{because}"
    return f"The learning rate {_moved(rates)}{because}"


def about_throughput(record: RunRecord) -> str:
    """Say the median samples/s, at the first and at the last batch where the batch moved."""
    speeds, sizes = column(record.train, "throughput/samples_per_sec"), column(record.train, "batch/global")
    timed = np.isfinite(speeds)
    if not timed.any():
        return "No throughput was logged"
    first, last = _first_and_last_batch(record)
    at_first, at_last = (speeds[timed & (sizes == size)] for size in (first, last))
    if first == last or min(len(at_first), len(at_last)) < _MIN_ROWS_PER_MEDIAN:
        return f"The run did {_short(np.median(speeds[timed]))} samples/s (median)"
    return (
        f"A batch of {first:,.0f} ran at {_short(np.median(at_first))} samples/s, "
        f"a batch of {last:,.0f} at {_short(np.median(at_last))} (medians)"
    )


def about_run(record: RunRecord) -> str:
    """Say in one line what was run, where, and whether it came to its end."""
    summary, last = record.summary, record.train[-1]
    samples = summary.get("samples_seen") or last["progress/samples"]
    wall = summary.get("wall_s") or last.get("progress/wall_s")
    backend = f" ({summary['backend']})" if summary.get("backend") else ""
    parts = [
        str(summary.get("task") or record.config.get("task") or record.name),
        f"{_count(_num_replicas(record), 'replica')}{backend}",
        f"{samples:,.0f} samples" + (f" in {wall:,.0f} s" if wall else ""),
        *([] if summary else ["not finished (no summary.json)"]),
    ]
    return " · ".join(parts)


def about_geometry(record: RunRecord) -> str:
    """Say how the global batches were laid out, as ranges where they moved."""
    micro, steps = (_range(column(record.train, f"batch/{name}")) for name in ("micro", "accumulation"))
    layout = f"micro-batch {micro} × accumulation steps {steps} × {_count(_num_replicas(record), 'replica')}"
    return f"Global batch = {layout}"


def about_averaging(record: RunRecord) -> str:
    """Say what the last noise scale was averaged over, and the level of its interval; empty where unknown."""
    steps = record.train[-1].get("gns/effective_steps")
    level = (record.config.get("noise") or {}).get("level")
    interval = f", interval at {level:.0%}" if level else ""
    return f"Noise scale: mean over about {steps:,.0f} steps{interval}." if steps else ""


def noise_scale_text(row: Row) -> str:
    """Write the noise scale of a row with its interval, or the lower bound that is known of it.

    Two digits: the interval is never so narrow that a third would mean something.
    """
    if is_resolved(row):
        value, lower, upper = (_short(row[f"gns/{name}"], digits=2) for name in ("b_simple", "lower", "upper"))
        return f"{value} ({lower}–{upper})"
    return f"at least {_short(row['gns/lower'], digits=2)}"


def is_resolved(row: Row) -> bool:
    """Tell whether both ends of the row's interval are known."""
    return row.get("gns/state") == Resolution.RESOLVED and row.get("gns/upper") is not None


def known_lower(row: Row) -> float | None:
    """Return the lower end of the row's interval, None where nothing is known of the noise scale."""
    if is_resolved(row) or row.get("gns/state") == Resolution.AT_LEAST:
        return row.get("gns/lower")
    return None


def _verb(first: Row, last: Row) -> str:
    if is_resolved(first) and last["gns/lower"] > first["gns/upper"]:
        return "grew from"
    if is_resolved(first) and is_resolved(last) and last["gns/upper"] < first["gns/lower"]:
        return "fell from"
    return "went from"


def _moved(values: NDArray[np.float64], *, unit: str = "") -> str:
    before, after, unit = _short(values[0]), _short(values[-1]), f" {unit}" if unit else ""
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
    dropped = record.summary.get("steps_dropped") or record.train[-1].get("train/steps_dropped") or 0
    return f"; {_count(dropped, 'step')} dropped" if dropped else ""


def _first_and_last_batch(record: RunRecord) -> tuple[float, float]:
    """Return the batches that were decided on: the last step of a run is often cut short by its end."""
    if moves := record.batch_changes:
        return moves[0]["batch/before"], moves[-1]["batch/after"]
    return (record.train[0]["batch/global"],) * 2


def _num_replicas(record: RunRecord) -> int:
    """Return the world size; before the end of a run it follows from the layout of its first step."""
    row = record.train[0]
    return int(
        record.summary.get("world_size") or row["batch/global"] // (row["batch/micro"] * row["batch/accumulation"])
    )


def _range(values: Sequence[float] | NDArray[np.float64]) -> str:
    low, high = int(np.min(values)), int(np.max(values))
    return f"{low}" if low == high else f"{low}–{high}"


def _times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count} times")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _short(value: float, *, digits: int = 3) -> str:
    """Write a number with the digits that count, without an exponent where it has a size: 0.00123, 1.78, 12,300."""
    rounded = float(f"{value:.{digits}g}")
    return f"{rounded:,.0f}" if abs(rounded) >= 10**digits else f"{rounded:.{digits}g}"
