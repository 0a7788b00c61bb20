"""`dptrain report`: report.html and figures of one run, or of several compared."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dptrain.explain import draw_report


def report(arguments: Sequence[str]) -> int:
    """Write the report of one run, or of several laid over each other, and print where its page is."""
    parser = argparse.ArgumentParser(
        prog="dptrain report",
        description="Write report.html and its figures: recommended batch size, curves, decisions, cost.",
    )
    parser.add_argument(
        "runs",
        type=Path,
        nargs="+",
        metavar="RUN",
        help="run folder, such as runs/pysource-20260101-120000; several are compared",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="output folder (default: RUN, or for several runs the folder above the first)",
    )
    options = parser.parse_args(arguments)
    sys.stdout.write(f"{draw_report(*options.runs, out=options.out)}\n")
    return 0
