"""The page and the picture of the benchmark of precision, made from its JSON, so that the two are of one run."""
# python -m benchmarks.precision_page PATH.json: writes PATH.md, and PATH.png where gradients were measured

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.result_tables import figures_table, rows_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def figures_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the answer: ratios of noise scales late in training, and differences of losses."""
    figures = {}
    for row in rows:
        table, name = row["table"], f"{row['task']}_{row['arm'].replace(', ', '_').replace(' ', '_')}"
        if table == "noise" and row["stage"] == "late" and row["kind"] in _SHOWN and row["ratio"]:
            figures[f"noise_ratio_{name}"] = row["ratio"][0]
        elif table == "loss" and row["arm"] in ("fp8, nearest", "fp4, nearest", "fp4, stochastic gradients"):
            figures[f"loss_difference_{name}"] = row["difference"]
        elif table == "export":
            figures[f"loss_change_{name}"] = row["change"]
    return figures


_SHOWN = ("fp8", "int4", "int3")

_TABLES: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "noise": (
        "Noise scale through the same weights and samples: early (10 % of a run in float32) and late (50 %)",
        {
            "task": "{task}",
            "when": "{stage}",
            "format, rounding": "{arm}",
            "bits": "{bits}",
            "noise scale": "{noise_text}",
            "over float32, paired": "{ratio_text}",
            "tr(Σ) over float32": "{trace_ratio:.3g}",
            "square of G over float32": "{square_text}",
            "cosine of mean gradients": "{cosine:.3f}",
        },
    ),
    "gap": (
        "Where ‖g‖ of a batch of 32 is below √3 × the quantisation noise",
        {
            "task": "{task}",
            "format, rounding": "{arm}",
            "‖g‖/(√3 q) from 5 % to 95 % of the run": "{course}",
            "below 1": "{below}",
        },
    ),
    "loss": (
        "Held-out loss of training in a format",
        {
            "task": "{task}",
            "format, rounding": "{arm}",
            "held-out loss": "{loss:.4f} ± {spread:.4f}",
            "over float32": "{difference:+.4f} ± {difference_spread:.4f}",
        },
    ),
    "export": (
        "int8 weights after training in float32 (`dptrain export --int8`)",
        {
            "task": "{task}",
            "held-out loss": "{before:.5f}",
            "with int8 weights": "{after:.5f}",
            "change": "{change:+.2g}",
            "bytes": "{bytes_before} → {bytes_after}",
        },
    ),
}


def noise_table(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of noise scales with what they show; a ratio of |G|² means nothing where it is not resolved."""
    return [
        {
            **row,
            "noise_text": _text(row["noise_scale"]),
            "ratio_text": _text(row["ratio"]),
            "square_text": "–" if row["ratio"] is None else f"{row['square_ratio']:.3g}",
        }
        for row in rows
        if row["table"] == "noise"
    ]


def _text(found: tuple[float, float, float] | None) -> str:
    return "not resolved" if found is None else f"{found[0]:.3g} [{found[1]:.3g}, {found[2]:.3g}]"


def gap_table(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return one row for each task and arm, with all its points and at which of them it is below 1."""
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["table"] == "gap":
            found.setdefault((row["task"], row["arm"]), []).append(row)
    table = []
    for (task, arm), points in found.items():
        below = [f"{100 * point['part']:.0f} %" for point in points if point["gap"] < 1]
        text = "never" if not below else "always" if len(below) == len(points) else f"from {below[0]}, at {len(below)}"
        course = " ".join(f"{point['gap']:.2g}" for point in points)
        table.append({"task": task, "arm": arm, "course": course, "below": text})
    return table


_HOW_TO_READ: Mapping[str, str] = {
    "noise": (
        "tr(Σ)/|G|² of the gradients of single samples, all through the same weights, those of a run in float32. "
        "Intervals are 95 %, by the jackknife over samples; ratios pair the samples, so their intervals are narrower "
        "than those of the two noise scales. Where the bounds are a factor of 100 apart, nothing is resolved. A noise "
        "scale counts what differs between samples, rounding by chance included. It does not see a direction that "
        "rounding to the nearest turns for all samples alike: the cosine does."
    ),
    "gap": (
        "‖g‖ and q are root mean squares over two batches; q is that of the norm of what a format adds to the gradient "
        "of a batch. The weights are those of the run in float32."
    ),
    "loss": (
        "Means over three seeds ± their standard deviation; differences are seed by seed. The held-out loss of a "
        "format is computed in that format, rounded to the nearest."
    ),
    "export": "Both losses are computed in float32.",
}
_ALL = (
    "Everything is emulated in float32, with a scale for each row of activations and gradients; weights are rounded to "
    "the nearest in all arms. One replica, one core."
)


def page(found: Mapping[str, Any], *, picture: str | None) -> str:
    """Return a result as a page.

    Args:
        found: as the JSON has it: command, environment, figures and rows.
        picture: name of its file beside the page.
    """
    rows: dict[str, Sequence[Mapping[str, Any]]] = {
        kind: [row for row in found["rows"] if row["table"] == kind] for kind in _TABLES
    }
    rows["noise"], rows["gap"] = noise_table(found["rows"]), gap_table(found["rows"])
    environment = found["environment"]
    lines = [
        "# Precision: noise scale, quantisation noise, and held-out loss",
        "",
        f"`{found['command']}` on {environment['processor']}, torch {environment['torch']}. {_ALL}",
        "",
    ]
    if picture is not None:
        lines += [f"![Noise scale against bits, and gradient norm against quantisation noise]({picture})", ""]
    for kind, (title, columns) in _TABLES.items():
        if rows[kind]:
            lines += [f"## {title}", "", _HOW_TO_READ[kind], "", rows_table(rows[kind], columns)]
    return "\n".join([*lines, "## Figures on record", "", figures_table(found["figures"])])


_COLOURS = {"nearest": "#444444", "stochastic": "#d55e00", "stochastic_gradients": "#0072b2"}
_OFFSETS = {"nearest": -0.12, "stochastic": 0.0, "stochastic_gradients": 0.12}
_GAPS = {"fp8": "#999999", "int6": "#0072b2", "fp4": "#009e73", "int4": "#d55e00", "int3": "#882255"}


def draw(rows: Sequence[Mapping[str, Any]], *, path: Path) -> None:
    """Draw φ and its ratio to float32 against bits, and the gradient norm over the quantisation noise."""
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(row["task"] for row in rows))
    figure = Figure(figsize=(12, 9), layout="constrained")
    grid = figure.subplots(3, len(tasks), squeeze=False)
    for column, task in enumerate(tasks):
        own = [row for row in rows if row["task"] == task]
        _draw_noise(grid[0][column], own, key="noise_scale")
        _draw_noise(grid[1][column], own, key="ratio")
        _draw_gaps(grid[2][column], own)
        grid[0][column].set_title(task)
    for row, label in enumerate(
        ("noise scale, samples", "noise scale over float32", "‖g‖ / (√3 × quantisation noise)")
    ):
        grid[row][0].set_ylabel(label)
    grid[0][0].legend(fontsize=7)
    handles, labels = grid[2][0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=7)
    figure.savefig(path, dpi=110)


def _draw_noise(axes: Axes, rows: Sequence[Mapping[str, Any]], *, key: str) -> None:
    kinds = list(dict.fromkeys(row["kind"] for row in rows if row["table"] == "noise"))
    for rounding, colour in _COLOURS.items():
        for stage, fill in (("early", "none"), ("late", colour)):
            chosen = [
                (kinds.index(row["kind"]) + _OFFSETS[rounding], row[key])
                for row in rows
                if row["table"] == "noise" and (row["rounding"], row["stage"]) == (rounding, stage) and row[key]
            ]
            if chosen:
                places, found = zip(*chosen, strict=True)
                values = [value for value, _, _ in found]
                errors = [[v - low for v, low, _ in found], [high - v for v, _, high in found]]
                label = f"{rounding.replace('_', ' ')}, {stage}"
                axes.errorbar(
                    places, values, yerr=errors, fmt="o", ms=4, color=colour, mfc=fill, lw=1, capsize=2, label=label
                )
    if key == "ratio":
        axes.axhline(1, color="#999999", lw=0.8)
    axes.set_yscale("log")
    bits = {row["kind"]: row["bits"] for row in rows if row["table"] == "noise"}
    axes.set_xticks(range(len(kinds)), [f"{kind}\n{bits[kind]} bits" for kind in kinds], fontsize=7)


def _draw_gaps(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    for kind, colour in _GAPS.items():
        for rounding, style in (("nearest", "-"), ("stochastic", "--"), ("stochastic_gradients", ":")):
            points = [
                (row["part"], row["gap"])
                for row in rows
                if row["table"] == "gap" and (row["kind"], row["rounding"]) == (kind, rounding)
            ]
            if points:
                label = f"{kind}, {rounding.replace('_', ' ')}"
                axes.plot(*zip(*points, strict=True), style, color=colour, lw=1.2, label=label)
    axes.axhline(1, color="black", lw=0.8)
    axes.set_yscale("log")
    axes.set_xlabel("part of the run")


def write(path: Path) -> None:
    """Write page and picture of a JSON beside it."""
    found = json.loads(path.read_text(encoding="utf-8"))
    picture = path.with_suffix(".png") if any(row["table"] == "noise" for row in found["rows"]) else None
    if picture is not None:
        draw(found["rows"], path=picture)
    text = page(found, picture=None if picture is None else picture.name)
    path.with_suffix(".md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
