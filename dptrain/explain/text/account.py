"""What a run cost: compute, time, energy and money, or why one of them was not measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dptrain.cost.ledger import PETAFLOP_S_DAY
from dptrain.explain.record import SAMPLES
from dptrain.explain.text.findings import num_replicas, short

if TYPE_CHECKING:
    from dptrain.explain.record import RunRecord

NOT_MEASURED = "not measured"

_HOUR_S = 3600.0
_KWH_J = 3.6e6


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One line of the account.

    Attributes:
        name: what is counted.
        value: with its unit, or that it was not measured.
        note: how it was counted, or why it was not.
    """

    name: str
    value: str
    note: str


def account(record: RunRecord) -> list[Entry]:
    """List what a run has cost so far, through all its attempts."""
    return [_work(record), _time(record), _devices(record), *_compute(record), _energy(record), _money(record)]


def _work(record: RunRecord) -> Entry:
    samples, steps = record.last(SAMPLES, in_summary="samples_seen") or 0, record.last("step", in_summary="steps") or 0
    value = f"{max(samples - record.start, 0):,.0f} samples in {steps:,.0f} optimizer steps"
    note = f"training, from sample {record.start:,.0f} of another run on" if record.start else "training"
    return Entry(name="Work", value=value, note=note)


def _time(record: RunRecord) -> Entry:
    wall_s = record.last("progress/wall_s", in_summary="wall_s")
    if wall_s is None:
        return Entry(name="Time", value=NOT_MEASURED, note="the log has no clock")
    return Entry(name="Time", value=duration(wall_s), note="training, evaluation and checkpoints")


def _devices(record: RunRecord) -> Entry:
    device_s = record.last("ledger/device_s", in_summary="device_s")
    note = "number of devices × time"
    if device_s is None:
        wall_s = record.last("progress/wall_s", in_summary="wall_s")
        device_s, note = (wall_s or 0.0) * num_replicas(record), "number of replicas × time; the run kept no ledger"
    if not device_s:
        return Entry(name="Device-hours", value=NOT_MEASURED, note="neither time nor number of replicas was logged")
    return Entry(name="Device-hours", value=short(device_s / _HOUR_S), note=note)


def _compute(record: RunRecord) -> list[Entry]:
    flops, mfu = record.last("ledger/flops", in_summary="flops"), record.last("ledger/mfu", in_summary="mfu")
    device = record.summary.get("device")
    if flops is None:
        counted = Entry(name="Compute", value=NOT_MEASURED, note="operations were not counted")
    else:
        days = flops / PETAFLOP_S_DAY
        value = f"{flops:.3g} FLOP = {days:.2g} petaflop/s-days"
        counted = Entry(name="Compute", value=value, note="operations counted in forward and backward")
    if mfu is None:
        unknown = f"the peak of this device{f' ({device})' if device else ''} is not known"
        why = "operations were not counted" if flops is None else unknown
        return [counted, Entry(name="Utilisation (MFU)", value=NOT_MEASURED, note=why)]
    note = "counted operations ÷ operations at the published peak of the devices"
    return [counted, Entry(name="Utilisation (MFU)", value=f"{mfu:.1%}", note=note)]


def _energy(record: RunRecord) -> Entry:
    energy_j = record.last("ledger/energy_j", in_summary="energy_j")
    if energy_j is None:
        return Entry(name="Energy", value=NOT_MEASURED, note="no energy counter was read; NVIDIA GPUs have one")
    return Entry(
        name="Energy", value=f"{short(energy_j / _KWH_J)} kWh", note="energy counters of the devices; host not included"
    )


def _money(record: RunRecord) -> Entry:
    cost = record.last("ledger/cost", in_summary="cost")
    if cost is None:
        return Entry(name="Money", value="not known", note="log.price_per_device_hour is not set")
    return Entry(name="Money", value=short(cost), note="at log.price_per_device_hour, in its currency")


def duration(seconds: float) -> str:
    """Write a time with the unit that suits it, such as "12.5 s", "7 min 30 s" or "3 h 20 min"."""
    minutes, hours = seconds / 60, seconds / _HOUR_S
    if minutes < 2:  # noqa: PLR2004 - up to there, seconds are read more easily
        return f"{short(seconds)} s"
    whole, rest = divmod(round(minutes if hours >= 2 else seconds), 60)  # noqa: PLR2004 - the same for minutes
    return f"{whole:,} h {rest} min" if hours >= 2 else f"{whole} min {rest} s"  # noqa: PLR2004 - the same
