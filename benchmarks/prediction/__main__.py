"""Does the noise scale of one run tell the critical batch size that whole sweeps find?"""
# python -m benchmarks.prediction [--json PATH|-] [--figures FOLDER] [--quick]

from __future__ import annotations

import argparse
import math
import multiprocessing
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from benchmarks import harness
from benchmarks.prediction.chart import STAGES, chart
from benchmarks.prediction.figures import draw, is_placed, tasks_of
from benchmarks.prediction.problems import absent, atlas
from dptrain.explain.model.frontier import Verdict

SMALLEST_R2 = 0.84
LARGEST_RMS_DECADES = 0.5
_NUM_PROCESSES = 2
_FEWEST_RANKED = 4


def measure(quick: bool) -> harness.Findings:  # noqa: FBT001 - the harness's own signature
    """Chart every problem, two at a time."""
    problems = atlas(quick=quick)
    rows: list[dict[str, Any]] = []
    console = Console(stderr=True)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(_NUM_PROCESSES, context, torch.set_num_threads, (1,)) as pool:
        charted = [pool.submit(chart, problem) for problem in problems]
        for done in as_completed(charted):
            rows += done.result()
            console.print(f"{rows[-1]['task']}: {rows[-1]['seconds']:.0f} s, {len(rows) // 2} of {len(problems)}")
    late = {row["task"]: row["critical_batch_size"] or math.inf for row in rows if row["stage"] == "late"}
    rows.sort(key=lambda row: (late[row["task"]], row["task"], row["stage"]))
    rows = [row | _shown(row) for row in rows]
    figures = _figures(rows)
    note = _note(rows, figures, quick=quick)
    return harness.Findings(figures=figures, rows=rows, columns=_COLUMNS, note=note)


def _figures(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Take the late target of each task for the headline; the further figures say what it hangs on."""
    placed = [row for row in rows if is_placed(row)]
    late = [row for row in placed if row["stage"] == "late"]
    trained = [row for row in late if row["kind"] != "quadratic"]
    others = {"by_progress": _agreement(late, average="noise_scale_by_progress")}
    others["cold"] = _agreement([row for row in late if row["noise_scale_cold"]], average="noise_scale_cold")
    stages = [found for found in tasks_of(placed).values() if len(found) == len(STAGES)]
    return {
        "num_tasks": len(late),
        **_agreement(late),
        "largest_miss_decades": max(abs(_miss(row)) for row in late),
        # A correlation needs three.
        **{f"trained_{name}": value for name, value in (_agreement(trained) if len(trained) > 2 else {}).items()},
        **_rank_within([row for row in late if row["kind"] == "supervised"]),
        **{f"both_targets_{name}": value for name, value in _agreement(placed).items()},
        **{f"{way}_{name}": found[name] for way, found in others.items() for name in ("r2", "rms_decades")},
        "num_grown": sum(_grows(found) for found in stages),
        "num_not_hyperbola": sum(row["verdict"] == Verdict.NOT for row in late),
        "num_left_out": len({row["task"] for row in rows}) - len(late),
    }


def _agreement(rows: Sequence[dict[str, Any]], *, average: str = "noise_scale") -> dict[str, float]:
    """Return the span of B_crit, the squared correlation of the logarithms, and the rms of the ratio, in decades."""
    truth = np.log10([row["critical_batch_size"] for row in rows])
    predicted = np.log10([row[average] for row in rows])
    return {
        "decades": float(np.ptp(truth)),
        "r2": float(np.corrcoef(truth, predicted)[0, 1] ** 2),
        "rms_decades": math.sqrt(float(np.mean((predicted - truth) ** 2))),
    }


def _rank_within(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return Spearman's rank correlation within the supervised tasks, which says whether it tells two tasks apart."""
    if len(rows) < _FEWEST_RANKED:
        return {}
    from scipy.stats import spearmanr

    found = spearmanr([row["critical_batch_size"] for row in rows], [row["noise_scale"] for row in rows])
    return {"supervised_spearman": float(found.statistic)}


def _miss(row: dict[str, Any]) -> float:
    return math.log10(row["noise_scale"] / row["critical_batch_size"])


def _grows(stages: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether critical batch and noise scale are both larger for the late target than for the early one."""
    early, late = (stages[stage] for stage in STAGES)
    return all(late[name] > early[name] for name in ("critical_batch_size", "noise_scale"))


_COLUMNS = {
    "task": "{task}",
    "optimizer": "{optimizer}",
    "target": "{stage}: {target:.3g}",
    "critical batch": "{shown_critical}",
    "noise scale": "{shown_noise}",
    "miss, decades": "{shown_miss}",
    "at the largest batch": "{shown_cold}",
    "S_min": "{shown_steps}",
    "misfit": "{misfit:.1%}",
    "verdict": "{verdict}",
}


def _shown(row: dict[str, Any]) -> dict[str, str]:
    """Return the cells of a row whose numbers may be missing."""
    value, lower, upper = (row[name] for name in ("critical_batch_size", "lower", "upper"))
    interval = "" if lower is None else f" ({lower:.3g}–{'∞' if upper is None else f'{upper:.3g}'})"
    return {
        "shown_critical": f"{'?' if value is None else f'{value:.3g}'}{interval} {row['unit']}",
        "shown_noise": "not resolved" if row["noise_scale"] is None else f"{row['noise_scale']:.3g}",
        "shown_cold": "not resolved" if row["noise_scale_cold"] is None else f"{row['noise_scale_cold']:.3g}",
        "shown_miss": f"{_miss(row):+.2f}" if is_placed(row) else "",
        "shown_steps": "" if row["min_steps"] is None else f"{row['min_steps']:.3g}",
    }


def _note(rows: Sequence[dict[str, Any]], figures: dict[str, float], *, quick: bool) -> str:
    notes = [f"{name} left out: it is not installed" for name in absent()]
    edges = sorted({row["task"] for row in rows if not row["rates_inside"]})
    notes += [f"the best learning rate is at the edge of the grid in {', '.join(edges)}"] if edges else []
    if quick:
        return "; ".join(["a few small problems with few seeds: too few for the goals of the full form", *notes])
    reached = figures["r2"] >= SMALLEST_R2 and figures["rms_decades"] <= LARGEST_RMS_DECADES
    goal = f"goals r² ≥ {SMALLEST_R2:g} and rms ≤ {LARGEST_RMS_DECADES:g} decades {'reached' if reached else 'MISSED'}"
    return "; ".join([goal, *notes])


def main() -> None:
    """Read the command line, measure, tell, and draw."""
    parser = harness.command_line(question=__doc__, name="prediction")
    parser.add_argument("--figures", metavar="FOLDER", type=_folder, help="draw the two figures into it")
    options = parser.parse_args()
    findings = measure(options.quick)
    harness.tell(findings, options, question=__doc__, name="prediction", device="cpu")
    if options.figures:
        draw(findings.rows, options.figures, figures=findings.figures)


def _folder(text: str) -> Path:
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is not a folder that exists")
    return Path(text)


if __name__ == "__main__":
    main()
