"""What the estimate of the present costs: processor time of a step and of a reading, and bytes of its record."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from typing import Any

from benchmarks.tracking.drift_courses import COURSES, Setting, simulated
from dptrain.noise import Moments, MomentSums, PresentState, Smoothing, present_moments, present_updated

_BLOCK = 25
"""Steps timed together: asking for the processor time of a thread takes about a microsecond by itself."""


def cost_rows(setting: Setting, *, num_rounds: int, seed: int) -> list[dict[str, Any]]:
    """Return the cost of the estimate on each course: medians over blocks of steps, the record's bytes at the end.

    It is processor time of this thread, so that others who use the processor only disturb its caches.
    """
    return [_cost(course, setting, num_rounds=num_rounds, seed=seed) for course in COURSES]


def _cost(course: str, setting: Setting, *, num_rounds: int, seed: int) -> dict[str, Any]:
    runs = simulated(course, setting, num_runs=num_rounds, seed=seed)
    smoothing, present = Smoothing(), PresentState()
    steps_s: list[float] = []
    window_s: list[float] = []
    reads_s: list[float] = []
    record_bytes: list[int] = []
    for run in range(num_rounds):
        moments = [runs.moments(step, run) for step in range(setting.num_steps)]
        present, times = _timed(present_updated, PresentState(), moments)
        steps_s += times
        window_s += _timed(smoothing.update, MomentSums(), moments)[1]
        begun_s = time.thread_time()
        for _ in range(_BLOCK):
            present_moments(present)
        reads_s.append((time.thread_time() - begun_s) / _BLOCK)
        record_bytes.append(len(json.dumps(present.to_json())))
    return {
        "kind": "cost",
        "course": course,
        "step": setting.num_steps,
        "step_s": statistics.median(steps_s),
        "window_step_s": statistics.median(window_s),
        "read_s": statistics.median(reads_s),
        "record_bytes": max(record_bytes),
    }


def _timed(update: Callable[[Any, Moments], Any], state: Any, moments: list[Moments]) -> tuple[Any, list[float]]:  # noqa: ANN401 - either state
    """Return the state after all steps, and the seconds of one in each full block of them."""
    found = []
    for start in range(0, len(moments) - _BLOCK + 1, _BLOCK):
        begun_s = time.thread_time()
        for pair in moments[start : start + _BLOCK]:
            state = update(state, pair)
        found.append((time.thread_time() - begun_s) / _BLOCK)
    return state, found
