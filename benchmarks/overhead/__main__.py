"""What does measuring add to the time of a training step?"""
# python -m benchmarks.overhead [--json PATH|-] [--quick]

from __future__ import annotations

import math
import tempfile
from typing import Any

import torch
from rich.console import Console

from benchmarks import harness
from benchmarks.overhead.cases import CASES, QUICK_CASES, has_replicas_on_cuda, measure_case
from benchmarks.overhead.variants import (
    AGAIN,
    DEFAULT,
    EVERY_STEP,
    EVERY_STEP_HOOK,
    PEER,
    Limits,
)
from benchmarks.replicas import run_replicas

LARGEST_DEFAULT_RATIO = 1.01
LARGEST_EVERY_STEP_RATIO = 1.03

_JUDGED = "12M heavy"
"""Where `every=1` and the peers are compared."""

FULL = Limits(seconds=40, error=0.0025, longest_s=100)
WHERE_JUDGED = Limits(seconds=240, error=0.0025, longest_s=400, others_every=2)
QUICK = Limits(seconds=1, fewest_rounds=2, longest_warm_up=16)


def measure(quick: bool) -> harness.Findings:  # noqa: FBT001 - the harness's own signature
    """Measure every case, one launch of processes each."""
    cases = QUICK_CASES if quick else CASES
    rows: list[dict[str, Any]] = []
    console = Console(stderr=True)
    for case in cases:
        limits = QUICK if quick else WHERE_JUDGED if case.name == _JUDGED else FULL
        with console.status(case.name), tempfile.TemporaryDirectory() as folder:
            rows += run_replicas(measure_case, world_size=case.world_size, args=(case, limits, folder))
    return findings(rows, quick=quick)


def _device() -> str:
    return f"CUDA, {torch.cuda.get_device_name()}" if has_replicas_on_cuda() else "CPU"


def findings(rows: list[dict[str, Any]], *, quick: bool) -> harness.Findings:
    """Read the answer from the rows."""
    figures = _figures(rows)
    return harness.Findings(figures=figures, rows=rows, columns=_COLUMNS, note=_note(figures, quick=quick))


_COLUMNS = {
    "model": "{case}",
    "variant": "{variant}",
    "time to bare (quartiles)": "{shown}",
    "CPU time to bare": "{shown_cpu}",
    "bare to bare": "{shown_floor}",
    "bare step": "{shown_step}",
    "every": "{every:g}",
    "rounds": "{num_rounds:g}",
}


def _figures(rows: list[dict[str, Any]]) -> dict[str, float]:
    present = [row for row in rows if "absent" not in row]
    floors = [row["ratio"] for row in present if row["variant"] == AGAIN]
    # The quick form has no model of that size.
    where = _JUDGED if any(row["case"] == _JUDGED for row in present) else present[0]["case"]
    judged = {row["variant"]: row["ratio"] for row in present if row["case"] == where}
    peers = {variant.removeprefix(PEER): ratio for variant, ratio in judged.items() if variant.startswith(PEER)}
    worst = max((row for row in present if row["variant"] == DEFAULT), key=lambda row: float(row["ratio"]))
    errors = {row["variant"]: row["ratio_error"] for row in present if row["case"] == where}
    figures = {
        "default_ratio_max": worst["ratio"],
        "default_ratio_error": worst["ratio_error"],
        # The floor that is furthest from 1, on either side.
        "floor_ratio": max(floors, key=lambda ratio: abs(math.log(ratio))),
        "every_step_ratio": judged[EVERY_STEP],
        "every_step_error": errors[EVERY_STEP],
        "every_step_hook_ratio": judged[EVERY_STEP_HOOK],
    }
    if peers:
        figures["best_peer_ratio"] = min(peers.values())
    return figures | {f"peer_{name}_ratio": ratio for name, ratio in peers.items()}


def _note(figures: dict[str, float], *, quick: bool) -> str:
    if quick:
        return "a few rounds: too few for the bounds that the full form is held to"
    best_peer = figures.get("best_peer_ratio", math.inf)
    verdicts = {
        f"default up to {LARGEST_DEFAULT_RATIO}": _verdict(
            figures["default_ratio_max"], LARGEST_DEFAULT_RATIO, error=figures["default_ratio_error"]
        ),
        f"every=1 up to {LARGEST_EVERY_STEP_RATIO} at {_JUDGED}": _verdict(
            figures["every_step_ratio"], LARGEST_EVERY_STEP_RATIO, error=figures["every_step_error"]
        ),
        "every=1 below every peer there": _verdict(
            figures["every_step_ratio"], best_peer, error=figures["every_step_error"]
        ),
    }
    return "; ".join(f"{bound}: {verdict}" for bound, verdict in verdicts.items()) + "; read each beside bare to bare"


def _verdict(ratio: float, bound: float, *, error: float) -> str:
    """Say whether a bound holds, as far as chance lets one tell."""
    if ratio <= bound:
        return "held"
    return "not distinguishable from it" if ratio - 2 * error <= bound else "BROKEN"


if __name__ == "__main__":
    harness.run(measure, question=__doc__, name="overhead", device=_device())
