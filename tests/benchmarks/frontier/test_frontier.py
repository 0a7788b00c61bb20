"""The quick form of `benchmarks.frontier`: its figures, and that they come from its rows."""

from __future__ import annotations

import pytest

from benchmarks.frontier.__main__ import LARGEST_ERROR, TRUTH, measure


@pytest.fixture(scope="module")
def findings():
    return measure(quick=True)


def rows(findings, problem):
    return [row for row in findings.rows if row["problem"].startswith(problem)]


def test_known_frontiers_are_recovered(findings):
    """Three figures of each of ten problems, none off by more than a small part of the bound."""
    known = [*rows(findings, "5"), *rows(findings, "6")]
    assert len(known) == findings.figures["num_known"] == 3 * 10
    assert max(row["error"] for row in known) == findings.figures["fit_error_max"] < LARGEST_ERROR / 5
    assert {row["said"] for row in known} == {"hyperbola"}


def test_what_is_no_hyperbola_is_reported_so(findings):
    """Ten sweeps of the greedy rate, and none is fitted."""
    greedy = rows(findings, "4")
    assert len(greedy) == 10
    assert all(row["said"].startswith("not a hyperbola") for row in greedy)
    assert findings.figures["greedy_fitted"] == 0


def test_the_noisy_quadratic_shows_its_misfit(findings):
    """The rows say S_min, B_crit and how far the points are from the curve."""
    noisy = rows(findings, "10")
    assert [row["figure"] for row in noisy] == ["S_min", "B_crit"]
    assert all("6.7% rms" in row["said"] for row in noisy)


def test_intervals_hold_the_truth(findings):
    """Forty sweeps of each kind are few, but no kind fails, and all together hold it about as often as they say."""
    covered = rows(findings, "synthetic")
    assert {row["figure"] for row in covered} == set(TRUTH)
    coverage = [row["coverage"] for row in covered]
    assert min(coverage) == findings.figures["fit_coverage"] > 0.8
    assert 0.92 < sum(coverage) / len(coverage) < 0.99
