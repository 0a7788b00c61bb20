"""What batch to use and why, in two or three sentences, as far as a run's noise scale allows to say."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from dptrain.explain.model.run_placement import position
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
    "Take it as an order of magnitude: in published tasks the noise scale was off by a typical factor of six from the "
    "critical batch size of whole sweeps, which dptrain sweep measures."
)

_GEOMETRIES = {
    "sgd": "measured on plain gradients, as SGD sees them",
    "adam": "measured on gradients as Adam's second moments scale them",
}
_LEAST_SAVING = 0.005


def advise(record: RunRecord) -> list[str]:
    """Say what batch to use, then why; where the run does not tell, say that, and what would."""
    known = record.first_and_last_known()
    if known is None:
        return _unknown(record)
    if (found := position(record)) is not None:
        return [*_fixed(record, found), _moving(record, found), CAUTION]
    return [*(_late if is_resolved(known[1]) else _bound)(known[1], record), CAUTION]


def _unknown(record: RunRecord) -> list[str]:
    if any("noise_scale/state" in row for row in record.train):
        how = "train longer, or with more replicas or micro-batches in a step: it is their gradients that are compared"
    else:
        how = "it takes two or more replicas or micro-batches in a step, and measuring switched on"
    return ["This run does not say what batch to use.", f"{about_noise_scale(record)}: {how}."]


def _fixed(record: RunRecord, found: RunPlacement) -> list[str]:
    value, low, high = (
        short(curve.noise_scale, digits=2) for curve in (found.implied, *sorted((found.low, found.high), key=_scale))
    )
    return [
        (
            f"Take a global batch of about {_power_of_two(found.implied.noise_scale)} samples, if it stays fixed "
            "through a run like this one."
        ),
        (
            f"Averaged over the run's progress, the noise scale was {value} samples ({low}–{high} by the ends of its "
            f"{_conditions(record)}): a batch of that size takes twice the fewest steps and twice the fewest "
            "samples. A smaller one saves samples, a larger one saves steps."
        ),
    ]


def _moving(record: RunRecord, found: RunPlacement) -> str:
    most = (
        f"following it exactly would save {found.best_saving:.1%} of both at best"
        if found.best_saving >= _LEAST_SAVING
        else "it moved too little for a moving batch to gain anything"
    )
    if not record.batch_changes:
        return f"{about_noise_scale(record)}; against the best fixed batch, {most}."
    first, last = first_and_last_batch(record)
    goodput = record.setting("control.law") == "goodput"
    law = "a law that also weighs this hardware's step times" if goodput else "the run"
    return (
        f"{about_noise_scale(record)}, and {law} moved the batch from {first:,.0f} to {last:,.0f}. In steps and "
        f"samples, by the same estimate, that was {about_saving(found)} ({most})."
    )


def _late(last: Row, record: RunRecord) -> list[str]:
    return [
        f"To go on from here, take a global batch of about {_power_of_two(last['noise_scale/value'])} samples.",
        (
            f"At the end the noise scale was {noise_scale_text(last)} samples ({_conditions(record)}): from there, a "
            "batch of that size takes twice the fewest steps and twice the fewest samples. It was known too late to "
            "speak for the whole run."
        ),
    ]


def _bound(last: Row, record: RunRecord) -> list[str]:
    return [
        f"A global batch of {short(last['noise_scale/lower'], digits=2)} samples is not too large.",
        (
            f"The noise scale is {noise_scale_text(last)} samples ({_conditions(record)}). How much larger it is stays "
            "open; a longer run, or more micro-batches in a step, would tell."
        ),
    ]


def _conditions(record: RunRecord) -> str:
    """Name what a noise scale must not be told without: the level of its interval, the geometry, the optimizer."""
    geometry = str(record.setting("noise.geometry") or "sgd")
    optimizer = str(record.setting("optimizer.name") or "")
    other = f", though the optimizer is {optimizer}" if geometry == "sgd" and "adam" in optimizer.lower() else ""
    return f"{level(record)} interval; {_GEOMETRIES.get(geometry, geometry)}{other}".strip()


def _scale(curve: ImpliedFrontier) -> float:
    return curve.noise_scale


def _power_of_two(value: float) -> str:
    return f"{2 ** max(0, round(math.log2(value))):,}" if value > 0 else "1"
