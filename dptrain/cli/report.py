"""`dptrain report RUN`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dptrain.explain import draw_report


def report(arguments: Sequence[str]) -> int:
    """Draw the report of a run folder and print where it is."""
    parser = argparse.ArgumentParser(prog="dptrain report", description="Draw report.png of a run folder.")
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder, such as runs/pysource-20260101-120000")
    sys.stdout.write(f"{draw_report(parser.parse_args(arguments).run)}\n")
    return 0
