"""A sweep of batches and learning rates: what is still to be trained, and what came out; nothing is started here."""

from dptrain.explain.sweep.course import Course, CourseLog, read_clock, read_course
from dptrain.explain.sweep.forecast import samples_left
from dptrain.explain.sweep.search import CourseOf, Search, search
from dptrain.explain.sweep.spec import Arm, SweepSpec
from dptrain.explain.sweep.table import (
    COLUMNS,
    Outcome,
    TableRow,
    fits_record,
    outcomes,
    table,
    write_csv,
    write_parquet,
)

__all__ = [
    "COLUMNS",
    "Arm",
    "Course",
    "CourseLog",
    "CourseOf",
    "Outcome",
    "Search",
    "SweepSpec",
    "TableRow",
    "fits_record",
    "outcomes",
    "read_clock",
    "read_course",
    "samples_left",
    "search",
    "table",
    "write_csv",
    "write_parquet",
]
