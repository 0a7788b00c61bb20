"""The quick form of `benchmarks.accuracy`, run as its reader would run it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAYOUTS = {
    "1×4": {"parameters"},
    "2×2": {"parameters", "hook"},
    "4×1": {"parameters", "hook"},
    "4/12/32": {"parameters", "hook"},
}
PROBLEMS = {"coin", "quadratic", "linear", "variances", "clamping", "digits", "digits dealt"}
COPIES = 16

pytestmark = pytest.mark.timeout(600)  # some seconds of work, but of ten processes in turn


@pytest.fixture(scope="module")
def result():
    command = [sys.executable, "-m", "benchmarks.accuracy", "--quick", "--json", "-"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def rows(result, **wanted):
    return [row for row in result["rows"] if all(row[name] == value for name, value in wanted.items())]


def test_every_problem_is_seen_in_every_layout_by_every_observer(result):
    """The cases are the product of the three, less the hook where one replica has nothing to hook into."""
    cases = [(row["problem"], row["layout"], row["observer"]) for row in result["rows"]]
    assert len(set(cases)) == len(cases) == result["figures"]["num_cases"]
    assert set(cases) == {(p, layout, o) for p in PROBLEMS for layout, seen in LAYOUTS.items() for o in seen}


def test_known_answers_are_recovered(result):
    """Each half of the pair is as near to the truth as chance allows, and all are within 15 %."""
    for row in result["rows"]:
        assert row["trace_error"] < 5 * row["trace_chance"], row
        assert row["grad_error"] < 5 * row["grad_chance"], row
    assert 0 < result["figures"]["max_relative_error"] < 0.15


def test_intervals_hold_the_truth(result):
    """Of the 95 % intervals of all cases together about that many hold φ, and no case fails as a whole."""
    coverage = [row["coverage"] for row in result["rows"]]
    assert 0.9 < sum(coverage) / len(coverage) < 0.99
    assert min(coverage) == result["figures"]["min_coverage"] > 0.5
    assert max(coverage) == result["figures"]["max_coverage"]


@pytest.mark.parametrize("layout", ["4×1", "4/12/32"])
@pytest.mark.parametrize("problem", sorted(PROBLEMS))
def test_both_observers_find_the_same_without_accumulation(result, problem, layout):
    """Where a replica has one micro-batch, its gradient is the same in the hook as at the parameters."""
    (hook,) = rows(result, problem=problem, layout=layout, observer="hook")
    (parameters,) = rows(result, problem=problem, layout=layout, observer="parameters")
    assert hook["mean_trace"] == pytest.approx(parameters["mean_trace"], rel=1e-4)
    assert hook["mean_grad"] == pytest.approx(parameters["mean_grad"], rel=1e-4)


def test_the_scatter_of_a_step_is_the_known_one(result):
    """Four micro-batches of two scatter as problem 8 says, whoever holds them; the meter's own variance tells it."""
    found = [rows(result, problem="variances", layout=at, observer="parameters")[0] for at in ("1×4", "2×2", "4×1")]

    def mean(name):
        return sum(row[name] for row in found) / len(found)

    assert mean("step_var_trace") == pytest.approx(67.5 * COPIES, rel=0.35)
    assert mean("step_var_grad") == pytest.approx(6.24375 * COPIES, rel=0.35)
    assert mean("step_cov") == pytest.approx(-8.4375 * COPIES, rel=0.6)


def test_single_steps_of_the_clamping_problem_are_often_negative(result):
    """The problem asks what it is there to ask: about every sixth |G|² of a step is below zero."""
    for layout in ("1×4", "2×2", "4×1"):
        (row,) = rows(result, problem="clamping", layout=layout, observer="parameters")
        assert 0.1 < row["negative"] < 0.25
