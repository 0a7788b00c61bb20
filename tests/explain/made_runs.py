"""Run folders made up for the tests of the report: seeded curves in the schema of the trainer's logs."""

from __future__ import annotations

import json
import math

import numpy as np
import yaml


def write_run(
    folder,
    *,
    num_steps=300,
    noise="resolves",
    batches=(16, 32, 64, 48, 128),
    eval_every=40,
    finished=True,
    applied=None,
    groups=None,
    edit=None,
    **settings,
):
    """Write a run folder and return it.

    Args:
        folder: made if need be.
        num_steps: rows of training.
        noise: "resolves", "bound only" or "never".
        batches: one after the other, for equally many steps.
        eval_every: steps; 0: never.
        finished: with a summary.
        applied: of all decisions; None: not said.
        groups: factor on the noise scale by group.
        edit: changes the training rows before they are written.
        settings: of config.yaml, beside the usual ones.
    """
    folder.mkdir(exist_ok=True)
    rows, decisions = _rows(num_steps=num_steps, noise=noise, batches=batches, groups=groups or {})
    if edit:
        edit(rows)
    evals = [] if not eval_every else [_eval(row, index / len(rows)) for index, row in enumerate(rows)][::eval_every]
    if applied is not None:
        decisions = [{**row, "applied": applied} for row in decisions]
    write_rows(folder / "metrics.jsonl", [*rows, *evals])
    write_rows(folder / "decisions.jsonl", decisions)
    config = {"task": "pysource", "noise": {"level": 0.95}, "optimizer": {"name": "adamw"}, **settings}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    if finished:
        summary = {
            "task": "pysource",
            "world_size": 2,
            "backend": "gloo",
            "device": "cpu",
            "samples_seen": rows[-1]["progress/samples"],
            "wall_s": 212.4,
            "steps_dropped": rows[-1]["train/steps_dropped"],
        }
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def write_rows(path, rows):
    """Write a log."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _state(index, num_steps, kind):
    """What is known of the noise scale at a step: nothing, then a lower bound, then both ends."""
    if kind == "never" or index < 0.05 * num_steps:
        return "not resolved yet"
    return "at least" if kind == "bound only" or index < 0.2 * num_steps else "resolved"


def _rows(*, num_steps, noise, batches, groups, seed=7):
    rng = np.random.default_rng(seed)
    samples, rows, decisions = 0, [], []
    for step in range(1, num_steps + 1):
        batch = batches[(step - 1) * len(batches) // num_steps]
        samples += batch
        state = _state(step, num_steps, noise)
        phi = 40 * (1 + 7 * step / num_steps) * float(np.exp(0.05 * rng.standard_normal()))
        spread = 1.0 + 0.25 + 1.5 * math.exp(-6 * (step / num_steps - 0.2))
        rows.append(
            {
                "kind": "train",
                "step": step,
                "progress/samples": samples,
                "progress/epoch": samples / 4096,
                "progress/wall_s": step * 0.05,
                "train/loss": 1.8 + 3.7 * math.exp(-5 * step / num_steps) + 0.15 * rng.standard_normal(),
                "train/lr": 0.003 * min(1.0, step / (0.1 * num_steps)) * (1 - 0.8 * step / num_steps),
                "train/grad_norm": 1.0,
                "batch/global": batch,
                "batch/micro": 8,
                "batch/accumulation": batch // 16,
                "batch/lr_factor": math.sqrt(batch / batches[0]),
                **_interval("noise_scale", phi, spread, state),
                **{
                    key: value
                    for name, factor in groups.items()
                    for key, value in _interval(f"noise_scale/{name}", phi * factor, spread, state).items()
                    if not key.endswith("/state")
                },
                "noise_scale/effective_steps": 23.4,
                "throughput/samples_per_sec": 400 + batch / 4 + 30 * rng.standard_normal(),
                "train/steps_dropped": 0,
            }
        )
        if len(rows) > 1 and batch != rows[-2]["batch/global"]:
            decisions.append(_decision(rows[-2], rows[-1], first=batches[0]))
    return rows, decisions


def _interval(prefix, phi, spread, state):
    return {
        f"{prefix}/value": phi if state == "resolved" else None,
        f"{prefix}/lower": 0.0 if state == "not resolved yet" else phi / spread,
        f"{prefix}/upper": phi * spread if state == "resolved" else None,
        f"{prefix}/state": state,
    }


def _decision(before, after, *, first):
    return {
        "step": after["step"],
        "progress/samples": before["progress/samples"],
        "batch/before": before["batch/global"],
        "batch/after": after["batch/global"],
        "lr_factor/before": math.sqrt(before["batch/global"] / first),
        "lr_factor/after": math.sqrt(after["batch/global"] / first),
        "reason": "the noise scale is above what the batch is right for",
    }


def _eval(row, progress):
    loss = 1.78 + (5.53 - 1.78) * math.exp(-5 * progress)
    return {
        "kind": "eval",
        "step": row["step"],
        "progress/samples": row["progress/samples"],
        "eval/loss": loss,
        "eval/bits_per_byte": loss / math.log(2),
    }
