"""The two figures that have no axis of samples alone, for one run or several: noise over loss, samples over steps."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from dptrain.explain.figures.figure import RunFigure, label, log_axis, noise_limits, number, series
from dptrain.explain.figures.theme import GREEN, INK, SOFT, VERMILLION
from dptrain.explain.record import Row, RunRecord, column, is_resolved
from dptrain.explain.text.findings import moments

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    from dptrain.explain.model.run_placement import ImpliedFrontier, RunPlacement

_ALONE: dict[str, Any] = {"color": GREEN, "linestyle": "-"}

_WIDE_RANGE = 3
_FEW_RUNS = 3


def against_loss(records: Sequence[RunRecord], *, title: str) -> RunFigure:
    """Return the figure of the noise scale over the loss, which falls from left to right."""
    shown = [record for record in records if len(moments(record)[0])]
    return RunFigure(
        name="noise-against-loss",
        shows="Noise scale with its interval over training loss",
        title=title,
        reading=(
            "The loss falls from left to right. Each point: where the run first reached that loss; diamond: its end; "
            "bars: intervals; open triangle: lower bound. Where the points rise, larger batches become useful."
        ),
        draw=partial(_draw_against_loss, records=records) if shown else None,
    )


def _draw_against_loss(axes: Axes, *, records: Sequence[RunRecord]) -> None:
    losses: list[float] = []
    shown: list[Row] = []
    for index, record in enumerate(records):
        loss, rows = moments(record)
        style = series(index) if len(records) > 1 else _ALONE
        name = label(index, record) if len(records) > 1 else None
        _draw_moments(axes, loss, rows, style=style, name=name)
        losses.extend(loss)
        shown.extend(rows)
    if min(losses) > 0 and max(losses) / min(losses) > _WIDE_RANGE:
        axes.set_xlim(max(losses) * 1.1, min(losses) / 1.1)
        log_axis(axes, "x")
    else:
        axes.invert_xaxis()
    axes.set_xlabel("training loss, smoothed (falls to the right)")
    axes.set_ylim(*noise_limits(shown))
    log_axis(axes, "y", base=2)
    axes.set_ylabel("noise scale\n(samples)")


def _draw_moments(
    axes: Axes, loss: NDArray[np.float64], rows: list[Row], *, style: dict[str, Any], name: str | None
) -> None:
    resolved = np.array([is_resolved(row) for row in rows], dtype=bool)
    lower, upper = column(rows, "noise_scale/lower"), column(rows, "noise_scale/upper")
    at = np.where(resolved, column(rows, "noise_scale/value"), lower)
    bars = np.maximum(np.where(resolved, [at - lower, upper - at], 0.0), 0.0)
    colour = style["color"]
    axes.errorbar(loss, at, yerr=bars, fmt="none", ecolor=colour, elinewidth=1.2, alpha=0.6)
    falling = loss <= np.minimum.accumulate(loss)
    axes.plot(loss[falling], at[falling], linewidth=1, label=name, **style)
    axes.plot(loss[resolved & falling], at[resolved & falling], "o", color=colour, markersize=3.5)
    axes.plot(loss[~resolved], at[~resolved], "^", color=colour, fillstyle="none", markersize=5)
    axes.plot(loss[-1:], at[-1:], "D", color=colour, markersize=5, label=None if name else "end of the run")


def frontier(
    records: Sequence[RunRecord], found: Sequence[RunPlacement | None], *, title: str, note: str = ""
) -> RunFigure:
    """Return the figure of steps and samples: runs among the fixed batches that their own noise scales imply.

    Args:
        records: the runs.
        found: where each lies; None where that is not known.
        title: the finding.
        note: what is special about this figure, behind how all of them are read.
    """
    return RunFigure(
        name="frontier",
        shows="Samples over optimizer steps, both logarithmic",
        title=title,
        reading=(
            "Star: this run. Curve: constant batches (numbers, in samples) for the same progress, estimated from the "
            "measured noise scale with a tuned learning rate for each; shaded: from the ends of its interval. "
            "Left: fewer steps, faster on more devices. Down: fewer samples, cheaper. "
            f"{note}"
        ).strip(),
        draw=partial(_draw_frontier, records=records, found=found) if any(found) else None,
        height_in=3.6,
    )


def _draw_frontier(axes: Axes, *, records: Sequence[RunRecord], found: Sequence[RunPlacement | None]) -> None:
    placed = [(index, place) for index, place in enumerate(found) if place is not None]
    alone = len(records) == 1
    _limit(axes, [place for _, place in placed])
    for index, place in placed:
        style = _ALONE if alone else series(index)
        name = "constant batches" if alone else label(index, records[index])
        _draw_curve(axes, place, style=style, name=name, shaded=len(placed) <= _FEW_RUNS)
        colour = VERMILLION if alone else style["color"]
        star = "this run" if alone else None
        axes.plot(place.steps, place.samples, "*", color=colour, markersize=13, label=star, linestyle="none", zorder=4)
    if alone:
        _mark_batches(axes, placed[0][1].implied)
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel("samples")


def _limit(axes: Axes, places: Sequence[RunPlacement]) -> None:
    """Show each curve from an eighth of its noise scale to the eightfold, and what was done."""
    curves = [(place, place.implied) for place in places]
    axes.set_xlim(
        min(min(0.85 * curve.min_steps, place.steps / 1.3) for place, curve in curves),
        max(max(curve.steps(curve.noise_scale / 8), 1.3 * place.steps) for place, curve in curves),
    )
    axes.set_ylim(
        min(min(0.85 * curve.min_samples, place.samples / 1.3) for place, curve in curves),
        max(max(curve.samples(curve.noise_scale * 8), 1.3 * place.samples) for place, curve in curves),
    )
    log_axis(axes, "x")
    log_axis(axes, "y")


def _draw_curve(axes: Axes, place: RunPlacement, *, style: dict[str, Any], name: str, shaded: bool) -> None:
    batches = place.implied.noise_scale * np.geomspace(1e-3, 1e3, 241)
    curve = place.implied
    steps, samples = [curve.steps(batch) for batch in batches], [curve.samples(batch) for batch in batches]
    axes.plot(steps, samples, linewidth=1.6, label=name, **style)
    if shaded:
        left, right = axes.get_xlim()
        x = np.geomspace(left, right, 200)
        low, high = (_samples_at(x, curve, top=axes.get_ylim()[1]) for curve in (place.low, place.high))
        between = np.minimum(low, high), np.maximum(low, high)
        axes.fill_between(x, *between, color=style["color"], alpha=0.18, linewidth=0)


def _samples_at(steps: NDArray[np.float64], curve: ImpliedFrontier, *, top: float) -> NDArray[np.float64]:
    """Return the samples of the fixed batch that takes so many steps; `top`, or more, where none takes so few."""
    excess = np.maximum(steps / curve.min_steps - 1, 1e-9)
    return np.minimum(curve.min_samples * (1 + 1 / excess), 2 * top)


def _mark_batches(axes: Axes, curve: ImpliedFrontier) -> None:
    """Write a few fixed batches at the curve, and the fewest steps and samples at its ends."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    axes.axvline(curve.min_steps, color=SOFT, linestyle=":", linewidth=1)
    axes.axhline(curve.min_samples, color=SOFT, linestyle=":", linewidth=1)
    for batch in 2.0 ** np.arange(np.floor(np.log2(curve.noise_scale)) - 3, np.log2(curve.noise_scale) + 4):
        x, y = curve.steps(batch), curve.samples(batch)
        if left < x < right and bottom < y < top:
            axes.plot(x, y, "o", color=GREEN, markersize=4)
            axes.annotate(number(float(batch)), (x, y), (5, 4), textcoords="offset points", color=INK, fontsize=8.5)
