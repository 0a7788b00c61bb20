"""What a figure is before it is drawn: its finding, how to read it, what draws it; and what all figures draw alike."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from dptrain.explain.figures.theme import DASHES, SERIES, STYLE
from dptrain.explain.record import SAMPLES, Row, RunRecord, column, is_resolved, known_lower

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

WIDTH_IN = 5.2
"""Of a figure of its own: two side by side on a screen, one on a phone, and in both the text can be read."""

MOST_POINTS = 1500
"""Points of a curve that are drawn; more than a figure has room for would only make the page slow."""

MOST_RUNS = 26
"""That can be laid over each other: the letters that name them."""

_FAR = 8.0  # beyond the estimates by such a factor, an end of an interval is cut off
_LONGEST_NAME = 24
_LEGEND_IN = {"handle": 0.6, "letter": 0.075}
_TITLE_LETTERS = 56  # of the widest title that fits; at 62 the last letters of one of many wide ones were cut off


@dataclass(frozen=True, kw_only=True)
class RunFigure:
    """A figure before it is drawn.

    Attributes:
        name: of its file, and its place on the page.
        shows: what is drawn over what, such as "Loss over samples seen".
        title: its finding, one sentence; where there is nothing to draw, why.
        reading: one line on how to read it.
        draw: puts it onto axes; None where there is nothing to draw.
        height_in: of the figure.
        legend: where the legend is in a picture of curves that stand over each other on one axis of samples; empty:
            it needs none there. None: the figure has no place in it.
    """

    name: str
    shows: str
    title: str
    reading: str
    draw: Callable[[Axes], None] | None
    height_in: float = 2.9
    legend: dict[str, Any] | None = None

    @property
    def alt(self) -> str:
        """The figure in words."""
        return f"{self.shows}. {self.title}."

    def figure(self, *, titled: bool) -> Figure:
        """Draw it on a figure of its own, with its finding above where it does not stand on a page that says it."""
        from matplotlib import rc_context
        from matplotlib.figure import Figure

        assert self.draw is not None
        with rc_context(STYLE):
            figure = Figure(figsize=(WIDTH_IN, self.height_in), layout="constrained")
            axes = figure.subplots()
            self.draw(axes)
            _legend_outside(figure, axes, below=titled)
            if titled:
                figure.suptitle(
                    textwrap.fill(self.title, _TITLE_LETTERS), x=0.01, ha="left", fontsize=10, fontweight="bold"
                )
        return figure


def _legend_outside(figure: Figure, axes: Axes, *, below: bool) -> None:
    """Put the legend where it hides no curve, in as few lines as its entries need."""
    handles = legend_entries(axes)
    if not handles:
        return
    widths = [_LEGEND_IN["handle"] + _LEGEND_IN["letter"] * len(label) for label in handles]
    fits = (
        num_columns
        for num_columns in range(len(widths), 0, -1)
        if sum(map(max, np.array_split(widths, num_columns))) <= WIDTH_IN
    )
    num_columns = next(fits, 1)
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower left" if below else "outside upper left",
        ncols=num_columns,
        columnspacing=1.2,
    )


def letter(index: int) -> str:
    """Return the letter by which one of several runs is called."""
    return chr(ord("A") + index)


def label(index: int, record: RunRecord) -> str:
    """Return how one of several runs is called where there is room for its name."""
    return f"{letter(index)} {shortened(record.name)}"


def shortened(name: str) -> str:
    """Cut a name to what a figure has room for."""
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"


def series(index: int) -> dict[str, Any]:
    """Return the colour and line style of one of several runs."""
    return {"color": SERIES[index % len(SERIES)], "linestyle": DASHES[index % len(DASHES)]}


def legend_entries(axes: Axes) -> dict[str, Any]:
    """Return each label once, with a curve that bears it."""
    handles, labels = axes.get_legend_handles_labels()
    return dict(zip(labels, handles, strict=True))


def over_samples(axes: Axes, records: Sequence[RunRecord]) -> None:
    """Lay the axis of samples, from the start to the end of the longest run."""
    end = max(column([*record.train, *record.evals], SAMPLES).max() for record in records)
    axes.set_xlim(0, 1.01 * end)
    axes.set_xlabel("samples seen")
    axes.xaxis.set_major_locator(_round_numbers())
    axes.xaxis.set_major_formatter(number)


def _round_numbers() -> Any:  # noqa: ANN401 - matplotlib is imported where it draws
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10])


def number(value: float, _position: object = None) -> str:
    """Write the number at a tick, without an exponent."""
    return f"{value:,.0f}" if abs(value) >= 1 and value == round(value) else f"{value:,.4g}"


def log_axis(axes: Axes, which: Literal["x", "y"], *, base: int = 10) -> None:
    """Make an axis logarithmic, with plain numbers at its ticks; call it once the limits are set, and above zero."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, NullLocator

    (axes.set_xscale if which == "x" else axes.set_yscale)("log", base=base)
    axis = axes.xaxis if which == "x" else axes.yaxis
    low, high = sorted(axes.get_xlim() if which == "x" else axes.get_ylim())
    if base == 10:  # noqa: PLR2004 - the base of decades
        few = high / low < 4  # noqa: PLR2004 - a stretch in which 1, 2, 5 may fall only once
        axis.set_major_locator(
            MaxNLocator(nbins=4, steps=[1, 2, 5, 10]) if few else LogLocator(subs=(1, 2, 5), numticks=6)
        )
        axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(number)
    axis.set_minor_formatter(NullFormatter())


def drawn(num_points: int) -> NDArray[np.int64]:
    """Return the indices of the points that are drawn: all, or `MOST_POINTS` evenly spaced ones with both ends."""
    return np.unique(np.linspace(0, num_points - 1, min(num_points, MOST_POINTS)).round().astype(np.int64))


def positions(record: RunRecord) -> NDArray[np.float64]:
    """Return where the first step began, then where each row's step ended: a row speaks of what lies before it."""
    samples = column(record.train, SAMPLES)
    return np.insert(samples, 0, max(0.0, samples[0] - float(record.train[0]["batch/global"])))


def from_the_start(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Repeat the first value, for the point where the first row's stretch began."""
    return np.insert(values, 0, values[0])


def draw_batch(axes: Axes, record: RunRecord, **style: Any) -> None:  # noqa: ANN401 - what matplotlib takes
    """Draw the global batch as the steps that it moved by; the last one that the run's end made is left out."""
    sizes = column(record.train, "batch/global")
    if record.is_cut_short:
        sizes[-1] = sizes[-2]
    x, y = positions(record), from_the_start(sizes)
    corners = np.union1d([0, len(y) - 1], np.flatnonzero(np.diff(y)))
    axes.step(x[corners], y[corners], where="pre", **style)


def noise_limits(rows: Sequence[Row], *, also: Sequence[float] | NDArray[np.float64] = ()) -> tuple[float, float]:
    """Choose limits that show estimates and most of the band: a bound that just closed may be enormous, or nearly none.

    Args:
        rows: training rows; what is not known of the noise scale in them takes no part.
        also: what is to be seen, too, in samples, such as batches.
    """
    known = [row for row in rows if known_lower(row) is not None]
    estimates = column([row for row in known if is_resolved(row)], "noise_scale/value")
    # A lower bound is drawn where nothing else is known, and is never far above the truth.
    least = column([row for row in known if not is_resolved(row)], "noise_scale/lower")
    band = np.concatenate([column(known, f"noise_scale/{name}") for name in ("lower", "upper")])
    band = band[band > 0]
    if len(estimates):
        band = np.clip(band, estimates.min() / _FAR, estimates.max() * _FAR)
    highest = [least.max()] if len(least) else []
    values = np.concatenate(
        [estimates, highest, np.asarray(also), np.quantile(band, [0.03, 0.97]) if len(band) else []]
    )
    values = values[values > 0]
    return (float(values.min()) / 2, float(values.max()) * 2) if len(values) else (0.5, 2.0)
