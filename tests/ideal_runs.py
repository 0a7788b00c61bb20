"""Runs that follow the theory to the letter, made up without training: what a plan says of them can be checked."""

from __future__ import annotations

import json
from dataclasses import replace

from dptrain.explain.record import RunRecord

FALL, HEIGHT = 0.3, 5.0
"""The loss is HEIGHT · s^-FALL, s being the progress in steps without noise."""
GROWTH, SCALE = 3.0, 2000.0
"""The noise scale is SCALE · loss^-GROWTH."""
PER_STEP_S, PER_PASS_S, PER_SAMPLE_S = 0.02, 0.004, 0.001


def loss_at(progress):
    return HEIGHT * progress**-FALL


def noise_scale_at(progress):
    return SCALE * loss_at(progress) ** -GROWTH


def steps_to(loss, *, batch):
    """Optimizer steps of a fixed batch to a loss."""
    progress, steps = 0.0, 0
    goal = (loss / HEIGHT) ** (-1 / FALL)
    while progress < goal:
        progress += 1 / (1 + noise_scale_at(max(progress, 0.5)) / batch)
        steps += 1
    return steps


def step_s(*, micro, accumulation):
    return PER_STEP_S + accumulation * (PER_PASS_S + PER_SAMPLE_S * micro)


def ideal_rows(*, batches=(16, 32, 64, 128), steps_each=150, micro=8, world_size=2, half_width=0.1, resolved_after=5):
    """Rows of a run whose batch moves, and of its evaluations; each number is what the theory says."""
    rows, evals, progress, samples, number = [], [], 0.0, 0, 0
    for batch in batches:
        for _ in range(steps_each):
            number, samples = number + 1, samples + batch
            scale = noise_scale_at(max(progress, 0.5))
            progress += 1 / (1 + scale / batch)
            accumulation = batch // (micro * world_size)
            resolved = number > resolved_after
            rows.append(
                {
                    "kind": "train",
                    "step": number,
                    "progress/samples": samples,
                    "train/loss": loss_at(progress),
                    "batch/global": batch,
                    "batch/micro": micro,
                    "batch/accumulation": accumulation,
                    "noise_scale/state": "resolved" if resolved else "at least",
                    "noise_scale/value": scale if resolved else None,
                    "noise_scale/lower": scale * (1 - half_width),
                    "noise_scale/upper": scale * (1 + half_width) if resolved else None,
                    "time/step_s": step_s(micro=micro, accumulation=accumulation),
                    "time/world_size": world_size,
                    "ledger/flops": 5e7 * samples,
                    "ledger/device_s": 2.0 * number,
                    "ledger/energy_j": 400.0 * number,
                }
            )
            if number % 10 == 0:
                evals.append(
                    {"kind": "eval", "step": number, "progress/samples": samples, "eval/loss": loss_at(progress)}
                )
    return rows, evals


SUMMARY = {"task": "ideal", "world_size": 2, "device": "cuda", "peak_flops_per_s": 1e12}


def write_ideal_run(folder, *, edit=None, summary=SUMMARY, **options):
    """Write such a run's folder."""
    rows, evals = ideal_rows(**options)
    if edit:
        edit(rows, evals)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, *evals]))
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def ideal_record(*, edit=None, summary=SUMMARY, **options):
    """Return such a run, read."""
    rows, evals = ideal_rows(**options)
    if edit:
        edit(rows, evals)
    return RunRecord(name="ideal", train=rows, evals=evals, decisions=[], summary=summary, config={})


def branch_of(record, *, at):
    """Return what is behind a row of a run, as the record of a run of its own that began there."""
    used = ("step", "ledger/flops", "ledger/device_s", "ledger/energy_j")
    before = record.train[at - 1]
    rows = [{**row, **{name: row[name] - before[name] for name in used}} for row in record.train[at:]]
    evals = [row for row in record.evals if row["progress/samples"] > before["progress/samples"]]
    return replace(record, train=rows, evals=evals, facts={**record.facts, "start_samples": before["progress/samples"]})
