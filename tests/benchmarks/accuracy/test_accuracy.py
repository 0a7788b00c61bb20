"""The quick form of `benchmarks.accuracy`, run as its reader would run it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
LAYOUTS = {
    "1×4": {"parameters"},
    "2×2": {"parameters", "hook"},
    "4×1": {"parameters", "hook"},
    "4/12/32": {"parameters", "hook"},
}
PROBLEMS = {"coin", "quadratic", "linear", "variances", "clamping", "digits", "digits dealt"}
WRAPPERS = {
    "DDP, autocast bf16",
    "DDP, checkpointing",
    "DDP by accelerate",
    "DDP, Adam's geometry",
    "fully_shard",
    "replicate",
    "HSDP 2×2",
}
MIXED = {"quadratic", "linear", "digits"}
COPIES = 16


@pytest.fixture(scope="module")
def result():
    command = [sys.executable, "-m", "benchmarks.accuracy", "--quick", "--json", "-"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def rows(result, *, judged=True, **wanted):
    wanted["judged"] = judged
    return [row for row in result["rows"] if all(row[name] == value for name, value in wanted.items())]


def test_every_problem_is_seen_in_every_layout_and_wrapper(result):
    """In one process and DDP all problems, by each observer that works there; in each other wrapper three of them."""
    cases = [(row["wrapper"], row["problem"], row["layout"], row["observer"]) for row in rows(result)]
    assert len(set(cases)) == len(cases) == result["figures"]["num_cases"]
    plain = {
        ("one process" if layout == "1×4" else "DDP", problem, layout, observer)
        for problem in PROBLEMS
        for layout, seen in LAYOUTS.items()
        for observer in seen
    }
    assert plain <= set(cases)
    assert {case[:2] for case in set(cases) - plain} == {(name, problem) for name in WRAPPERS for problem in MIXED}
    assert result["figures"]["num_wrappers"] == len(WRAPPERS) + 2


def test_known_answers_are_recovered(result):
    """Each half of the pair is as near to the truth as chance allows, and all are within 15 %."""
    for row in rows(result):
        assert row["trace_error"] < 5 * row["trace_chance"], row
        assert row["grad_error"] < 5 * row["grad_chance"], row
    assert 0 < result["figures"]["max_relative_error"] < 0.15


def test_intervals_hold_the_truth(result):
    """Of the 95 % intervals of all cases together about that many hold φ, and no case fails as a whole."""
    coverage = [row["coverage"] for row in rows(result)]
    assert 0.9 < sum(coverage) / len(coverage) < 0.99
    assert min(coverage) == result["figures"]["min_coverage"] > 0.5
    assert max(coverage) == result["figures"]["max_coverage"]


@pytest.mark.parametrize("layout", ["4×1", "4/12/32"])
@pytest.mark.parametrize("problem", sorted(PROBLEMS))
def test_both_observers_find_the_same_without_accumulation(result, problem, layout):
    """Where a replica has one micro-batch, its gradient is the same in the hook as at the parameters."""
    (hook,) = rows(result, wrapper="DDP", problem=problem, layout=layout, observer="hook")
    (parameters,) = rows(result, wrapper="DDP", problem=problem, layout=layout, observer="parameters")
    assert hook["mean_trace"] == pytest.approx(parameters["mean_trace"], rel=1e-4)
    assert hook["mean_grad"] == pytest.approx(parameters["mean_grad"], rel=1e-4)


def test_the_scatter_of_a_step_is_the_known_one(result):
    """Four micro-batches of two scatter as problem 8 says, on any rank; the meter's own variance tells it."""
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


def test_groups_add_up_to_the_whole(result):
    """Exactly to the whole of their own meter; to that of a meter without groups as far as single precision goes."""
    assert result["figures"]["groups_sum_error"] < 1e-12
    assert 0 < result["figures"]["ungrouped_difference"] < 1e-4


@pytest.mark.parametrize("problem", sorted(MIXED))
def test_adams_geometry_has_a_truth_of_its_own(result, problem):
    """Its rows are held to other numbers than those of the plain norm."""
    (adam,) = rows(result, wrapper="DDP, Adam's geometry", problem=problem)
    (plain,) = rows(result, wrapper="fully_shard", problem=problem)
    assert adam["true_trace"] > 2 * plain["true_trace"]


def test_peers_stand_beside_ours_and_are_not_judged(result):
    """On even and on uneven shards both of our observers are there, and each peer that is installed."""
    found = rows(result, judged=False)
    ours = [row for row in found if not row["observer"].startswith("peer ")]
    assert {(row["observer"], row["layout"]) for row in ours} == {
        (observer, layout) for observer in ("parameters", "hook") for layout in ("2×1", "8/56")
    }
    for row in ours:
        assert row["trace_error"] < 0.1, row
    for row in found:
        if row["observer"].startswith("peer ") and row["layout"] == "2×1":
            assert row["trace_error"] < 0.1, row
