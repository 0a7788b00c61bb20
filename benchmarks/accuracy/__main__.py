"""Does the meter recover known answers?"""
# python -m benchmarks.accuracy [--json PATH|-] [--quick]

from __future__ import annotations

from typing import Any

from rich.console import Console

from benchmarks import harness
from benchmarks.accuracy.beside_peers import measure_peers
from benchmarks.accuracy.cases import LAYOUTS, measure_cases
from benchmarks.accuracy.repetitions import FULL, QUICK, Form
from benchmarks.accuracy.wrappers import DDP, wrappers
from benchmarks.replicas import run_replicas

LARGEST_RELATIVE_ERROR = 0.02
SMALLEST_COVERAGE, LARGEST_COVERAGE = 0.92, 0.98
LARGEST_SUM_ERROR = 1e-6


def measure(quick: bool) -> harness.Findings:  # noqa: FBT001 - the harness's own signature
    """Measure every case, one launch of processes per number of replicas."""
    form = QUICK if quick else FULL
    rows: list[dict[str, Any]] = []
    console = Console(stderr=True)
    known = wrappers(compiler=form.compiler)
    for world_size in sorted({layout.world_size for layout in LAYOUTS} | {wrapper.world_size for wrapper in known}):
        with console.status(f"replicas: {world_size}; {form.num_repetitions} repetitions of each case"):
            rows += run_replicas(measure_cases, world_size=world_size, args=(form,))
    # One process and DDP together, by problem; then the other wrappers one by one.
    names, problems = [wrapper.name for wrapper in known], list(dict.fromkeys(row["problem"] for row in rows))
    first = names.index(DDP.name)
    rows.sort(key=lambda row: (max(names.index(row["wrapper"]), first), problems.index(row["problem"])))
    with console.status("the peers"):
        rows += run_replicas(measure_peers, world_size=2, args=(form,))
    figures = _figures([row for row in rows if row["judged"]])
    return harness.Findings(figures=figures, rows=rows, columns=_COLUMNS, note=_note(figures, form=form))


def _figures(rows: list[dict[str, Any]]) -> dict[str, float]:
    return {
        "max_relative_error": max(max(row["trace_error"], row["grad_error"]) for row in rows),
        "min_coverage": min(row["coverage"] for row in rows),
        "max_coverage": max(row["coverage"] for row in rows),
        "groups_sum_error": max(row["groups_sum_error"] for row in rows),
        "ungrouped_difference": max(row["ungrouped_difference"] for row in rows),
        "num_cases": len(rows),
        "num_wrappers": len({row["wrapper"] for row in rows}),
    }


_COLUMNS = {
    "problem": "{problem}",
    "wrapper": "{wrapper}",
    "layout": "{layout}",
    "observer": "{observer}",
    "true tr(Σ), |G|²": "{true_trace:.4g}, {true_grad:.4g}",
    "mean": "{mean_trace:.4g}, {mean_grad:.4g}",
    "relative error": "{trace_error:.2%}, {grad_error:.2%}",
    "by chance": "{shown_chance}",
    "true φ": "{true_scale:.4g}",
    "φ": "{scale:.4g}",
    "coverage": "{shown_coverage}",
}


def _note(figures: dict[str, float], *, form: Form) -> str:
    if form is QUICK:
        return f"{form.num_repetitions} short repetitions: too few for the bounds that the full form is held to"
    held = (
        figures["max_relative_error"] <= LARGEST_RELATIVE_ERROR
        and figures["min_coverage"] >= SMALLEST_COVERAGE
        and figures["max_coverage"] <= LARGEST_COVERAGE
        and figures["groups_sum_error"] <= LARGEST_SUM_ERROR
    )
    return (
        f"{form.num_repetitions} repetitions; bounds {'held' if held else 'BROKEN'}: errors up to "
        f"{LARGEST_RELATIVE_ERROR:.0%}, coverage {SMALLEST_COVERAGE:.0%}–{LARGEST_COVERAGE:.0%}, groups that add up to "
        f"{LARGEST_SUM_ERROR:g}; rows without an interval are not judged"
    )


if __name__ == "__main__":
    harness.run(measure, question=__doc__, name="accuracy")
