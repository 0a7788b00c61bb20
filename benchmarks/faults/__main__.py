"""Does a run end the same, whatever happens to it on the way?"""
# python -m benchmarks.faults [--kills N] [--seed S] [--hours H] [--json PATH|-] [--quick]

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks import harness
from benchmarks.faults.chaos import Chaos, Story, random_kills, resizes
from benchmarks.faults.guards import guard_share, stall_share
from benchmarks.faults.storage_faults import flip_bits, kill_writers

WORLD_SIZES = (2, 3, 1)
"""Replicas that a run goes on with, having begun with one."""
LONGEST_RECOVERY_S = 9.0
LARGEST_SHARE = 0.01
_COLUMNS = {"part": "{part}", "what was done": "{done}", "what came of it": "{found}", "seconds": "{seconds:.0f}"}


def measure(*, num_kills: int, seed: int, hours: float, quick: bool) -> harness.Findings:
    """Put runs and checkpoints under fire; with `hours`, again and again with other seeds until they are over."""
    rows: list[dict[str, Any]] = []
    console, began_s = Console(stderr=True), time.monotonic()
    figures: dict[str, float] = {}
    while True:
        with console.status(f"seed {seed}: {num_kills} kills, then {len(WORLD_SIZES)} resizes"):
            found = _one_pass(rows, num_kills=num_kills, seed=seed, quick=quick)
        figures = _worst(figures, found)
        seed += 1
        if time.monotonic() - began_s >= 3600 * hours:
            break
    figures["stall_share"] = stall_share(quick=quick)
    figures["guard_share"] = guard_share(quick=quick)
    return harness.Findings(figures=figures, rows=rows, columns=_COLUMNS, note=_note(figures))


def _one_pass(rows: list[dict[str, Any]], *, num_kills: int, seed: int, quick: bool) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        figures = _kill_a_run(rows, Path(folder), num_kills=num_kills, seed=seed)
        figures |= _resize_a_run(rows, Path(folder), seed=seed, world_sizes=WORLD_SIZES[:1] if quick else WORLD_SIZES)
        figures |= _damage_checkpoints(rows, Path(folder), seed=seed, quick=quick)
    return figures


def _kill_a_run(rows: list[dict[str, Any]], folder: Path, *, num_kills: int, seed: int) -> dict[str, float]:
    began_s = time.monotonic()
    undisturbed = Chaos(folder / "undisturbed", num_events=num_kills)
    undisturbed.survive([])
    run = Chaos(folder / "killed", num_events=num_kills)
    story = run.survive(random_kills(num_kills, seed=seed))
    lost, doubled = run.samples_lost_and_doubled()
    equal = run.fingerprint() == undisturbed.fingerprint()
    recoveries = sorted(story.recoveries_s)
    rows.append(
        _row(
            f"kills, seed {seed}",
            f"{story.kills} times one or both of 2 replicas killed, {run.max_samples:,} samples",
            f"{story.restarts} restarts, {lost} samples lost, {doubled} doubled, end "
            f"{'equal' if equal else 'NOT EQUAL'} to the undisturbed run's; recovery {_spread(recoveries)}",
            began_s=began_s,
        )
    )
    return {
        "kills": story.kills,
        "restarts": story.restarts,
        "samples_lost": lost,
        "samples_doubled": doubled,
        "sha_equal": float(equal),
        "recovery_p50_s": statistics.median(recoveries),
        "recovery_p95_s": _percentile(recoveries, 0.95),
    }


def _resize_a_run(
    rows: list[dict[str, Any]], folder: Path, *, seed: int, world_sizes: tuple[int, ...]
) -> dict[str, float]:
    began_s = time.monotonic()
    undisturbed = Chaos(folder / "whole", num_events=len(world_sizes))
    undisturbed.survive([])
    run = Chaos(folder / "resized", num_events=len(world_sizes), first_world_size=1)
    story: Story = run.survive(resizes(world_sizes, seed=seed))
    lost, doubled = run.samples_lost_and_doubled()
    same = run.windows() == undisturbed.windows()
    rows.append(
        _row(
            f"resizes, seed {seed}",
            f"1 → {' → '.join(map(str, world_sizes))} replicas by SIGTERM and SIGKILL of the launcher, "
            f"{story.passed_over} times the newest checkpoint damaged",
            f"{lost} samples lost, {doubled} doubled, batches {'those' if same else 'NOT those'} of the undisturbed "
            f"run; stopped within {max(story.stops_s):.2g} s",
            began_s=began_s,
        )
    )
    return {
        "resize_samples_lost": lost,
        "resize_samples_doubled": doubled,
        "resize_batches_equal": float(same),
        "stop_s": max(story.stops_s),
    }


def _damage_checkpoints(rows: list[dict[str, Any]], folder: Path, *, seed: int, quick: bool) -> dict[str, float]:
    num_kills, num_flips, began_s = 8 if quick else 200, 500 if quick else 10_000, time.monotonic()
    lost = kill_writers(folder / "writers", num_kills=num_kills, seed=seed)
    detected = flip_bits(folder / "flips", num_flips=num_flips, seed=seed)
    rows.append(
        _row(
            f"checkpoints, seed {seed}",
            f"{num_kills} writers killed, {num_flips:,} bits flipped one at a time",
            f"{lost} acknowledged checkpoints lost, {detected:,} flips detected",
            began_s=began_s,
        )
    )
    return {
        "writer_kills": num_kills,
        "checkpoints_lost": lost,
        "flips": num_flips,
        "flips_detected": detected,
    }


_ADDED = {"kills", "restarts", "writer_kills", "flips", "flips_detected"}
_LEAST = {"sha_equal", "resize_batches_equal"}


def _worst(before: dict[str, float], found: dict[str, float]) -> dict[str, float]:
    """Join the figures of two passes: counts add up, of the rest the worse one stays."""
    if not before:
        return found
    return {
        name: before[name] + value if name in _ADDED else (min if name in _LEAST else max)(before[name], value)
        for name, value in found.items()
    }


def _note(figures: dict[str, float]) -> str:
    nothing_lost = not any(value for name, value in figures.items() if name.endswith(("_lost", "_doubled")))
    held = (
        nothing_lost
        and figures["sha_equal"] == figures["resize_batches_equal"] == 1
        and figures["restarts"] == figures["kills"]
        and figures["flips_detected"] == figures["flips"]
        and figures["recovery_p95_s"] <= LONGEST_RECOVERY_S
        and max(figures["stall_share"], figures["guard_share"]) <= LARGEST_SHARE
    )
    return (
        f"bounds {'held' if held else 'BROKEN'}: nothing lost or doubled, the same end, one restart per kill, p95 of "
        f"recovery up to {LONGEST_RECOVERY_S:g} s, shares up to {LARGEST_SHARE:.0%}"
    )


def _row(part: str, done: str, found: str, *, began_s: float) -> dict[str, Any]:
    return {"part": part, "done": done, "found": found, "seconds": time.monotonic() - began_s}


def _spread(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):.2g} s (p95 {_percentile(seconds, 0.95):.2g} s)" if seconds else "none"


def _percentile(ordered: list[float], share: float) -> float:
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


def main() -> None:
    """Read the command line, measure, and tell."""
    parser = harness.command_line(question=__doc__, name="faults")
    parser.add_argument("--kills", type=_count, default=None, help="of replicas, in one run (100; 10 with --quick)")
    parser.add_argument("--seed", type=int, default=0, help="decides what happens when (0)")
    parser.add_argument("--hours", type=float, default=0.0, help="go on with further seeds until they are over (0)")
    options = parser.parse_args()
    findings = measure(
        num_kills=options.kills or (10 if options.quick else 100),
        seed=options.seed,
        hours=options.hours,
        quick=options.quick,
    )
    harness.tell(findings, options, question=__doc__, name="faults", device="cpu")


def _count(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return int(text)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
