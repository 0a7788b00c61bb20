"""What every benchmark shares: its command line, its table for people, its JSON; nothing is measured here."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import dptrain

Row = Mapping[str, str | float]

_PLAIN_WIDTH = 160
"""Columns of a table that goes to a file or a pipe, whose width nobody can ask for."""


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What a benchmark found.

    Attributes:
        figures: the answer, flat.
        rows: what the figures were made from, one per case.
        columns: what the table shows: head → template of a cell, such as "{seconds:.3g}", filled from a row.
        note: one sentence under the table that says how to take it.
    """

    figures: Mapping[str, float]
    rows: Sequence[Row]
    columns: Mapping[str, str]
    note: str


def run(measure: Callable[[bool], Findings], *, question: str | None, name: str, device: str = "cpu") -> None:
    """Run a benchmark from the command line: `python -m benchmarks.NAME [--json PATH|-] [--quick]`.

    Args:
        measure: does the work; its argument is whether the quick form was asked for.
        question: what is asked, the module's docstring.
        name: NAME.
        device: what it runs on, in words.
    """
    options = command_line(question=question, name=name).parse_args()
    tell(measure(options.quick), options, question=question, name=name, device=device)


def command_line(*, question: str | None, name: str) -> argparse.ArgumentParser:
    """Return the options that all benchmarks have, for those that have more."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=question)
    parser.add_argument("--json", metavar="PATH|-", type=_destination, help="write the result as JSON; - is stdout")
    parser.add_argument("--quick", action="store_true", help="under a minute, with wider errors")
    return parser


def tell(findings: Findings, options: argparse.Namespace, *, question: str | None, name: str, device: str) -> None:
    """Print the findings, and write them where `--json` says."""
    assert question is not None
    show(findings, question=question, console=_console(stderr=options.json == "-"))
    if options.json is None:
        return
    text = json.dumps(
        {
            "question": question,
            "command": f"python -m benchmarks.{name}" + (" --quick" if options.quick else ""),
            "environment": environment(device=device),
            "figures": findings.figures,
            "columns": findings.columns,
            "rows": findings.rows,
            "note": findings.note,
        },
        indent=1,
        allow_nan=False,
        ensure_ascii=False,
    )
    if options.json == "-":
        sys.stdout.write(text + "\n")
    else:
        Path(options.json).write_text(text + "\n", encoding="utf-8")


def _destination(text: str) -> str:
    """Refuse what cannot be written before the measurement, not after it."""
    if text != "-" and (Path(text).is_dir() or not Path(text).parent.is_dir()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a file in a folder that exists")
    return text


def _console(*, stderr: bool) -> Console:
    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(stderr=stderr, width=_PLAIN_WIDTH)


def show(findings: Findings, *, question: str, console: Console) -> None:
    """Print rows and figures for people."""
    table = Table(title=question, caption=findings.note)
    for head in findings.columns:
        table.add_column(head)
    for row in findings.rows:
        table.add_row(*(template.format_map(row) for template in findings.columns.values()))
    console.print(table)
    for figure, value in findings.figures.items():
        console.print(f"{figure:>24} {value:.4g}")


def environment(*, device: str) -> dict[str, str | int | None]:
    """Return what a figure may depend on; neither host name nor path is among it."""
    return {
        "dptrain": dptrain.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu_count": os.cpu_count(),
        "processor": _processor(),
        "device": device,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
