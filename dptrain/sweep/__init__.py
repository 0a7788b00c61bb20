"""Many runs side by side: which are still needed, the processes that train them, and the table that comes out."""

from dptrain.sweep.course import Course, CourseLog, read_clock, read_course
from dptrain.sweep.forecast import samples_left
from dptrain.sweep.search import CourseOf, Search, search
from dptrain.sweep.spec import SweepRun, SweepSpec
from dptrain.sweep.table import (
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
    "Course",
    "CourseLog",
    "CourseOf",
    "Outcome",
    "Search",
    "SweepRun",
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
