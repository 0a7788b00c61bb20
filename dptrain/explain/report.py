"""The report of one run or several: report.html and its figures as PNG."""

from __future__ import annotations

import io
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from dptrain.errors import ConfigError
from dptrain.explain.figures.figure import MOST_RUNS, RunFigure, label, legend_entries
from dptrain.explain.figures.overlay import overlays
from dptrain.explain.figures.run_figures import figures
from dptrain.explain.figures.theme import SOFT, STYLE
from dptrain.explain.record import SMOOTHING_SHARE, RunRecord, read_run
from dptrain.explain.text import findings, tables
from dptrain.explain.text.page import Answer, Figures, Table, html
from dptrain.explain.text.recommendation import CAUTION, advise

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.figure import Figure

_DPI = 200
_LETTERS_WIDE = 96
_FACTS_WIDE = 105  # letters of the first line, which is smaller and not bold
_FOOT = (
    f"{findings.CAVEAT} Made by dptrain report from the logs of the run. The page is self-contained and loads nothing."
)


def draw_report(*run_dirs: Path, out: Path | None = None) -> Path:
    """Write the report of a run, or of several laid over each other, from their logs alone; return its page.

    `report.html` is the page, `report.png` the curves over samples in one picture, 1800 pixels wide and made to be
    shown at half of that, and each further figure is a picture `report-NAME.png`. Earlier ones are replaced. A run that
    is still going or was killed is drawn as far as it came.

    Args:
        run_dirs: run folders, at least one.
        out: where to write, made if need be; None for the run's folder, or, of several, the one that the first lies in.

    Raises:
        ConfigError: where a folder is no run folder, has no logged step yet or a damaged log, or takes no files.
    """
    if not 1 <= len(run_dirs) <= MOST_RUNS:
        raise ConfigError(f"a report compares 1 to {MOST_RUNS} runs, got {len(run_dirs)}")
    records = _named([read_run(path) for path in run_dirs], run_dirs)
    several = len(records) > 1
    folder = out or (run_dirs[0].resolve().parent if several else run_dirs[0])
    drawn = overlays(records) if several else figures(records[0])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / "report.html", _page(records, drawn).encode())
        _write(folder / "report.png", _png(_stacked(records, drawn)))
        for figure in drawn:
            _write_picture(figure, folder)
    except OSError as error:
        raise ConfigError(
            f"cannot write the report to {folder}: {error.strerror or error}; give another --out"
        ) from error
    return folder / "report.html"


def _page(records: Sequence[RunRecord], drawn: Sequence[RunFigure]) -> str:
    several = len(records) > 1
    return html(
        title=", ".join(record.name for record in records),
        facts=f"{len(records)} runs compared" if several else findings.about_run(records[0]),
        blocks=_several(records, drawn) if several else _alone(records[0], drawn),
        foot=_FOOT,
    )


def _named(records: Sequence[RunRecord], run_dirs: Sequence[Path]) -> list[RunRecord]:
    """Name runs whose folders are called alike by more of their paths."""
    names = [record.name for record in records]
    return [
        replace(record, name=f"{path.resolve().parent.name}/{record.name}") if names.count(record.name) > 1 else record
        for record, path in zip(records, run_dirs, strict=True)
    ]


def _alone(record: RunRecord, drawn: Sequence[RunFigure]) -> list[Answer | Figures | Table]:
    return [
        Answer(title="Recommended batch size", sentences=advise(record)),
        Figures(figures=drawn),
        tables.decisions([record]),
        *([found] if (found := tables.experts(record)) is not None else []),
        tables.costs(record),
        tables.settings(record),
    ]


def _several(records: Sequence[RunRecord], drawn: Sequence[RunFigure]) -> list[Answer | Figures | Table]:
    return [
        tables.comparison(records),
        Figures(figures=drawn),
        *(
            Answer(
                title=f"Recommended batch size, from {label(index, record)}",
                sentences=[text for text in advise(record) if text != CAUTION],  # the page's last line is enough of it
            )
            for index, record in enumerate(records)
        ),
        tables.decisions(records),
    ]


def _stacked(records: Sequence[RunRecord], drawn: Sequence[RunFigure]) -> Figure:
    """Draw the curves over samples above each other, on one axis."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    stack = [part for part in drawn if part.legend is not None and part.draw is not None]
    with rc_context({**STYLE, "font.size": 9.5}):
        heights = [part.height_in for part in stack]
        figure = Figure(figsize=(9, 0.9 * sum(heights)), layout="constrained")
        axes = figure.subplots(len(stack), 1, sharex=True, height_ratios=heights, squeeze=False)[:, 0]
        for part, ax in zip(stack, axes, strict=True):
            assert part.draw is not None
            part.draw(ax)
            ax.set_title(textwrap.fill(part.title, _LETTERS_WIDE))
            ax.label_outer()
            if part.legend and (entries := legend_entries(ax)):
                ax.legend(entries.values(), entries.keys(), **part.legend)
        figure.align_ylabels(axes)
        facts = " · ".join(label(index, record) for index, record in enumerate(records))
        about = findings.about_run(records[0]) if len(records) == 1 else facts
        figure.suptitle(textwrap.fill(about, _FACTS_WIDE), x=0.01, ha="left", fontsize=10.5, color=SOFT)
        figure.supxlabel(_caption(records), x=0.01, ha="left", fontsize=8.5, color=SOFT)
    return figure


def _caption(records: Sequence[RunRecord]) -> str:
    smoothing = f"Smoothed lines: mean over {SMOOTHING_SHARE:.0%} of the run's samples."
    if len(records) > 1:
        return f"{smoothing}\n{findings.CAVEAT}"
    geometry = findings.about_geometry(records[0])
    lines = [f"{geometry}." if geometry else "", f"{smoothing} {findings.about_averaging(records[0])}", findings.CAVEAT]
    return "\n".join(line.strip() for line in lines if line)


def _write_picture(figure: RunFigure, folder: Path) -> None:
    """Write a figure that the stacked picture does not hold; an earlier one of it does not stay where there is none."""
    path = folder / f"report-{figure.name}.png"
    if figure.draw is None:
        path.unlink(missing_ok=True)
    elif figure.legend is None:
        _write(path, _png(figure.figure(titled=True)))


def _png(figure: Figure) -> bytes:
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=_DPI)
    return picture.getvalue()


def _write(path: Path, content: bytes) -> None:
    """Put a file in place in one step: who reads sees the old or the new one, and no link is followed."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.unlink(missing_ok=True)
    with temporary.open("xb") as file:
        file.write(content)
    temporary.replace(path)
