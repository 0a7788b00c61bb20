"""The page and the figure of `benchmarks.learners`, and rows of its earlier results beside those of this run."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks import harness
from benchmarks.learners.table import UNKNOWN
from benchmarks.result_tables import figures_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_HOW_TO_READ = (
    "A margin is the control's loss less the arm's, in units of the larger of their two standard deviations over "
    "seeds. With three seeds such a deviation is itself off by half: a margin below 2 is weak evidence. FLOPs are "
    "counted, those of a teacher included; GFLOP by density is what hardware that passes over zeros would need. "
    "Gradients are those of the trained parameters, in float32: what a replica sends in a step. For 8 and 64 replicas "
    "there is the time to the run's lowest loss on one replica over that on so many, as `dptrain plan` predicts it "
    'from the run; "not planned" where it refuses, because the noise scale is not resolved or the data set is too '
    "small. The critical batch is the largest with a held-out loss at most 0.01 nats above that of the run's own "
    "batch, a quarter of the run's samples after its middle, seed by seed; it is known to a factor of two at best, and "
    '"too short" says that a quarter of the run is less than a step of eight times the batch. The '
    "all-reduce is assumed to take no time, for one replica has none. Other work ran on the machine, so "
    "seconds say little."
)


def with_earlier(findings: harness.Findings, files: Iterable[Path]) -> harness.Findings:
    """Return findings with the rows and figures of earlier results of the same command before their own.

    Of an arm that is in several, and of a figure, the last one counts: this run's, then that of the last file. A row of
    branches stands in the row of its arm.
    """
    rows: dict[tuple[Any, Any], dict[str, Any]] = {}
    figures: dict[str, float] = {}
    for path in files:
        found = json.loads(path.read_text(encoding="utf-8"))
        environment = found["environment"]
        stamp = f"an earlier `{found['command']}`, dptrain {environment['dptrain']}, torch {environment['torch']}"
        figures |= found["figures"]
        for row in found["rows"]:
            rows[row["way"], row["arm"]] = {
                **dict.fromkeys(("gradients_text", "speed_up_8", "speed_up_64", "critical_text"), UNKNOWN),
                "measured": stamp,
                **row,
            }
    for row in findings.rows:
        key = row["way"], row["arm"]
        rows[key] = _with_branches(rows.get(key, {}), row) if "branches" in row else dict(row)
    return replace(findings, rows=_in_order(rows, findings.rows), figures={**figures, **findings.figures})


def _with_branches(row: Mapping[str, Any], branches: Mapping[str, Any]) -> dict[str, Any]:
    """Return the row of an arm with what branches found, and without the stamps of those before."""
    stamps = [stamp for stamp in row.get("measured", "").split("; ") if stamp and not stamp.startswith("branches ")]
    stamps += [branches["measured"]] if "measured" in branches else []
    return {**row, **branches, "measured": "; ".join(stamps)}


def _in_order(rows: Mapping[tuple[Any, Any], dict[str, Any]], new: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of a way beside one another, those of this run first and in its order."""
    ways = list(dict.fromkeys(way for way, _ in rows))
    arms = list(dict.fromkeys([*((row["way"], row["arm"]) for row in new), *rows]))
    return [rows[key] for key in sorted(arms, key=lambda key: ways.index(key[0]))]


def page(findings: harness.Findings, *, command: str, figure: str | None = None) -> str:
    """Return the result as a page.

    Args:
        findings: the rows.
        command: that measured them.
        figure: file name of the figure beside the page.
    """
    heads = list(findings.columns)
    lines = [
        "# What ways to cheaper training gain",
        "",
        f"`{command}` on {harness.environment(device='cpu')['processor']}, torch {torch.__version__}. {findings.note}",
        "",
        *([f"![Margins over controls, and noise scales]({figure})", ""] if figure else []),
        f"| {' | '.join(heads)} |",
        f"|{'---|' * len(heads)}",
        *(
            f"| {' | '.join(template.format_map(row) for template in findings.columns.values())} |"
            for row in findings.rows
        ),
        "",
        *([figures_table(findings.figures)] if findings.figures else []),
        _HOW_TO_READ,
        "",
        *_what_is_lacking(findings),
        "When each way was measured, and the digest of the package's source by which it was:",
        "",
        *(f"- {way}: {', '.join(sorted(stamps))}" for way, stamps in _stamps(findings.rows).items()),
        "",
    ]
    return "\n".join(lines)


def _what_is_lacking(findings: harness.Findings) -> list[str]:
    """Return a paragraph on what was not measured of which way; none where nothing is lacking."""
    lacking = [
        f"{head} of {', '.join(ways)}"
        for head, template in findings.columns.items()
        if (ways := dict.fromkeys(str(row["way"]) for row in findings.rows if template.format_map(row) == UNKNOWN))
    ]
    why = "[why](../../docs/what-replicas-learn.md#what-is-not-here)"
    return [f"Not measured, and {why}: {'; '.join(lacking)}.", ""] if lacking else []


def _stamps(rows: Sequence[Mapping[str, Any]]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for row in rows:
        found.setdefault(row["way"], set()).update(row["measured"].split("; "))
    return found


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw each arm's margin over its control, and its noise scale early and late where it is resolved."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    from dptrain.explain.figures.theme import BLUE, GREY, STYLE, VERMILLION

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11, 1 + 0.24 * len(rows)), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        places = range(len(rows))
        margins = [row.get("margin", 0.0) for row in rows]
        left.barh(
            places, margins, color=[BLUE if margin > 1 else VERMILLION if margin < -1 else GREY for margin in margins]
        )
        left.set_yticks(places, [f"{row['way']}: {row['arm']}" for row in rows], fontsize=7)
        left.invert_yaxis()
        left.set_xscale("symlog", linthresh=1)
        _plain_ticks(left, (-30, -10, -3, -1, 0, 1, 3, 10))
        left.axvline(0, color=GREY, linewidth=0.8)
        left.set_xlabel("loss below the control's, in standard deviations over seeds")
        left.set_title("Gain over the control")
        left.margins(y=0.01)
        for place, row in zip(places, rows, strict=True):
            early, late = (_number(row[name]) for name in ("noise_early", "noise_late"))
            if early and late:
                right.plot([early, late], [place, place], color=GREY, linewidth=0.8)
            for value, colour, marker in ((early, BLUE, "o"), (late, VERMILLION, "s")):
                if value:
                    right.plot(value, place, marker, color=colour, markersize=4)
        for colour, marker, label in ((BLUE, "o", "early"), (VERMILLION, "s", "late")):
            right.plot([], [], marker, color=colour, markersize=4, label=label)
        right.set_xscale("log")
        _plain_ticks(right, (1, 10, 100, 1000))
        right.set_xlabel("noise scale, samples")
        right.set_title("Noise scale where it is resolved")
        right.legend()
        figure.savefig(path, dpi=110)


def _plain_ticks(axes: Axes, values: Sequence[int]) -> None:
    """Set ticks with plain labels: those of powers are mathematical text, which the style takes literally."""
    axes.set_xticks(values, [str(value) for value in values])
    axes.minorticks_off()


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
