"""The picture of one run: five curves over samples seen, each under the sentence that it shows."""

from __future__ import annotations

from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np

from dptrain.explain import findings
from dptrain.explain.record import SAMPLES, Row, RunRecord, column, read_run, smooth

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

BLUE, VERMILLION, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#9B5F8A", "#8A8A8A"
"""Colours that stay apart for the colour-blind (Okabe and Ito 2008; the purple darkened to read on white)."""

SMOOTHING_SHARE = 0.02
"""Part of the run, in samples, that each point of a smoothed line averages over; a matter of taste."""

_MANY_ROWS = 30

STYLE: dict[Any, Any] = {
    "font.size": 9.5,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E6E6E6",
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "hatch.linewidth": 0.6,
}

CAVEAT = (
    "The noise scale is no optimal batch: it has been off by a typical factor of six "
    "against the critical batch size in published tasks."
)


def draw_report(run_dir: Path) -> Path:
    """Draw `report.png` into a run folder, from its logs alone, and return the path of the picture.

    A run that is still going or was killed is drawn as far as it came. It is 1800 pixels wide, made to be
    shown at half of that.

    Raises:
        ConfigError: where `run_dir` is no run folder, holds no logged step yet, or a log is damaged.
    """
    record = read_run(run_dir)
    path = run_dir / "report.png"
    _figure(record).savefig(path, dpi=200)
    return path


def _figure(record: RunRecord) -> Figure:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(9, 12), layout="constrained")
        panels = figure.subplots(5, 1, sharex=True, height_ratios=[1.5, 1, 1.5, 0.8, 0.8])
        for draw, axes in zip((_loss, _batch, _noise_scale, _learning_rate, _throughput), panels, strict=True):
            draw(axes, record)
        panels[-1].set_xlabel("samples seen")
        panels[-1].xaxis.set_major_formatter("{x:,.0f}")
        panels[-1].set_xlim(0, 1.01 * column([*record.train, *record.evals], SAMPLES).max())
        figure.align_ylabels(panels)
        figure.suptitle(findings.about_run(record), x=0.01, ha="left", fontsize=10.5, color="#444444")
        figure.supxlabel(_caption(record), x=0.01, ha="left", fontsize=8.5, color="#444444")
    return figure


def _loss(axes: Axes, record: RunRecord) -> None:
    smoothed = _raw_and_smoothed(axes, record, "train/loss")
    if record.evals:
        held_out = column(record.evals, SAMPLES), column(record.evals, "eval/loss")
        axes.plot(*held_out, color=VERMILLION, marker="o", markersize=4, linewidth=1, label="held out")
    _mark_dropped(axes, record)
    _second_axis_in_bits(axes, record)
    axes.set_ylabel(" ".join(["loss", *([f"({unit})"] if (unit := findings.loss_unit(record)) else [])]))
    axes.set_title(findings.about_loss(record, smoothed=smoothed))
    axes.legend(loc="upper right", ncols=4)


def _raw_and_smoothed(axes: Axes, record: RunRecord, key: str) -> NDArray[np.float64]:
    """Draw a figure of the training rows faint as it was and bold as smoothed; return the smoothed values.

    A row without the figure is a gap in the one, and takes no part in the other.
    """
    samples, values = column(record.train, SAMPLES), column(record.train, key)
    finite = np.isfinite(values)
    smoothed = smooth(samples[finite], values[finite], window=_window(record))
    axes.plot(samples, values, _dots(record), color=BLUE, alpha=0.3, linewidth=0.7, label="training")
    axes.plot(samples[finite], smoothed, color=BLUE, linewidth=1.6, label="training, smoothed")
    return smoothed


def _mark_dropped(axes: Axes, record: RunRecord) -> None:
    """Mark on the lower edge where the count of dropped steps rose; a dropped step itself has no finite loss."""
    dropped = column(record.train, "train/steps_dropped")
    where = column(record.train, SAMPLES)[np.diff(dropped, prepend=0.0) > 0]
    if len(where):
        edge = axes.get_xaxis_transform()
        height = np.full_like(where, 0.04)
        axes.plot(where, height, "x", color="black", markersize=6, transform=edge, label="step dropped")


def _second_axis_in_bits(axes: Axes, record: RunRecord) -> None:
    """Write the loss in bits per byte on the right, where the task says how the one converts to the other."""
    ratios = column(record.evals, findings.BITS_PER_BYTE) / column(record.evals, "eval/loss")
    ratios = ratios[np.isfinite(ratios)]
    if len(ratios) and np.allclose(ratios, ratios[0], rtol=1e-3):
        ratio = float(ratios[0])
        right = axes.secondary_yaxis("right", functions=(partial(np.multiply, ratio), partial(np.multiply, 1 / ratio)))
        right.set_ylabel("bits per byte")
        right.spines["right"].set_visible(True)


def _batch(axes: Axes, record: RunRecord) -> None:
    sizes = column(record.train, "batch/global")
    _step_line(axes, record, linewidth=1.6)
    moves = record.batch_changes
    for marker, sign, label in (("^", 1, "raised"), ("v", -1, "lowered")):
        chosen = [row for row in moves if sign * (row["batch/after"] - row["batch/before"]) > 0]
        if chosen:
            where = column(chosen, SAMPLES), column(chosen, "batch/after")
            axes.plot(*where, marker, color=VERMILLION if sign > 0 else BLUE, markersize=7, label=label)
    axes.set_yscale("log", base=2)
    axes.set_ylim(sizes.min() / 1.6, sizes.max() * 1.6)
    axes.yaxis.set_major_formatter(_samples)
    axes.set_ylabel("global batch\n(samples)")
    axes.set_title(findings.about_batch(record))
    if moves:
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.3, ncols=2)


def _samples(value: float, _position: float) -> str:
    return f"{value:,.0f}" if value >= 1 else f"{value:.2g}"


def _step_line(axes: Axes, record: RunRecord, *, linewidth: float, label: str | None = None) -> None:
    sizes = column(record.train, "batch/global")
    if len(sizes) > 1 and record.is_cut_short:
        sizes[-1] = sizes[-2]
    axes.step(_positions(record), _from_the_start(sizes), where="pre", color="black", linewidth=linewidth, label=label)


def _noise_scale(axes: Axes, record: RunRecord) -> None:
    bottom, top = _noise_limits(record)
    for x, rows in _stretches(record):
        _draw_stretch(axes, x, rows, bottom=bottom, top=top)
    _step_line(axes, record, linewidth=1, label="global batch")
    axes.set_yscale("log", base=2)
    axes.set_ylim(bottom, top)
    axes.yaxis.set_major_formatter(_samples)
    axes.set_ylabel("noise scale\n(samples)")
    axes.set_title(findings.about_noise_scale(record))
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    axes.legend(unique.values(), unique.keys(), loc="lower right", ncols=4)


def _draw_stretch(axes: Axes, x: NDArray[np.float64], rows: list[Row], *, bottom: float, top: float) -> None:
    """Draw rows of one state: a line in its band, a bound that is open above, or a grey strip."""
    if findings.known_lower(rows[0]) is None:
        axes.axvspan(x[0], x[-1], color=GREY, alpha=0.2, linewidth=0, label="not resolved yet")
        return
    lower = np.maximum(column(rows, "gns/lower"), bottom)
    if findings.is_resolved(rows[0]):
        upper = column(rows, "gns/upper")
        axes.fill_between(
            x, _from_the_start(lower), _from_the_start(upper), color=GREEN, alpha=0.25, linewidth=0, label="interval"
        )
        axes.plot(x, _from_the_start(column(rows, "gns/b_simple")), color=GREEN, linewidth=1.6, label="estimate")
        return
    open_above = axes.fill_between(x, _from_the_start(lower), top, label="at least (open above)")
    open_above.set(facecolor="none", edgecolor=GREEN, alpha=0.5, hatch="///", linewidth=0)
    axes.plot(x, _from_the_start(lower), color=GREEN, linewidth=1.2, linestyle="--")


def _stretches(record: RunRecord) -> Iterator[tuple[NDArray[np.float64], list[Row]]]:
    """Cut the training rows where their state changes; a stretch begins where the one before it ended."""
    positions = _positions(record)
    begin = 0
    for _, group in groupby(record.train, key=_state):
        rows = list(group)
        end = begin + len(rows)
        yield positions[begin : end + 1], rows
        begin = end


def _state(row: Row) -> tuple[bool, bool]:
    return findings.known_lower(row) is not None, findings.is_resolved(row)


def _positions(record: RunRecord) -> NDArray[np.float64]:
    """Return where the first step began, then where each row's step ended: a row speaks of what lies before it."""
    samples = column(record.train, SAMPLES)
    return np.insert(samples, 0, max(0.0, samples[0] - float(record.train[0]["batch/global"])))


def _from_the_start(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Repeat the first value, for the point where the first row's stretch began."""
    return np.insert(values, 0, values[0])


def _noise_limits(record: RunRecord) -> tuple[float, float]:
    """Choose limits that show batch, estimates and most of the band: a bound that just closed may be enormous."""
    known = [row for row in record.train if findings.known_lower(row) is not None]
    band = np.concatenate([column(known, f"gns/{name}") for name in ("lower", "upper")])
    band = band[band > 0]
    shown = [column(record.train, "batch/global"), column(known, "gns/b_simple")]
    if len(band):
        shown.append(np.quantile(band, [0.03, 0.97]))
    values = np.concatenate(shown)
    values = values[values > 0]
    return float(values.min()) / 2, float(values.max()) * 2


def _learning_rate(axes: Axes, record: RunRecord) -> None:
    samples, rates = column(record.train, SAMPLES), column(record.train, "train/lr")
    axes.plot(samples, rates, _dots(record), color=PURPLE, linewidth=1.6)
    axes.set_ylim(bottom=0, top=_headroom(rates))
    axes.set_ylabel("learning\nrate")
    axes.set_title(findings.about_learning_rate(record))


def _throughput(axes: Axes, record: RunRecord) -> None:
    _raw_and_smoothed(axes, record, "throughput/samples_per_sec")
    axes.set_ylim(bottom=0, top=_headroom(column(record.train, "throughput/samples_per_sec")))
    axes.set_ylabel("samples/s")
    axes.set_title(findings.about_throughput(record))


def _headroom(values: NDArray[np.float64]) -> float | None:
    """Return a little more than the largest value, None (let matplotlib choose) where there is none above zero."""
    positive = values[np.isfinite(values) & (values > 0)]
    return 1.1 * float(positive.max()) if len(positive) else None


def _dots(record: RunRecord) -> str:
    """Choose the format of a raw curve: a line, with dots where the rows are so few that a line may be none."""
    return ".-" if len(record.train) < _MANY_ROWS else "-"


def _window(record: RunRecord) -> float:
    return SMOOTHING_SHARE * float(record.train[-1][SAMPLES])


def _caption(record: RunRecord) -> str:
    lines = f"Smoothed lines: mean over {_window(record):,.0f} samples ({SMOOTHING_SHARE:.0%} of the run)"
    return "\n".join(
        [f"{findings.about_geometry(record)}.", f"{lines}. {findings.about_averaging(record)}".strip(), CAVEAT]
    )
