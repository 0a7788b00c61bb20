"""How many samples of a sweep are left: an estimate, before the best learning rates are known."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence

from dptrain.sweep.search import CourseOf, Search
from dptrain.sweep.spec import SweepRun, SweepSpec


def samples_left(spec: SweepSpec, searches: Iterable[Search], course_of: CourseOf) -> float:
    """Estimate how many samples are still to be trained on, by all runs together.

    A run is taken to end where those of its batch did that are done, a batch to need no more rates than it has asked
    for; the seeds that it still has to run are counted.

    Args:
        spec: of the sweep.
        searches: of its batches.
        course_of: how far each run came.
    """
    searches = list(searches)
    ends: dict[int, list[float]] = {}
    for run in (run for found in searches for run in found.runs if run not in found.unsettled):
        ends.setdefault(run.global_batch_size, []).append(_position(run, course_of))
    left = 0.0
    for found in searches:
        batch = found.runs[0].global_batch_size
        length = min(_usual_end(batch, ends), spec.max_samples(batch), found.cap)
        left += sum(max(0.0, length - _position(run, course_of)) for run in found.unsettled)
        if found.unsettled and all(run.seed == spec.seeds[0] for run in found.runs):
            left += length * (len(spec.seeds) - 1)
    return left


def _usual_end(batch: int, ends: Mapping[int, Sequence[float]]) -> float:
    """Return where runs of a batch end: by those of the nearest one, half-way between equal samples and equal steps."""
    if not ends:
        return math.inf
    nearest = min(ends, key=lambda known: abs(math.log(known / batch)))
    return statistics.fmean(ends[nearest]) * math.sqrt(batch / nearest)


def _position(run: SweepRun, course_of: CourseOf) -> float:
    return max(course_of(run).positions, default=0.0)
