"""Is the noise scale that is printed the one at present, and does its interval hold it?"""
# python -m benchmarks.tracking [--json PATH|-] [--parts courses,trainings,cost] [--earlier JSON] [--quick]

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from benchmarks import harness
from benchmarks.tracking.drift_candidates import CANDIDATES, window_intervals, window_lengths
from benchmarks.tracking.drift_courses import COURSES, JUMP, Runs, Setting, simulated
from benchmarks.tracking.exact_present import compared, trainings
from benchmarks.tracking.filter_cost import cost_rows
from dptrain.noise import NoiseScale, noise_scale, present_moments

SMALLEST_COVERAGE, LARGEST_COVERAGE = 0.92, 0.98
LARGEST_WIDTH_RATIO = 1.5
FEWEST_INSIDE = 17

_SETTINGS = (
    Setting(num_steps=700, num_small=3, directions=150, ratio=0.4),
    Setting(num_steps=1500, num_small=8, directions=60, ratio=0.125),
)
"""Unlike those that the filters were chosen on, in length, K, directions and ratio."""

_AFTER_JUMP = (0.95, 0.975, 1.0)
_QUICK_SETTING = Setting(num_steps=300, num_small=2, directions=100, ratio=0.5)
_FIRST_SEED = 300

PARTS: Mapping[str, str] = {"courses": "course", "trainings": "training", "cost": "cost"}
"""Part → kind of its rows. Each is independent of the others."""


@dataclass(frozen=True, kw_only=True)
class Form:
    """How much is measured.

    Attributes:
        settings: of the simulated runs.
        num_runs: simulated on each course, by setting.
        num_compared: of them that the other candidates read.
        num_steps: of a real training.
        num_points: at which a real training is compared.
        num_trainings: of them.
        num_timed: simulated runs on each course whose steps are timed.
    """

    settings: tuple[Setting, ...]
    num_runs: tuple[int, ...]
    num_compared: int
    num_steps: int
    num_points: int
    num_trainings: int
    num_timed: int


FULL = Form(
    settings=_SETTINGS,
    num_runs=(300, 150),
    num_compared=40,
    num_steps=1200,
    num_points=5,
    num_trainings=4,
    num_timed=10,
)
QUICK = Form(
    settings=(_QUICK_SETTING,),
    num_runs=(25,),
    num_compared=5,
    num_steps=60,
    num_points=1,
    num_trainings=1,
    num_timed=2,
)


def measure(
    quick: bool,  # noqa: FBT001 - the harness's own signature
    *,
    parts: Sequence[str] = tuple(PARTS),
    earlier: Sequence[Mapping[str, Any]] = (),
) -> harness.Findings:
    """Measure every course and training, and the cost.

    Args:
        quick: few and short runs.
        parts: of `PARTS`, what to measure.
        earlier: rows of an earlier result, of which those of the other parts are taken over.
    """
    form = QUICK if quick else FULL
    console = Console(stderr=True)
    measured: dict[str, list[dict[str, Any]]] = {
        part: [_shown(dict(row)) for row in earlier if row["kind"] == kind and part not in parts]
        for part, kind in PARTS.items()
    }
    if "courses" in parts:
        measured["courses"] = _rows_of_courses(form, console)
    if "trainings" in parts:
        measured["trainings"] = _rows_of_trainings(form, console)
    if "cost" in parts:
        with console.status("cost"):
            found = cost_rows(form.settings[0], num_rounds=form.num_timed, seed=_FIRST_SEED)
            measured["cost"] = [_shown(row) for row in found]
    rows = [row for part in PARTS for row in measured[part]]
    figures = _figures(rows)
    return harness.Findings(
        figures=figures, rows=rows, columns=_COLUMNS, note=_note(figures, quick=quick) if measured["courses"] else ""
    )


def _rows_of_courses(form: Form, console: Console) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for number, (setting, num_runs) in enumerate(zip(form.settings, form.num_runs, strict=True)):
        for course in COURSES:
            with console.status(f"{course}: {setting}"):
                runs = simulated(course, setting, num_runs=num_runs, seed=_FIRST_SEED + number)
                rows += _course_rows(runs, course=course, form=form)
    return rows


def _rows_of_trainings(form: Form, console: Console) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for training in trainings(seed=_FIRST_SEED, num_steps=form.num_steps)[-form.num_trainings :]:
        with console.status(training.name):
            rows += [_exact_row(point, name=training.name) for point in compared(training, num_points=form.num_points)]
    return rows


def _course_rows(runs: Runs, *, course: str, form: Form) -> list[dict[str, Any]]:
    setting = runs.setting
    points = [round(share * setting.num_steps) for share in (_AFTER_JUMP if course == JUMP else (1.0,))]
    states = [runs.states(run, at=set(points)) for run in range(runs.trace.shape[1])]
    rows = []
    for point in points:
        truth = runs.truth(point)
        scales = [noise_scale(present_moments(state[point])) for state in states]
        best_length, best_width = _best_window(runs, point, truth=truth)
        rows.append(
            _row(scales, truth=truth, course=course, setting=setting, step=point)
            | {"candidate": "dptrain", "best_window": best_length, "width_ratio": _width(scales, truth) / best_width}
        )
        for name, candidate in CANDIDATES.items():
            if name != "dptrain":
                read = [candidate(runs, run, point) for run in range(form.num_compared)]
                row = _row(read, truth=truth, course=course, setting=setting, step=point)
                rows.append(row | {"candidate": name, "width_ratio": _width(read, truth) / best_width})
    return [_shown(row) for row in rows]


def _row(scales: list[NoiseScale], *, truth: float, course: str, setting: Setting, step: int) -> dict[str, Any]:
    return {
        "kind": "course",
        "course": course,
        "setting": str(setting),
        "step": step,
        "truth": truth,
        "num_runs": len(scales),
        "coverage": statistics.fmean(scale.lower <= truth <= scale.upper for scale in scales),
        "median": statistics.median(scale.noise_trace / max(scale.grad_sq_norm, 1e-300) for scale in scales),
    }


def _width(scales: list[NoiseScale], truth: float) -> float:
    """Return the median width of the intervals, in units of the truth; open ones are wider than any."""
    return statistics.median(scale.upper - scale.lower for scale in scales) / truth


def _best_window(runs: Runs, step: int, *, truth: float) -> tuple[int, float]:
    """Return length and width of the plain window that was best in hindsight.

    It is the narrowest of those whose intervals held the truth often enough; nobody knows it beforehand.
    """
    tried = []
    for length in window_lengths(step):
        lower, upper = window_intervals(runs, step, length)
        coverage = float(((lower <= truth) & (truth <= upper)).mean())
        tried.append((coverage >= SMALLEST_COVERAGE, float(np.median(upper - lower)) / truth, length, coverage))
    held = [entry for entry in tried if entry[0]] or [max(tried, key=lambda entry: entry[3])]
    _, width, length, _ = min(held, key=lambda entry: entry[1])
    return length, width


def _exact_row(point: Any, *, name: str) -> dict[str, Any]:  # noqa: ANN401 - a Point
    scale = point.printed
    return _shown(
        {
            "kind": "training",
            "course": name,
            "step": point.step,
            "truth": point.exact,
            "truth_of_five": point.exact_of_five,
            "candidate": "dptrain",
            "median": scale.noise_trace / max(scale.grad_sq_norm, 1e-300),
            "lower": scale.lower,
            "upper": scale.upper if math.isfinite(scale.upper) else -1.0,
            "window_mean": point.window or -1.0,
            "inside": float(scale.lower <= point.exact <= scale.upper),
            "inside_of_five": float(scale.lower <= point.exact_of_five <= scale.upper),
        }
    )


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    ratio = row.get("width_ratio")
    if ratio is not None and not math.isfinite(ratio):
        row["width_ratio"] = ratio = -1.0
    is_cost = row["kind"] == "cost"
    held = f"{row['coverage']:.1%}" if "coverage" in row else ("yes" if row.get("inside") else "" if is_cost else "no")
    return row | {
        "shown_truth": "" if is_cost else f"{row['truth']:.4g}",
        "shown_candidate": "" if is_cost else row["candidate"],
        "shown_median": "" if is_cost else f"{row['median']:.4g}",
        "shown_cost": f"{1e6 * row['step_s']:.0f} µs, {row['record_bytes']:,} bytes" if is_cost else "",
        "shown_held": held,
        "shown_ratio": "" if ratio is None else ("open" if ratio < 0 else f"{ratio:.2f}"),
        "shown_setting": row.get("setting", ""),
    }


def _figures(rows: list[dict[str, Any]]) -> dict[str, float]:
    own = [row for row in rows if row["kind"] == "course" and row["candidate"] == "dptrain"]
    real = [row for row in rows if row["kind"] == "training"]
    cost = [row for row in rows if row["kind"] == "cost"]
    figures: dict[str, float] = {}
    if own:
        held = _pooled(own)
        ratios = [row["width_ratio"] for row in own if row["width_ratio"] > 0]
        figures |= {
            "coverage_now_min": min(held.values()),
            "coverage_now_max": max(held.values()),
            "width_ratio": max(ratios, default=-1.0),
        }
    if real:
        figures |= {
            "exact_inside": sum(row["inside"] for row in real),
            "exact_inside_of_five": sum(row["inside_of_five"] for row in real),
            "exact_total": len(real),
        }
    if cost:
        figures |= {
            "present_step_s": statistics.median(row["step_s"] for row in cost),
            "window_step_s": statistics.median(row["window_step_s"] for row in cost),
            "present_to_window": statistics.median(row["step_s"] / row["window_step_s"] for row in cost),
            "present_read_s": statistics.median(row["read_s"] for row in cost),
            "record_bytes": max(row["record_bytes"] for row in cost),
        }
    return figures


def _pooled(rows: list[dict[str, Any]]) -> Mapping[str, float]:
    """Return the coverage of each course, over all settings and moments."""
    by_course: dict[str, list[tuple[float, int]]] = {}
    for row in rows:
        by_course.setdefault(row["course"], []).append((row["coverage"], row["num_runs"]))
    return {
        course: sum(coverage * count for coverage, count in found) / sum(count for _, count in found)
        for course, found in by_course.items()
    }


_COLUMNS = {
    "course or training": "{course}",
    "setting": "{shown_setting}",
    "step": "{step}",
    "true φ": "{shown_truth}",
    "estimate": "{shown_candidate}",
    "φ (median)": "{shown_median}",
    "held": "{shown_held}",
    "width to best window": "{shown_ratio}",
    "cost of a step, record": "{shown_cost}",
}


def _note(figures: Mapping[str, float], *, quick: bool) -> str:
    if quick:
        return "few and short runs: too few for the bounds that the full form is held to"
    held = (
        figures["coverage_now_min"] >= SMALLEST_COVERAGE
        and figures["coverage_now_max"] <= LARGEST_COVERAGE
        and 0 < figures["width_ratio"] <= LARGEST_WIDTH_RATIO
        and figures.get("exact_inside", 0) >= FEWEST_INSIDE
    )
    return (
        f"bounds {'held' if held else 'BROKEN'}: coverage of φ now {SMALLEST_COVERAGE:.0%}–{LARGEST_COVERAGE:.0%} on "
        f"each course, {LARGEST_WIDTH_RATIO} times the width of the best window in hindsight, {FEWEST_INSIDE} of 20 "
        "exact values inside"
    )


def main() -> None:
    """Measure what the command line asks for."""
    parser = harness.command_line(question=__doc__, name="tracking")
    parser.add_argument("--parts", metavar="NAME,…", default=",".join(PARTS), help="what to measure; all by default")
    parser.add_argument(
        "--earlier", metavar="JSON", type=Path, help="earlier result that the other parts are taken from"
    )
    options = parser.parse_args()
    parts = tuple(part.strip() for part in options.parts.split(","))
    if unknown := set(parts) - set(PARTS):
        parser.error(f"there is no part {', '.join(sorted(unknown))}; parts are {', '.join(PARTS)}")
    earlier: list[Mapping[str, Any]] = []
    if options.earlier is not None:
        earlier = json.loads(options.earlier.read_text(encoding="utf-8"))["rows"]
    findings = measure(options.quick, parts=parts, earlier=earlier)
    name = "tracking" if set(parts) == set(PARTS) else f"tracking --parts {','.join(parts)}"
    name += f" --earlier {options.earlier}" if options.earlier is not None else ""
    harness.tell(findings, options, question=__doc__, name=name, device="CPU")


if __name__ == "__main__":
    main()
