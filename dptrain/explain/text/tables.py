"""The tables of the report: decisions with their reasons, what a run cost, its settings, several runs side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dptrain.explain import compare
from dptrain.explain.figures.figure import label, letter
from dptrain.explain.model.run_placement import position
from dptrain.explain.record import SAMPLES, Row, RunRecord, is_applied, is_resolved, known_lower
from dptrain.explain.text import findings
from dptrain.explain.text.account import account, duration
from dptrain.explain.text.findings import count, short
from dptrain.explain.text.page import Table
from dptrain.noise.derived import routed_noise_scale

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_MOST_DECISIONS = 400
_WINDOW = 0.2

_RUN = ("task", "seed", "max_samples", "global_batch_size", "micro_batch_size", "layout_replicas", "precision")
_GROUPS = ("control", "control.law_options", "noise", "optimizer")
_USED_BY: Mapping[str, tuple[str, ...]] = {
    "control.critical_ratio": ("goodput",),
    "control.min_gain": ("goodput", "noise"),
    "control.smallest": ("goodput", "noise", "pollux", "seesaw", "kaplan"),
    "control.largest": ("goodput", "noise", "pollux", "seesaw", "kaplan"),
}
"""Settings that some laws ignore, by the laws that use them. What is not set is not shown, so others need no entry."""


def _deciding(record: RunRecord) -> dict[str, str]:
    """Return the settings that decide batch, learning rate and noise scale in this run; config.yaml has all."""
    in_groups = [f"{group}.{name}" for group in _GROUPS for name in record.names_in(group)]
    known = {name: record.setting(name) for name in (*_RUN, *in_groups)}
    law = record.setting("control.law")
    return {
        name: str(value)
        for name, value in known.items()
        if value is not None and (law is None or law in _USED_BY.get(name, (law,)))
    }


def decisions(records: Sequence[RunRecord]) -> Table:
    """Return every decision that moved the batch, or would have, with its reason."""
    found = [
        (index, row)
        for index, record in enumerate(records)
        for row in record.decisions
        if row["batch/before"] != row["batch/after"]
    ]
    several = len(records) > 1
    left_out = len(found) - _MOST_DECISIONS
    rows = [[*([letter(index)] if several else []), *_decision(row)] for index, row in found[:_MOST_DECISIONS]]
    about = "Each change of the global batch, with the change of the learning rate."
    if any(not is_applied(row) for _, row in found):
        about += " Advice was logged, not applied."
    if left_out > 0:
        about += f" The last {left_out:,} are only in decisions.jsonl."
    return Table(
        title="Decisions on the batch",
        head=[*(["Run"] if several else []), "Step", "Samples seen", "Batch", "Learning rate", "Reason"],
        rows=rows,
        about=about if found else "The batch never changed.",
        wordy=True,
    )


def _decision(row: Row) -> list[str]:
    factors = row.get("lr_factor/before"), row.get("lr_factor/after")
    rate = f"×{short(factors[1] / factors[0])}" if factors[0] and factors[1] is not None else ""
    reason = str(row.get("reason") or "")
    return [
        f"{row['step']:,.0f}",
        f"{row[SAMPLES]:,.0f}",
        f"{row['batch/before']:,.0f} → {row['batch/after']:,.0f}",
        rate,
        reason if is_applied(row) else f"(advice, not applied) {reason}",
    ]


def experts(record: RunRecord) -> Table | None:
    """Return the noise scale of each expert with the share of the samples that reach it; None where none is logged."""
    groups = record.groups()
    rows = []
    for name in groups:
        samples, tokens = (_mean_of_end(record, f"train/routed_{of}/{name}") for of in ("samples", "tokens"))
        if samples is not None:
            known = known_lower(groups[name]) is not None
            measured = findings.noise_scale_text(groups[name]) if known else "not resolved"
            shares = [f"{samples:.1%}", "not known" if tokens is None else f"{tokens:.1%}"]
            rows.append([name, measured, *shares, _routed(groups[name], share=samples)])
    if not rows:
        return None
    return Table(
        title="Noise scale of each expert",
        head=["Expert", "Noise scale (samples)", "Samples routed to it", "Tokens routed to it", "In routed samples"],
        rows=rows,
        about=(
            "At the end, with its interval; shares are means over the last fifth of the samples. The noise scale "
            "counts samples of the batch, and routing adds to it: φ = (φ_h + 1 − p)/p, where p is the share of the "
            "samples that reach the expert and φ_h the noise scale over those (last column)."
        ),
    )


def _mean_of_end(record: RunRecord, key: str) -> float | None:
    """Return the mean of a column over the last fifth of the samples, about what the noise scale of a group spans."""
    begin = record.train[-1][SAMPLES] - _WINDOW * record.samples_trained
    known = [row[key] for row in record.train if row.get(key) is not None and row[SAMPLES] > begin]
    return sum(known) / len(known) if known else None


def _routed(row: Row, *, share: float) -> str:
    if not is_resolved(row) or share <= 0:
        return "not resolved"
    return short(max(0.0, routed_noise_scale(row["noise_scale/value"], probability=share)), digits=2)


def costs(record: RunRecord) -> Table:
    """Return what the run cost."""
    entries = [[entry.name, entry.value, entry.note] for entry in account(record)]
    return Table(
        title="Cost",
        head=["Quantity", "Value", "How it was counted, or why it was not"],
        rows=entries,
        about="Of all attempts so far.",
        wordy=True,
    )


def settings(record: RunRecord) -> Table:
    """Return the settings that decided in this run."""
    return Table(
        title="Settings",
        head=["Name", "Value"],
        rows=[[name, value] for name, value in _deciding(record).items()],
        about=" ".join(
            [
                "The settings that decide batch, learning rate and noise scale, with defaults filled in.",
                _sentence(findings.about_geometry(record)),
            ]
        ),
    )


def _sentence(text: str) -> str:
    return f"{text}." if text else ""


def comparison(records: Sequence[RunRecord]) -> Table:
    """Return what each run was, found and cost, a column for each."""
    target = compare.common_target(records)
    columns = [_found(record, target) | _costs(record) | _deciding(record) for record in records]
    names = list(dict.fromkeys(name for column in columns for name in column))
    rows = [[name, *(column.get(name, "") for column in columns)] for name in names]
    settings_of_all = {name for record in records for name in _deciding(record)}
    differing = [row for row in rows if row[0] not in settings_of_all or len(set(row[1:])) > 1]
    about = "Settings are listed where they differ."
    if target is not None:
        about = f"“To the target”: until the run first reached {target}, which all runs did. {about}"
    return Table(
        title="Comparison of the runs",
        head=["", *(label(index, record) for index, record in enumerate(records))],
        rows=differing,
        about=about,
    )


def _window_mean(record: RunRecord) -> str:
    value = record.train[-1].get("noise_scale/window_mean") if record.train else None
    return "not resolved" if value is None else short(value, digits=2)


def _found(record: RunRecord, target: compare.Target | None) -> dict[str, str]:
    known, found = record.first_and_last_known(), position(record)
    entries = {
        "Task": findings.task(record) or "not known",
        "State": "finished" if record.summary else "not finished",
        "Replicas": count(findings.num_replicas(record), "replica"),
        "Loss": findings.about_loss(record),
        "Batch": findings.about_batch(record),
        "Noise scale now (at the end)": findings.noise_scale_text(known[1]) if known else "not resolved",
        "Noise scale, running mean (half-life 20 % of the run)": _window_mean(record),
        "Noise scale over the progress": short(found.implied.noise_scale, digits=2) if found else "not resolved",
    }
    if target is not None:
        needed = compare.effort(record, target)
        entries |= {
            "Steps to the target": f"{needed.steps:,.0f}",
            "Samples to the target": f"{needed.trained:,.0f}",
            "Time to the target": "not timed" if needed.wall_s is None else duration(needed.wall_s),
        }
    return entries


def _costs(record: RunRecord) -> dict[str, str]:
    return {entry.name: entry.value for entry in account(record)}
