"""What came out of a sweep: one row per run and target, and the frontier of each target; decides nothing."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dptrain.errors import ConfigError
from dptrain.explain.model.frontier import Frontier, Point, fit_frontier
from dptrain.sweep.course import Course
from dptrain.sweep.search import Search
from dptrain.sweep.spec import SweepRun, SweepSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Clock = tuple[NDArray[np.float64], NDArray[np.float64]]


@dataclass(frozen=True, kw_only=True)
class TableRow:
    """One run and one target. All but `seconds` is the same however often the sweep was interrupted.

    Attributes:
        global_batch_size: of the run, in samples.
        learning_rate: of the run.
        seed: of the run.
        target: held-out loss.
        reached: whether the run got there.
        steps: to the target, the last one in part; None also where it was reached before the first evaluation.
        samples: to the target; None as `steps` is.
        seconds: of training to the target; None as `steps` is.
        status: "done": all targets reached, or the end of the run; "hopeless": stopped, as another run of the batch was
            so much faster; "diverged"; "unfinished".
        chosen: whether the frontier of the target is fitted to this learning rate.
    """

    global_batch_size: int
    learning_rate: float
    seed: int
    target: float
    reached: bool
    steps: float | None
    samples: float | None
    seconds: float | None
    status: str
    chosen: bool


COLUMNS = tuple(field.name for field in fields(TableRow))
"""Of the table."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came out for one target.

    Attributes:
        target: held-out loss.
        rates: batch → chosen learning rate, for each batch at which all seeds got there.
        at_edge: those batches at which no slower or no faster rate was tried beside the chosen one.
        early: those batches at which a run got there before its first evaluation, so that its steps are not known.
        frontier: None where it could not be fitted.
        sentence: the frontier in words, or why there is none.
    """

    target: float
    rates: Mapping[int, float]
    at_edge: Sequence[int]
    early: Sequence[int]
    frontier: Frontier | None
    sentence: str


def table(
    spec: SweepSpec,
    searches: Iterable[Search],
    *,
    course_of: Callable[[SweepRun], Course],
    clock_of: Callable[[SweepRun], Clock],
) -> Iterator[TableRow]:
    """Yield a row for each run that the sweep asked for and each target.

    Args:
        spec: of the sweep.
        searches: of its batches.
        course_of: how far a run came.
        clock_of: samples and seconds of a run; asked only where a target was reached.
    """
    for found in searches:
        for run in sorted(found.runs):
            course = course_of(run)
            clock = None
            for at, target in enumerate(spec.targets):
                samples = course.reached(target, up_to=found.cap)
                known = None if course.is_early(target) else samples
                if known is not None and clock is None:
                    clock = clock_of(run)
                yield TableRow(
                    global_batch_size=run.global_batch_size,
                    learning_rate=run.learning_rate,
                    seed=run.seed,
                    target=target,
                    reached=samples is not None,
                    steps=None if known is None else known / run.global_batch_size,
                    samples=known,
                    seconds=None if known is None or clock is None else _seconds(clock, known),
                    status=_status(spec, run, course, found),
                    chosen=bool(found.choices) and found.choices[at].grid_point == run.grid_point,
                )


def _seconds(clock: Clock, samples: float) -> float | None:
    positions, seconds = clock
    return float(np.interp(samples, positions, seconds)) if len(positions) else None


def _status(spec: SweepSpec, run: SweepRun, course: Course, found: Search) -> str:
    """Return how a run ended, by its samples: it may have continued for a while until it was stopped."""
    if run in found.unsettled:
        return "unfinished"
    if all(course.reached(target, up_to=found.cap) is not None for target in spec.targets):
        return "done"
    if course.is_beyond(found.cap):
        return "hopeless"
    return "diverged" if course.has_diverged else "done"


def outcomes(spec: SweepSpec, rows: Sequence[TableRow], searches: Sequence[Search]) -> Iterator[Outcome]:
    """Fit the frontier of each target to the chosen runs of a table."""
    for at, target in enumerate(spec.targets):
        chosen = [row for row in rows if row.target == target and row.chosen]
        early = sorted({row.global_batch_size for row in chosen if row.steps is None})
        settled = [(found.runs[0].global_batch_size, found.choices[at]) for found in searches if found.choices]
        frontier, sentence = _fit(row for row in chosen if row.global_batch_size not in early)
        yield Outcome(
            target=target,
            rates={
                batch: spec.run(batch, grid_point=choice.grid_point, seed=spec.seeds[0]).learning_rate
                for batch, choice in settled
                if choice.grid_point is not None
            },
            at_edge=[batch for batch, choice in settled if choice.is_at_edge],
            early=early,
            frontier=frontier,
            sentence=sentence,
        )


def _fit(rows: Iterable[TableRow]) -> tuple[Frontier | None, str]:
    points = [
        Point(global_batch_size=row.global_batch_size, steps=row.steps, seed=row.seed)
        for row in rows
        if row.steps is not None
    ]
    try:
        frontier = fit_frontier(points)
    except ConfigError as error:
        return None, str(error)
    return frontier, str(frontier)


def fits_record(found: Iterable[Outcome]) -> dict[str, Any]:
    """Return what a JSON file holds of the frontiers; an open end is null."""
    return {"targets": [_finite(asdict(outcome)) for outcome in found]}


def _finite(value: Any) -> Any:  # noqa: ANN401 - any plain data
    if isinstance(value, Mapping):
        return {str(name): _finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_csv(path: Path, rows: Iterable[TableRow]) -> None:
    """Write a table, empty where a value is missing; replaces the file in one step."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: _text(value) for name, value in asdict(row).items()} for row in rows)
    temporary.replace(path)


def _text(value: object) -> object:
    return str(value).lower() if isinstance(value, bool) else value


def write_parquet(path: Path, rows: Sequence[TableRow]) -> bool:
    """Write a table as Parquet where pyarrow is installed; return whether it is."""
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError:
        return False
    types = {"int": pa.int64(), "float": pa.float64(), "bool": pa.bool_(), "str": pa.string()}
    schema = pa.schema([(field.name, types[str(field.type).partition(" ")[0]]) for field in fields(TableRow)])
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    parquet.write_table(pa.Table.from_pylist([asdict(row) for row in rows], schema=schema), temporary)
    temporary.replace(path)
    return True
