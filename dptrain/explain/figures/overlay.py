"""The figures of several runs laid over each other, a colour and a line style for each."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from dptrain.explain import compare
from dptrain.explain.figures.figure import (
    RunFigure,
    draw_batch,
    drawn,
    label,
    log_axis,
    noise_limits,
    number,
    over_samples,
    series,
)
from dptrain.explain.figures.noise_loss_plots import against_loss, frontier
from dptrain.explain.model.run_placement import position
from dptrain.explain.record import SAMPLES, RunRecord, column, is_resolved

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes

_FEW_RUNS = 3


def overlays(records: Sequence[RunRecord]) -> list[RunFigure]:
    """Return the figures of several runs in the order in which they are read."""
    target = compare.common_target(records)
    ends = [np.inf if target is None else compare.effort(record, target).samples for record in records]
    found = [position(record, up_to_samples=end) for record, end in zip(records, ends, strict=True)]
    return [
        _loss(records),
        _loss_over_time(records, target),
        frontier(
            records,
            found,
            title=compare.about_efforts(records, target),
            note="Each run is shown up to the loss that all of them reached." if target else "",
        ),
        _batch(records),
        _noise_scale(records),
        against_loss(records, title=compare.about_noise_scales(records, target)),
        _learning_rate(records),
        _throughput(records),
    ]


def _loss(records: Sequence[RunRecord]) -> RunFigure:
    return RunFigure(
        name="loss",
        shows="Loss over samples seen",
        title=compare.about_losses(records),
        reading="Lower is better; at equal height, further left took fewer samples. Lines: training, smoothed. "
        "Dots: held-out data.",
        draw=partial(_draw_loss, records=records, over=SAMPLES),
        legend={"loc": "upper right", "ncols": 3},
    )


def _loss_over_time(records: Sequence[RunRecord], target: compare.Target | None) -> RunFigure:
    return RunFigure(
        name="loss-over-time",
        shows="Loss over seconds of training",
        title=compare.about_seconds(records, target),
        reading="Lower is better; at equal height, further left was faster. Valid for the hardware of each run.",
        draw=partial(_draw_loss, records=records, over="progress/wall_s"),
    )


def _draw_loss(axes: Axes, *, records: Sequence[RunRecord], over: str) -> None:
    for index, record in enumerate(records):
        where = column(record.train, over)
        to_where = partial(np.interp, xp=column(record.train, SAMPLES), fp=where)
        samples, losses = record.smoothed("train/loss")
        shown = drawn(len(samples))
        axes.plot(to_where(samples[shown]), losses[shown], linewidth=1.3, label=label(index, record), **series(index))
        samples, losses = compare.losses_of(record, held_out=True)
        axes.plot(to_where(samples), losses, "o", markersize=3.5, color=series(index)["color"])
    axes.set_ylabel("loss")
    if over == SAMPLES:
        over_samples(axes, records)
    else:
        axes.set_xlim(left=0)
        axes.set_xlabel("training time (s)")
        axes.xaxis.set_major_formatter(number)


def _batch(records: Sequence[RunRecord]) -> RunFigure:
    return RunFigure(
        name="batch",
        shows="Global batch over samples seen",
        title=compare.about_batches(records),
        reading="Samples per optimizer step over all replicas; each grid line is twice the one below.",
        draw=partial(_draw_batches, records=records),
        height_in=2.5,
        legend={},
    )


def _draw_batches(axes: Axes, *, records: Sequence[RunRecord]) -> None:
    for index, record in enumerate(records):
        draw_batch(axes, record, linewidth=1.6, label=label(index, record), **series(index))
    sizes = np.concatenate([column(record.train, "batch/global") for record in records])
    axes.set_ylim(sizes.min() / 1.6, sizes.max() * 1.6)
    log_axis(axes, "y", base=2)
    axes.set_ylabel("global batch\n(samples)")
    over_samples(axes, records)


def _noise_scale(records: Sequence[RunRecord]) -> RunFigure:
    known = any(is_resolved(row) for record in records for row in record.train)
    few = "Bands: the intervals; where they overlap, the difference is not significant."
    bands = few if len(records) <= _FEW_RUNS else "Intervals are not drawn for so many runs."
    return RunFigure(
        name="noise-scale",
        shows="Noise scale over samples seen",
        title=compare.about_noise_scales(records),
        reading=f"{bands} A line begins where the noise scale was first resolved.",
        draw=partial(_draw_noise_scales, records=records) if known else None,
        legend={},
    )


def _draw_noise_scales(axes: Axes, *, records: Sequence[RunRecord]) -> None:
    for index, record in enumerate(records):
        rows = [record.train[at] if is_resolved(record.train[at]) else {} for at in drawn(len(record.train))]
        samples = column([record.train[at] for at in drawn(len(record.train))], SAMPLES)
        values, lower, upper = (column(rows, f"noise_scale/{name}") for name in ("value", "lower", "upper"))
        axes.plot(samples, values, linewidth=1.6, label=label(index, record), **series(index))
        if len(records) <= _FEW_RUNS:
            axes.fill_between(samples, lower, upper, color=series(index)["color"], alpha=0.15, linewidth=0)
    axes.set_ylim(*noise_limits([row for record in records for row in record.train]))
    log_axis(axes, "y", base=2)
    axes.set_ylabel("noise scale\n(samples)")
    over_samples(axes, records)


def _learning_rate(records: Sequence[RunRecord]) -> RunFigure:
    return RunFigure(
        name="learning-rate",
        shows="Learning rate over samples seen",
        title=compare.about_learning_rates(records),
        reading="Learning rate of the optimizer: base rate × schedule × scaling with the batch.",
        draw=partial(_draw_rates, records=records),
        height_in=2.3,
        legend={},
    )


def _draw_rates(axes: Axes, *, records: Sequence[RunRecord]) -> None:
    for index, record in enumerate(records):
        samples, rates = column(record.train, SAMPLES), column(record.train, "train/lr")
        shown = drawn(len(samples))
        axes.plot(samples[shown], rates[shown], linewidth=1.6, label=label(index, record), **series(index))
    axes.set_ylim(bottom=0)
    axes.set_ylabel("learning\nrate")
    over_samples(axes, records)


def _throughput(records: Sequence[RunRecord]) -> RunFigure:
    return RunFigure(
        name="throughput",
        shows="Throughput over samples seen",
        title=compare.about_throughputs(records),
        reading="Samples per second over all replicas, smoothed, without evaluations and checkpoints. It depends on "
        "the hardware as much as on the run.",
        draw=partial(_draw_throughputs, records=records),
        height_in=2.3,
        legend={},
    )


def _draw_throughputs(axes: Axes, *, records: Sequence[RunRecord]) -> None:
    for index, record in enumerate(records):
        samples, speeds = record.smoothed("throughput/samples_per_sec")
        shown = drawn(len(samples))
        axes.plot(samples[shown], speeds[shown], linewidth=1.3, label=label(index, record), **series(index))
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(number)
    axes.set_ylabel("samples/s")
    over_samples(axes, records)
