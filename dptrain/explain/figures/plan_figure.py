"""The picture of a plan: time against devices, and against what it costs; what it says is written elsewhere."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

from dptrain.cost.ledger import PETAFLOP_S_DAY
from dptrain.explain.figures.theme import BLUE, GREEN, GREY, INK, SOFT, STYLE, VERMILLION
from dptrain.explain.text import plan_text

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

    from dptrain.explain.model.plan import Plan
    from dptrain.explain.model.planner import Point

_UNITS = ((48 * 3600.0, 86_400.0, "days"), (3600.0, 3600.0, "hours"), (120.0, 60.0, "minutes"), (0.0, 1.0, "seconds"))
_MOST_LABELS = 7
_WIDE = 300
"""Ratio of the ends of an axis from which on it has a tick at each power of ten alone."""


def draw_plan(plan: Plan, path: Path) -> None:
    """Draw a plan as a PNG of 1800 pixels' width, made to be shown at half of that."""
    figure(plan).savefig(path, dpi=200)


def figure(plan: Plan) -> Figure:
    """Return the figure: above, time by number of devices; below, time by samples and by money."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        drawn = Figure(figsize=(9, 8.2), layout="constrained")
        figures = drawn.subplot_mosaic([["devices", "devices"], ["work", "money"]], height_ratios=[1.15, 1])
        unit_s, unit = _unit(plan)
        _by_devices(figures["devices"], plan, unit_s=unit_s, unit=unit)
        _by_work(figures["work"], plan, unit_s=unit_s, unit=unit)
        _by_money(figures["money"], plan, unit_s=unit_s, unit=unit)
        drawn.suptitle(f"{plan.run} · {plan_text.goal(plan)}", x=0.01, ha="left", fontsize=9.5, color=SOFT)
        drawn.supxlabel(_caption(plan), x=0.01, ha="left", fontsize=8, color=SOFT)
    return drawn


def _by_devices(axes: Axes, plan: Plan, *, unit_s: float, unit: str) -> None:
    numbers = [point.num_devices for point in plan.points]
    times = [point.seconds / unit_s for point in plan.points]
    history = [[end / unit_s for end in point.seconds_history] for point in plan.points]
    measured = [[end / unit_s for end in point.seconds_range] for point in plan.points]
    _band(axes, numbers, history, color=GREY, alpha=0.18, label="noise scale off by 6×")
    _band(axes, numbers, measured, color=GREEN, alpha=0.35, label="interval and fits")
    axes.plot(numbers, times, color=BLUE, marker="o", markersize=4, linewidth=1.6, label="planned")
    axes.axvline(plan.knee, color=VERMILLION, linestyle="--", linewidth=1, label=f"knee: {plan.knee:,}")
    if plan.ceiling is not None:
        label = f"no gain beyond {plan.ceiling:,}"
        axes.axvline(plan.ceiling, color=INK, linestyle=":", linewidth=1.2, label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    _plain_ticks(axes.yaxis)
    axes.set_ylabel(f"time to the target ({unit})")
    _explain(
        axes,
        finding=plan_text.headline(plan),
        unit=f"number of {plan.device}s",
        reading=(
            f"Left of the knee, twice the {plan.device}s save at least 30 % of the time; where the line is flat, more "
            f"of them save none"
        ),
        width=105,
    )
    axes.legend(loc="upper right", ncols=2, frameon=True, framealpha=0.9, edgecolor="none")


def _by_work(axes: Axes, plan: Plan, *, unit_s: float, unit: str) -> None:
    counted = all(point.compute.by_count is not None for point in plan.points)
    what, name = ("compute", "compute (petaflop/s-days, counted)") if counted else ("samples", "samples seen")

    def amount(point: Point) -> float:
        return (point.compute.by_count or 0.0) / PETAFLOP_S_DAY if counted else point.samples

    _frontier(axes, plan.points, amount, unit_s=unit_s)
    axes.set_ylabel(f"time to the target ({unit})")
    reading = f"Each point is a number of {plan.device}s; lower is faster, further right is more work"
    _explain(axes, finding=plan_text.traded(plan, what, amount), unit=name, reading=reading, width=52)


def _by_money(axes: Axes, plan: Plan, *, unit_s: float, unit: str) -> None:
    priced = all(point.cost is not None for point in plan.points)
    what, name = ("money", f"money ({plan.currency})") if priced else (f"{plan.device}-hours", f"{plan.device}-hours")

    def amount(point: Point) -> float:
        return point.cost or 0.0 if priced else point.device_s / 3600

    _frontier(axes, plan.points, amount, unit_s=unit_s)
    axes.set_ylabel(f"time to the target ({unit})")
    reading = "Where the line is flat, more money saves no time"
    _explain(axes, finding=plan_text.traded(plan, what, amount), unit=name, reading=reading, width=52)


def _frontier(axes: Axes, points: Sequence[Point], amount: Callable[[Point], float], *, unit_s: float) -> None:
    axes.plot(
        [amount(point) for point in points],
        [point.seconds / unit_s for point in points],
        color=BLUE,
        marker="o",
        markersize=4,
        linewidth=1.6,
    )
    for point in points[:: -(-len(points) // _MOST_LABELS)]:
        where = amount(point), point.seconds / unit_s
        axes.annotate(f"{point.num_devices:,}", where, xytext=(4, 4), textcoords="offset points", fontsize=8)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.margins(x=0.14)
    _plain_ticks(axes.xaxis)
    _plain_ticks(axes.yaxis)


def _band(axes: Axes, numbers: list[int], ends: list[list[float]], *, color: str, alpha: float, label: str) -> None:
    low, high = zip(*ends, strict=True)
    axes.fill_between(numbers, low, high, color=color, alpha=alpha, linewidth=0, label=label)


def _plain_ticks(axis: Axis) -> None:
    """Write 30 and 0.5 where matplotlib would write 3 × 10¹; powers of ten where there are too many noughts."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    axis.set_minor_formatter(NullFormatter())
    if high > _WIDE * low:
        axis.set_major_locator(LogLocator(numticks=6))
    else:
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.4g}"))


def _explain(axes: Axes, *, finding: str, unit: str, reading: str, width: int) -> None:
    axes.set_title(textwrap.fill(finding[0].upper() + finding[1:], width * 3 // 4))
    axes.set_xlabel(f"{unit}\n" + textwrap.fill(f"How to read: {reading}.", width), fontsize=8.5)


def _caption(plan: Plan) -> str:
    lines = [plan_text.doubt(plan), plan_text.step_times(plan), *plan.warnings, plan_text.NO_OPTIMUM.removesuffix(".")]
    return "\n".join(textwrap.fill(f"{line[0].upper()}{line[1:]}.", 150) for line in lines)


def _unit(plan: Plan) -> tuple[float, str]:
    """Return the unit that suits the middle of the times."""
    middle = sorted(point.seconds for point in plan.points)[len(plan.points) // 2]
    return next((unit_s, unit) for least, unit_s, unit in _UNITS if middle >= least)
