"""The recommended batch size and its reasons, from the noise scale of a run."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from dptrain.explain.model.run_placement import critical_ratio, position
from dptrain.explain.record import is_resolved
from dptrain.explain.text.findings import (
    about_noise_scale,
    about_saving,
    first_and_last_batch,
    level,
    noise_scale_text,
    short,
)

if TYPE_CHECKING:
    from dptrain.explain.model.run_placement import ImpliedFrontier, RunPlacement
    from dptrain.explain.record import Row, RunRecord

CAUTION = (
    "This is an order of magnitude: the noise scale typically differs from the critical batch size by a factor of six "
    "(tasks in McCandlish et al. 2018). dptrain sweep measures the critical batch size itself."
)

_GEOMETRIES = {
    "sgd": "measured on plain gradients, as in SGD",
    "adam": "measured on gradients scaled by Adam's second moments",
}
_LEAST_SAVING = 0.005


def advise(record: RunRecord) -> list[str]:
    """Return the recommended batch and its reasons; without one, what is missing."""
    known = record.first_and_last_known()
    if known is None:
        return _unknown(record)
    if (found := position(record)) is not None:
        return [*_fixed(record, found), _moving(record, found), CAUTION]
    return [*(_late if is_resolved(known[1]) else _bound)(known[1], record), CAUTION]


def _unknown(record: RunRecord) -> list[str]:
    if any("noise_scale/state" in row for row in record.train):
        how = "train longer, or with more replicas or micro-batches per step, whose gradients are compared"
    else:
        how = "measuring needs control.mode other than off, and at least two micro-batches per step over all replicas"
    return ["No recommendation from this run.", f"{about_noise_scale(record)}: {how}."]


def _fixed(record: RunRecord, found: RunPlacement) -> list[str]:
    value, low, high = (
        short(curve.noise_scale, digits=2) for curve in (found.implied, *sorted((found.low, found.high), key=_scale))
    )
    return [
        (
            f"Recommended constant global batch for a run like this one: about "
            f"{_power_of_two(critical_ratio(record) * found.implied.noise_scale)} samples."
        ),
        (
            f"Noise scale, averaged over the progress of the run: {value} [{low}, {high}] samples "
            f"({_conditions(record)}). A batch of {_critical(record)} takes twice the minimum steps and twice the "
            "minimum samples. A smaller batch saves samples, a larger one saves steps."
        ),
    ]


def _moving(record: RunRecord, found: RunPlacement) -> str:
    most = (
        f"upper bound for any adaptive batch: {100 * found.best_saving:.1f} %"
        if found.best_saving >= _LEAST_SAVING
        else "the noise scale changed too little for an adaptive batch to gain"
    )
    if not record.batch_changes:
        return f"{about_noise_scale(record)}. Estimated gain over the best constant batch: {most}."
    first, last = first_and_last_batch(record)
    goodput = record.setting("control.law") == "goodput"
    law = ", by progress per second on this hardware" if goodput else ""
    return (
        f"{about_noise_scale(record)}. Batch: {first:,.0f} → {last:,.0f}{law}. Estimated effect on steps and samples: "
        f"{about_saving(found)} ({most})."
    )


def _late(last: Row, record: RunRecord) -> list[str]:
    return [
        (
            "Recommended global batch from here on: about "
            f"{_power_of_two(critical_ratio(record) * last['noise_scale/value'])} samples."
        ),
        (
            f"Noise scale at the end: {noise_scale_text(last)} samples ({_conditions(record)}). From there, a batch "
            f"of {_critical(record)} takes twice the minimum steps and twice the minimum samples. It was resolved too "
            "late for a statement about the whole run."
        ),
    ]


def _bound(last: Row, record: RunRecord) -> list[str]:
    return [
        f"A global batch of {short(last['noise_scale/lower'], digits=2)} samples is not too large.",
        (
            f"Noise scale: {noise_scale_text(last)} samples ({_conditions(record)}). Its upper end is not identified "
            "yet; train longer, or with more micro-batches per step."
        ),
    ]


def _critical(record: RunRecord) -> str:
    """Return what the critical batch size is, in terms of the noise scale; law and plan take the same."""
    ratio = critical_ratio(record)
    return "that size" if ratio == 1 else f"{short(ratio)}× that size (control.critical_ratio)"


def _conditions(record: RunRecord) -> str:
    """Return what belongs to every noise scale: the level of its interval, the geometry, the optimizer."""
    geometry = str(record.setting("noise.geometry") or "sgd")
    optimizer = str(record.setting("optimizer.name") or "")
    other = f", though the optimizer is {optimizer}" if geometry == "sgd" and "adam" in optimizer.lower() else ""
    return f"{level(record)} interval; {_GEOMETRIES.get(geometry, geometry)}{other}".strip()


def _scale(curve: ImpliedFrontier) -> float:
    return curve.noise_scale


def _power_of_two(value: float) -> str:
    return f"{2 ** max(0, round(math.log2(value))):,}" if value > 0 else "1"
