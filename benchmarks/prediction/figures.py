"""The two figures of the atlas, drawn from its rows: prediction against truth, and the curves that the truth is of."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.prediction.chart import STAGES
from dptrain.explain.figures.figure import log_axis, number
from dptrain.explain.figures.theme import BLUE, GREEN, GREY, INK, STYLE, VERMILLION

Row = Mapping[str, Any]

TYPICAL_FACTOR = 6
"""By which the published noise scales are off from their critical batches (formulas: 0.79 decades)."""
_KINDS = {"supervised": (BLUE, "o"), "policy": (VERMILLION, "s"), "quadratic": (GREEN, "^")}
_HEIGHT_POINTS, _LINE_POINTS = 430.0, 9.0
"""Of the first figure's axes, and of a line of small print."""
_DOTS_PER_INCH = 150


def draw(rows: Sequence[Row], folder: Path, *, figures: Mapping[str, float]) -> None:
    """Write prediction.png and prediction_frontiers.png into a folder.

    Args:
        rows: of `chart`, the two of a task in a row.
        folder: that exists.
        figures: of the benchmark, for the title.
    """
    from matplotlib import rc_context

    with rc_context(STYLE):
        _prediction(rows, figures=figures).savefig(folder / "prediction.png", dpi=_DOTS_PER_INCH)
        _frontiers(rows).savefig(folder / "prediction_frontiers.png", dpi=_DOTS_PER_INCH)


def tasks_of(rows: Sequence[Row]) -> dict[str, dict[str, Row]]:
    """Return task → stage → row."""
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        found.setdefault(row["task"], {})[row["stage"]] = row
    return found


def is_placed(row: Row) -> bool:
    """Whether a row has both numbers: else it is a point on no figure."""
    return row["critical_batch_size"] is not None and row["noise_scale"] is not None


def _prediction(rows: Sequence[Row], *, figures: Mapping[str, float]) -> Any:  # noqa: ANN401 - matplotlib is slow to import
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 7), layout="constrained")
    axes = figure.add_subplot()
    placed = [row for row in rows if is_placed(row)]
    values = [row[name] for row in placed for name in ("critical_batch_size", "noise_scale")]
    low, high = min(values) / 3, max(values) * 3
    line = np.array([low, high])
    axes.plot(line, line, color=INK, linewidth=1, label="prediction = truth")
    axes.fill_between(
        line,
        line / TYPICAL_FACTOR,
        line * TYPICAL_FACTOR,
        color=GREY,
        alpha=0.15,
        linewidth=0,
        label=f"within a factor of {TYPICAL_FACTOR}, as published",
    )
    tasks = [list(stages.values()) for stages in tasks_of(placed).values()]
    for stages in tasks:
        _draw_task(axes, stages)
    _name_tasks(axes, [stages[-1] for stages in tasks], points_per_decade=_HEIGHT_POINTS / math.log10(high / low))
    for kind, (colour, marker) in _KINDS.items():
        axes.plot([], [], color=colour, marker=marker, markersize=6, label=kind)
    axes.plot([], [], " ", label="open: early target, full: late target")
    axes.set(xscale="log", yscale="log", xlim=line, ylim=line)
    _number_decades(axes.xaxis)
    _number_decades(axes.yaxis)
    axes.set_xlabel("critical batch size fitted to whole runs (samples, sequences or frames)")
    axes.set_ylabel("simple noise scale averaged over a run (the same unit)")
    axes.set_title(
        f"The noise scale of a run tells the critical batch to a factor of {10 ** figures['rms_decades']:.1f}\n"
        f"over {figures['decades']:.1f} decades and {figures['num_tasks']:.0f} tasks, r² = {figures['r2']:.2f}"
    )
    axes.legend(loc="lower right")
    return figure


def _draw_task(axes: Any, stages: Sequence[Row]) -> None:  # noqa: ANN401 - as above
    colour, marker = _KINDS[stages[0]["kind"]]
    across = [row["critical_batch_size"] for row in stages]
    up = [row["noise_scale"] for row in stages]
    axes.plot(across, up, color=colour, linewidth=1)
    for row, x, y in zip(stages, across, up, strict=True):
        lower, upper = row["lower"], row["upper"]
        axes.plot([lower or x, upper or x], [y, y], color=colour, linewidth=0.8, alpha=0.6)
        face = colour if row["stage"] == STAGES[-1] else "white"
        axes.plot(x, y, marker=marker, color=colour, markerfacecolor=face, markersize=6)


def _name_tasks(axes: Any, rows: Sequence[Row], *, points_per_decade: float) -> None:  # noqa: ANN401 - as above
    """Write each name beside its point, away from the line where the other tasks are, and none upon another."""
    highest = {-1: -math.inf, 1: -math.inf}
    for row in sorted(rows, key=lambda row: row["noise_scale"]):
        side = -1 if row["noise_scale"] > row["critical_batch_size"] else 1
        here = math.log10(row["noise_scale"]) * points_per_decade
        highest[side] = max(here - 4 * side, highest[side] + _LINE_POINTS)
        axes.annotate(
            row["task"],
            (row["critical_batch_size"], row["noise_scale"]),
            xytext=(7 * side, highest[side] - here),
            textcoords="offset points",
            ha="left" if side > 0 else "right",
            va="center",
            fontsize=7.5,
        )


def _frontiers(rows: Sequence[Row]) -> Any:  # noqa: ANN401 - as above
    from matplotlib.figure import Figure

    tasks = tasks_of(rows)
    num_columns = 3
    num_rows = -(-len(tasks) // num_columns)
    figure = Figure(figsize=(10, 2.6 * num_rows + 0.9), layout="constrained")
    grid = figure.subplots(num_rows, num_columns, squeeze=False)
    for axes, (task, stages) in zip(grid.flat, tasks.items(), strict=False):
        for row, colour in zip(stages.values(), (BLUE, VERMILLION), strict=True):
            _draw_curve(axes, row, colour=colour)
        axes.set_title(task, fontsize=9.5)
        _widen(axes, stages.values())
        axes.set_xscale("log")
        _number_decades(axes.xaxis)
        log_axis(axes, "y")
        axes.set_xlabel(f"batch ({stages[STAGES[-1]]['unit']})")
        axes.set_ylabel("steps to target")
    for axes in list(grid.flat)[len(tasks) :]:
        axes.set_axis_off()
    figure.suptitle(
        "A larger batch saves steps up to a bend, near which the fitted critical batch lies (dotted)\n"
        "blue: early target, red: late target; points: runs at the best learning rate of their batch",
        fontsize=11,
    )
    return figure


def _number_decades(axis: Any) -> None:  # noqa: ANN401 - as above
    """Write plain numbers at the powers of ten alone: batches span many of them."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set_major_locator(LogLocator(numticks=12))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(number)


def _widen(axes: Any, stages: Iterable[Row]) -> None:  # noqa: ANN401 - as above
    """Leave room round all points; an axis that is to be logarithmic is not to widen itself."""
    points = [point for row in stages for point in row["frontier"]]
    batches = [point["batch_size"] for point in points]
    steps = [value for point in points for value in point["steps"]]
    axes.set(xlim=(min(batches) / 1.5, max(batches) * 1.5), ylim=(min(steps) / 1.5, max(steps) * 1.5))


def _draw_curve(axes: Any, row: Row, *, colour: str) -> None:  # noqa: ANN401 - as above
    for point in row["frontier"]:
        axes.plot([point["batch_size"]] * len(point["steps"]), point["steps"], ".", color=colour, markersize=4)
    critical, min_steps = row["critical_batch_size"], row["min_steps"]
    if critical is None or min_steps is None:
        return
    ends = [row["frontier"][index]["batch_size"] for index in (0, -1)]
    batches = np.geomspace(ends[0], ends[1], 100)
    axes.plot(batches, min_steps * (1 + critical / batches), color=colour, linewidth=1)
    axes.axvline(critical, color=colour, linestyle=":", linewidth=1)
