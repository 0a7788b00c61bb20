"""What does local parallelism cost in loss, and how much faster than 1F1B are its stages?"""
# python -m benchmarks.local_parallelism [--json PATH|-] [--page] [--parts NAME,…] [--rate RATE] [--earlier JSON,…]

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness
from benchmarks.local_parallelism import losses, stages
from benchmarks.local_parallelism.page import page
from benchmarks.local_parallelism.ratios import throughput_rows
from benchmarks.replicas import run_replicas

PARTS = ("losses", "devices", "cores")
_COUNTS = (2, 4, 8)
_STEPS = 4
_DEVICE_PASS_S = 0.1
"""Long beside what a host takes to wake up a process while others work on it."""


def measure(
    quick: bool,  # noqa: FBT001 - the harness's own signature
    *,
    parts: Sequence[str] = PARTS,
    rate: float | None = None,
    earlier: Sequence[Mapping[str, Any]] = (),
) -> harness.Findings:
    """Train the arms, three seeds each, and time two processes by both ways, in turns.

    Args:
        quick: shorter runs of one seed, and fewer rounds.
        parts: which.
        rate: learning rate of all arms; None for the one that the task suggests.
        earlier: rows of earlier results, which stand before those of this run.
    """
    rows: list[dict[str, Any]] = []
    torch.set_num_threads(1)  # two that wait for one another on a busy machine take longer than one
    if "losses" in parts:
        with tempfile.TemporaryDirectory() as folder:
            rows += losses.losses(Path(folder), quick=quick, rate=rate)
    if "devices" in parts or "cores" in parts:
        rows.append({"part": "equality", "error": equality_error()})
    for part, pass_s in (("devices", _DEVICE_PASS_S), ("cores", 0.0)):
        if part in parts:
            settings = {"counts": list(_COUNTS), "steps": _STEPS, "rounds": 2 if quick else 8, "pass_s": pass_s}
            rounds = run_replicas(stages.timed, world_size=2, args=(settings,))
            rows += throughput_rows(rounds, steps=_STEPS, pass_s=pass_s)
    together = [*earlier, *rows]
    return harness.Findings(
        figures=figures_of(together),
        rows=[{**row, "text": _text(row)} for row in together],
        columns={"part": "{part}", "result": "{text}"},
        note="Losses are held-out nats per byte, means over seeds; ratios are medians over rounds with 95 % intervals.",
    )


def equality_error() -> float:
    """Return the largest difference between the parameters of two processes and of one after steps of both ways.

    In units of the largest change of a parameter in these steps.
    """
    pass_s = 1e-4  # on small models: the products are the same as in large ones
    found = run_replicas(stages.trained, world_size=2, args=(2, 3, pass_s))
    expected, begun = (stages.trained_alone(steps, 3, pass_s=pass_s) for steps in (2, 0))
    worst = 0.0
    for way in stages.WAYS:
        for one, other, start in zip(found[way], expected[way], begun[way], strict=True):
            own, reference, before = (torch.tensor(values) for values in (one, other, start))
            worst = max(worst, float((own - reference).abs().max() / (reference - before).abs().max()))
    return worst


def figures_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the answer: losses above end to end, and throughput over that of 1F1B."""
    figures: dict[str, float] = {}
    of_arms = {row["arm"]: row["loss"] for row in rows if row["part"] == "losses"}
    for name, loss in of_arms.items():
        if name != losses.CONTROL:
            key = name.removeprefix(f"{losses.CONTROL}, ").replace(" ", "_")
            figures[f"loss_above_end_to_end_{key}"] = loss - of_arms[losses.CONTROL]
    for row in rows:
        if row["part"] == "equality":
            figures["two_processes_against_one_max"] = max(
                row["error"], figures.get("two_processes_against_one_max", 0.0)
            )
        if row["part"] == "throughput" and row["pass_s"]:
            figures[f"samples_per_s_over_1f1b_devices_{row['micro_batches']}_micro_batches"] = row["ratio"][1]
        elif row["part"] == "throughput":  # of cores, whose seconds depend on what else runs on them
            figures[f"cpu_time_over_1f1b_{row['micro_batches']}_micro_batches"] = row["cpu"]
    return figures


def _text(row: Mapping[str, Any]) -> str:
    if row["part"] == "losses":
        return f"{row['arm']}: {row['loss']:.4f} ± {row['spread']:.4f}"
    if row["part"] == "equality":
        return f"two processes against one: {row['error']:.1e}"
    low, value, high = row["ratio"]
    where = f"devices of {1000 * row['pass_s']:g} ms" if row["pass_s"] else "cores"
    return f"{where}, {row['micro_batches']} micro-batches: {value:.3f} [{low:.3f}, {high:.3f}] times 1F1B"


def main() -> None:
    """Run from the command line."""
    parser: argparse.ArgumentParser = harness.command_line(question=__doc__, name="local_parallelism")
    parser.add_argument("--parts", metavar="NAME,…", default=",".join(PARTS), help="what to measure; all by default")
    parser.add_argument(
        "--rate", metavar="RATE", type=float, help="learning rate of all arms; the task's where not given"
    )
    parser.add_argument("--earlier", metavar="JSON,…", default="", help="earlier results whose rows stand beside these")
    parser.add_argument("--page", action="store_true", help="write the page beside the JSON")
    options = parser.parse_args()
    parts = [part.strip() for part in options.parts.split(",")]
    if unknown := set(parts) - set(PARTS):
        parser.error(f"there is no part {', '.join(sorted(unknown))}; parts are {', '.join(PARTS)}")
    if options.page and options.json in (None, "-"):
        parser.error("--page is written beside a JSON file: give --json PATH as well")
    paths = [Path(text.strip()) for text in options.earlier.split(",") if text.strip()]
    earlier = [row for path in paths for row in json.loads(path.read_text(encoding="utf-8"))["rows"]]
    findings = measure(options.quick, parts=parts, rate=options.rate, earlier=earlier)
    name = "local_parallelism" if tuple(parts) == PARTS else f"local_parallelism --parts {','.join(parts)}"
    name += f" --rate {options.rate}" if options.rate is not None else ""
    name += f" --earlier {options.earlier}" if paths else ""
    harness.tell(findings, options, question=__doc__, name=name, device="cpu")
    if options.page:
        Path(options.json).with_suffix(".md").write_text(page(Path(options.json)), encoding="utf-8")


if __name__ == "__main__":
    main()
