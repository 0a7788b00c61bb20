"""The picture of a comparison: where each variant reached the target, on a graph of samples against steps."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.targets.results import ADAPTDL, ADAPTIVE, FROM_LARGE, FROM_SMALL, RAMP, SMITH, Outcome, fixed_name
from dptrain.explain.model.frontier import Frontier

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MARKS = {
    ADAPTIVE: ("*", "#d55e00"),
    FROM_SMALL: ("^", "#d55e00"),
    FROM_LARGE: ("v", "#d55e00"),
    ADAPTDL: ("P", "#0072b2"),
    SMITH: ("D", "#009e73"),
    RAMP: ("s", "#009e73"),
}


def draw_outcome(outcome: Outcome, *, title: str, path: Path) -> None:
    """Draw medians with their range over seeds, the fixed batches along their fitted frontier."""
    fixed = {str(batch): _points(outcome, fixed_name(batch)) for batch in outcome.searches}
    others = {name: _points(outcome, name) for name in _MARKS}
    _draw(fixed, others, frontier=outcome.frontier(), title=title, path=path)


def _points(outcome: Outcome, variant: str) -> list[tuple[float, float]]:
    return [(end.steps, end.samples) for end in outcome.ends(variant).values()]


def _draw(
    fixed: Mapping[str, list[tuple[float, float]]],
    others: Mapping[str, list[tuple[float, float]]],
    *,
    frontier: Frontier | None,
    title: str,
    path: Path,
) -> None:
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = Figure(figsize=(8, 6), layout="constrained")
    axes = figure.subplots()
    _draw_frontier(axes, frontier, fixed)
    for number, (batch, points) in enumerate(fixed.items()):
        if points:
            steps, samples = _scatter(axes, points, marker="o", colour="#444444", label="" if number else "fixed batch")
            axes.annotate(batch, (steps, samples), textcoords="offset points", xytext=(7, 5), fontsize=9)
    for name, points in others.items():
        if points:
            marker, colour = _MARKS[name]
            _scatter(axes, points, marker=marker, colour=colour, label=name)
    axes.set(xscale="log", yscale="log", xlabel="optimizer steps to the target", ylabel="samples to the target")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:,.0f}")
        axis.set_minor_formatter(NullFormatter())
    axes.set_title(title)
    axes.grid(which="both", alpha=0.2)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def _scatter(
    axes: Axes, points: list[tuple[float, float]], *, marker: str, colour: str, label: str
) -> tuple[float, float]:
    """Draw a median with bars from the least to the most, and return the median."""
    steps, samples = (sorted(values) for values in zip(*points, strict=True))
    x, y = statistics.median(steps), statistics.median(samples)
    axes.errorbar(
        x, y, xerr=[[x - steps[0]], [steps[-1] - x]], yerr=[[y - samples[0]], [samples[-1] - y]],
        fmt=marker, color=colour, markersize=9, elinewidth=0.8, alpha=0.9, label=label or None,
    )  # fmt: skip
    return x, y


def _draw_frontier(axes: Axes, frontier: Frontier | None, fixed: Mapping[str, list[tuple[float, float]]]) -> None:
    if frontier is None or frontier.min_steps is None or frontier.critical_batch_size is None:
        return
    min_steps, critical = frontier.min_steps.value, frontier.critical_batch_size.value
    if min_steps is None or critical is None:
        return
    batches = np.geomspace(min(map(float, fixed)) / 1.5, max(map(float, fixed)) * 1.5, 200)
    steps = min_steps * (1 + critical / batches)
    axes.plot(steps, steps * batches, color="#999999", linewidth=1.2, label=f"fitted frontier ({frontier.verdict})")
