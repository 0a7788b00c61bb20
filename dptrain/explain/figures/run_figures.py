"""The figures of one run over samples seen, and its noise scale by group; each with its finding and how to read it."""

from __future__ import annotations

from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np

from dptrain.explain.figures.figure import (
    RunFigure,
    draw_batch,
    drawn,
    from_the_start,
    log_axis,
    noise_limits,
    number,
    over_samples,
    positions,
    shortened,
)
from dptrain.explain.figures.noise_loss_plots import against_loss, frontier
from dptrain.explain.figures.theme import BLUE, GREEN, GREY, INK, PURPLE, VERMILLION
from dptrain.explain.model.run_placement import position
from dptrain.explain.record import SAMPLES, SMOOTHING_SHARE, Row, RunRecord, column, is_resolved, known_lower
from dptrain.explain.text import findings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from matplotlib.axes import Axes
    from numpy.typing import NDArray

_MANY_ROWS = 30
_MOST_GROUPS = 24


def figures(record: RunRecord) -> list[RunFigure]:
    """Return the figures of a run in the order in which they are read."""
    found = position(record)
    return [
        _loss(record),
        _batch(record),
        _noise_scale(record),
        against_loss([record], title=findings.about_noise_against_loss(record)),
        frontier(
            [record],
            [found],
            title=findings.about_position(found, record),
            note="" if found is None else findings.about_fewest(found),
        ),
        *([_groups(record)] if record.groups() else []),
        _learning_rate(record),
        _throughput(record),
    ]


def _loss(record: RunRecord) -> RunFigure:
    return RunFigure(
        name="loss",
        shows="Loss over samples seen",
        title=findings.about_loss(record),
        reading=(
            f"Lower is better. Faint: each step's mean loss; thick: its mean over {record.window:,.0f} samples "
            f"({SMOOTHING_SHARE:.0%} of the run); dots: held-out data."
        ),
        draw=partial(_draw_loss, record=record),
        legend={"loc": "upper right", "ncols": 4},
    )


def _draw_loss(axes: Axes, *, record: RunRecord) -> None:
    _raw_and_smoothed(axes, record, "train/loss")
    if record.evals:
        held_out = column(record.evals, SAMPLES), column(record.evals, "eval/loss")
        axes.plot(*held_out, color=VERMILLION, marker="o", markersize=4, linewidth=1, label="held out")
    _mark_dropped(axes, record)
    _second_axis_in_bits(axes, record)
    axes.set_ylabel(" ".join(["loss", *([f"({unit})"] if (unit := findings.loss_unit(record)) else [])]))
    over_samples(axes, [record])


def _raw_and_smoothed(axes: Axes, record: RunRecord, key: str) -> None:
    """Draw a figure of the training rows faint as it was and bold as smoothed.

    A row without the figure is a gap in the one, and takes no part in the other.
    """
    samples, values = column(record.train, SAMPLES), column(record.train, key)
    shown = drawn(len(samples))
    # A line, with dots where the rows are so few that a line may be none.
    line = ".-" if len(record.train) < _MANY_ROWS else "-"
    axes.plot(samples[shown], values[shown], line, color=BLUE, alpha=0.35, linewidth=0.7, label="each step")
    samples, values = record.smoothed(key)
    shown = drawn(len(samples))
    axes.plot(samples[shown], values[shown], color=BLUE, linewidth=1.6, label="smoothed")


def _mark_dropped(axes: Axes, record: RunRecord) -> None:
    """Mark on the lower edge where the count of dropped steps rose; a dropped step itself has no finite loss."""
    dropped = column(record.train, "train/steps_dropped")
    where = column(record.train, SAMPLES)[np.diff(dropped, prepend=0.0) > 0]
    if len(where):
        edge = axes.get_xaxis_transform()
        height = np.full_like(where, 0.04)
        axes.plot(where, height, "x", color=INK, markersize=6, transform=edge, label="skipped step")


def _second_axis_in_bits(axes: Axes, record: RunRecord) -> None:
    """Write the loss in bits per byte on the right, where the task says how the one converts to the other."""
    bits, losses = column(record.evals, findings.BITS_PER_BYTE), column(record.evals, "eval/loss")
    ratios = bits[losses > 0] / losses[losses > 0]
    ratios = ratios[ratios > 0]
    if len(ratios) and np.allclose(ratios, ratios[0], rtol=1e-3):
        ratio = float(ratios[0])
        right = axes.secondary_yaxis("right", functions=(partial(np.multiply, ratio), partial(np.multiply, 1 / ratio)))
        right.set_ylabel("bits per byte")
        right.spines["right"].set_visible(True)


def _batch(record: RunRecord) -> RunFigure:
    return RunFigure(
        name="batch",
        shows="Global batch over samples seen",
        title=findings.about_batch(record),
        reading=(
            "Samples per optimizer step over all replicas; each grid line is twice the one below. A triangle is a "
            "decision, hollow if only advised; the table has the reasons."
        ),
        draw=partial(_draw_batch, record=record),
        height_in=2.5,
        legend={"loc": "lower right", "bbox_to_anchor": (1, 1), "borderaxespad": 0.3, "ncols": 4},
    )


def _draw_batch(axes: Axes, *, record: RunRecord) -> None:
    draw_batch(axes, record, color=INK, linewidth=1.6)
    hollow: dict[str, Any] = {"markerfacecolor": "none"}
    for decisions, labels, style in (
        (record.batch_changes, ("raised", "lowered"), {}),
        (record.advice, ("raise advised", "lower advised"), hollow),
    ):
        for sign, marker, colour, label in zip((1, -1), "^v", (VERMILLION, BLUE), labels, strict=True):
            chosen = [row for row in decisions if sign * (row["batch/after"] - row["batch/before"]) > 0]
            if chosen:
                where = column(chosen, SAMPLES), column(chosen, "batch/after")
                axes.plot(*where, marker, color=colour, markersize=6, label=label, **style)
    asked = column([*record.batch_changes, *record.advice], "batch/after")
    sizes = np.concatenate([column(record.train, "batch/global"), asked])
    axes.set_ylim(sizes.min() / 1.6, sizes.max() * 1.6)
    log_axis(axes, "y", base=2)
    axes.set_ylabel("global batch\n(samples)")
    over_samples(axes, [record])


def _noise_scale(record: RunRecord) -> RunFigure:
    return RunFigure(
        name="noise-scale",
        shows="Noise scale with its interval over samples seen",
        title=findings.about_noise_scale(record),
        reading=(
            f"Band: {findings.level(record) or 'the'} interval; black: the batch in use. Below the band a larger "
            f"batch saves steps, above it hardly any. {findings.about_averaging(record)}"
        ).strip(),
        draw=partial(_draw_noise_scale, record=record),
        legend={"loc": "lower right", "ncols": 4},
    )


def _draw_noise_scale(axes: Axes, *, record: RunRecord) -> None:
    bottom, top = noise_limits(record.train, also=column(record.train, "batch/global"))
    for x, rows in _stretches(record):
        _draw_stretch(axes, x, rows, bottom=bottom, top=top)
    draw_batch(axes, record, color=INK, linewidth=1, label="global batch")
    axes.set_ylim(bottom, top)
    log_axis(axes, "y", base=2)
    axes.set_ylabel("noise scale\n(samples)")
    over_samples(axes, [record])


def _draw_stretch(axes: Axes, x: NDArray[np.float64], rows: list[Row], *, bottom: float, top: float) -> None:
    """Draw rows of one state: a line in its band, a bound that is open above, or a grey strip."""
    if known_lower(rows[0]) is None:
        axes.axvspan(x[0], x[-1], color=GREY, alpha=0.2, linewidth=0, label="not resolved yet")
        return
    lower = from_the_start(np.maximum(column(rows, "noise_scale/lower"), bottom))
    if is_resolved(rows[0]):
        upper = from_the_start(np.minimum(column(rows, "noise_scale/upper"), 2 * top))
        axes.fill_between(x, lower, upper, color=GREEN, alpha=0.25, linewidth=0, label="interval")
        axes.plot(x, from_the_start(column(rows, "noise_scale/value")), color=GREEN, linewidth=1.6, label="estimate")
        return
    open_above = axes.fill_between(x, lower, top, label="at least (open above)")
    open_above.set(facecolor="none", edgecolor=GREEN, alpha=0.5, hatch="///", linewidth=0)
    axes.plot(x, lower, color=GREEN, linewidth=1.2, linestyle="--")


def _stretches(record: RunRecord) -> Iterator[tuple[NDArray[np.float64], list[Row]]]:
    """Cut the training rows where their state changes; a stretch begins where the one before it ended."""
    shown = drawn(len(record.train))
    ends = positions(record)[np.insert(shown + 1, 0, 0)]
    begin = 0
    for _, group in groupby((record.train[index] for index in shown), key=_state):
        rows = list(group)
        end = begin + len(rows)
        yield ends[begin : end + 1], rows
        begin = end


def _state(row: Row) -> tuple[bool, bool]:
    return known_lower(row) is not None, is_resolved(row)


def _groups(record: RunRecord) -> RunFigure:
    groups = {name: row for name, row in record.groups().items() if known_lower(row) is not None}
    largest = sorted(groups, key=lambda name: float(groups[name]["noise_scale/lower"]))[-_MOST_GROUPS:]
    left_out = f" Shown are the {_MOST_GROUPS} largest of {len(groups)}." if len(groups) > _MOST_GROUPS else ""
    return RunFigure(
        name="groups",
        shows="Noise scale of groups of parameters at the end",
        title=findings.about_groups(record),
        reading=(
            "One line per group: the estimate with its interval; an arrow is a lower bound. Dashed: the whole model. "
            f"All groups share one batch size.{left_out}"
        ),
        draw=partial(_draw_groups, record=record, groups={name: groups[name] for name in largest}) if groups else None,
        height_in=1.2 + 0.24 * len(largest),
    )


def _draw_groups(axes: Axes, *, record: RunRecord, groups: dict[str, Row]) -> None:
    for height, row in enumerate(groups.values()):
        low = max(float(row["noise_scale/lower"]), 1e-3)
        if is_resolved(row):
            axes.plot([low, row["noise_scale/upper"]], [height, height], color=GREEN, linewidth=3, alpha=0.5)
            axes.plot([max(row["noise_scale/value"], low)], [height], "o", color=GREEN, markersize=5)
        else:
            axes.plot([low], [height], marker=">", color=GREEN, markersize=6, fillstyle="none")
    whole = record.train[-1].get("noise_scale/value")
    if whole:
        axes.axvline(whole, color=INK, linestyle="--", linewidth=1, label="whole model")
    axes.set_xlim(*noise_limits(list(groups.values()), also=[whole] if whole else []))
    log_axis(axes, "x")
    axes.set_yticks(range(len(groups)), [shortened(name) for name in groups])
    axes.set_xlabel("noise scale (samples)")
    axes.grid(visible=False, axis="y")


def _learning_rate(record: RunRecord) -> RunFigure:
    return RunFigure(
        name="learning-rate",
        shows="Learning rate over samples seen",
        title=findings.about_learning_rate(record),
        reading="Learning rate of the optimizer: base rate × schedule × scaling with the batch.",
        draw=partial(_draw_learning_rate, record=record),
        height_in=2.3,
        legend={},
    )


def _draw_learning_rate(axes: Axes, *, record: RunRecord) -> None:
    samples, rates = column(record.train, SAMPLES), column(record.train, "train/lr")
    shown = drawn(len(samples))
    line = ".-" if len(samples) < _MANY_ROWS else "-"
    axes.plot(samples[shown], rates[shown], line, color=PURPLE, linewidth=1.6)
    axes.set_ylim(bottom=0, top=_headroom(rates))
    axes.set_ylabel("learning\nrate")
    over_samples(axes, [record])


def _throughput(record: RunRecord) -> RunFigure:
    return RunFigure(
        name="throughput",
        shows="Throughput over samples seen",
        title=findings.about_throughput(record),
        reading=(
            "Samples per second over all replicas, without evaluations and checkpoints. Faint: between logged "
            "steps; thick: smoothed like the loss."
        ),
        draw=partial(_draw_throughput, record=record),
        height_in=2.3,
        legend={},
    )


def _draw_throughput(axes: Axes, *, record: RunRecord) -> None:
    _raw_and_smoothed(axes, record, "throughput/samples_per_sec")
    axes.set_ylim(bottom=0, top=_headroom(column(record.train, "throughput/samples_per_sec")))
    axes.yaxis.set_major_formatter(number)
    axes.set_ylabel("samples/s")
    over_samples(axes, [record])


def _headroom(values: NDArray[np.float64]) -> float | None:
    """Return a little more than the largest value, None (let matplotlib choose) where there is none above zero."""
    positive = values[np.isfinite(values) & (values > 0)]
    return 1.1 * float(positive.max()) if len(positive) else None
