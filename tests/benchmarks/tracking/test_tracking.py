"""Proves that the benchmark of drift simulates what it says and judges what it should."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.tracking import __main__ as tracking
from benchmarks.tracking.drift_candidates import CANDIDATES, window_lengths
from benchmarks.tracking.drift_courses import COURSES, JUMP, Setting, simulated
from benchmarks.tracking.filter_cost import cost_rows

SETTING = Setting(num_steps=200, num_small=4, directions=100, ratio=0.25)


@pytest.mark.parametrize("course", COURSES)
def test_the_pairs_scatter_about_their_course(course):
    """Over 200 runs the means of tr(Σ) and |G|² at the last step are the course's, within four standard errors."""
    runs = simulated(course, SETTING, num_runs=200, seed=1)
    for drawn, true in ((runs.trace[-1], runs.true_trace[-1]), (runs.grad[-1], runs.true_grad[-1])):
        assert drawn.mean() == pytest.approx(true, abs=4 * drawn.std() / 200**0.5)


def test_the_truth_is_the_mean_over_the_last_twenty_steps():
    """Before the jump φ is 100, after it 1,000; ten steps after it the two halves of the present make 182."""
    runs = simulated(JUMP, SETTING, num_runs=1, seed=2)
    assert [runs.truth(step) for step in (180, 200)] == pytest.approx([100, 1000])
    assert runs.truth(190) == pytest.approx(100 / np.mean([1.0] * 10 + [0.1] * 10))


def test_every_candidate_reads_a_constant_course_right():
    """Without drift each one's estimate is within 30 % of the truth."""
    runs = simulated("constant", SETTING, num_runs=1, seed=3)
    for name, candidate in CANDIDATES.items():
        scale = candidate(runs, 0, 200)
        assert scale.noise_trace / scale.grad_sq_norm == pytest.approx(100, rel=0.3), name


def test_windows_go_from_the_present_to_the_whole_run():
    """The first is 20 steps, the last all of them."""
    assert (window_lengths(200)[0], window_lengths(200)[-1], window_lengths(10)) == (20, 200, [10])


def test_coverage_is_pooled_over_a_course():
    """Each row counts with its runs."""
    rows = [
        {"course": "a", "coverage": 1.0, "num_runs": 100},
        {"course": "a", "coverage": 0.9, "num_runs": 300},
        {"course": "b", "coverage": 0.95, "num_runs": 50},
    ]
    assert tracking._pooled(rows) == pytest.approx({"a": 0.925, "b": 0.95})


def test_the_parts_of_an_earlier_result_stand_beside_what_is_measured():
    """Rows of the parts that are not measured are taken over as they are, and the figures are made from all."""
    row = {"kind": "training", "course": "a", "step": 1, "truth": 1.0, "candidate": "dptrain", "median": 1.0}
    earlier = [{**row, "inside": 1.0, "inside_of_five": 0.0}, {"kind": "cost", "course": "b"}]
    found = tracking.measure(quick=True, parts=["cost"], earlier=earlier)
    assert [row["course"] for row in found.rows] == ["a", *COURSES]
    assert found.figures["exact_inside"] == 1
    assert 0 < found.figures["window_step_s"] < found.figures["present_step_s"]


def test_the_record_of_the_present_is_below_1900_bytes():
    """On no course are it and its digits longer, and the bytes are those of its JSON."""
    rows = cost_rows(Setting(num_steps=30, num_small=4, directions=100, ratio=0.25), num_rounds=1, seed=4)
    assert all(1200 < row["record_bytes"] < 1900 for row in rows)
