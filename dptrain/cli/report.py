"""`dptrain report RUN [RUN …]`."""

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
        description="Write report.html and its pictures: what batch to use and why, curves, decisions, cost.",
    )
    parser.add_argument(
        "runs",
        type=Path,
        nargs="+",
        metavar="RUN",
        help="a run folder, such as runs/pysource-20260101-120000; several are laid over each other",
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="where to write; default: into RUN, or of several beside the first"
    )
    options = parser.parse_args(arguments)
    sys.stdout.write(f"{draw_report(*options.runs, out=options.out)}\n")
    return 0
