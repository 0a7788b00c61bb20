"""What batch to use: never more than a run knows, and never without what makes it doubtful."""

from __future__ import annotations

import re

import pytest

from dptrain.explain.record import read_run
from dptrain.explain.text.recommendation import CAUTION, advise
from tests.explain.made_runs import write_run


def _advice(folder, **made):
    return advise(read_run(write_run(folder, **made)))


def test_a_resolved_run_names_a_batch_and_why(tmp_path):
    """A power of two nearest to the averaged noise scale, its interval, the geometry, and what the optimizer is."""
    answer, why, moved, caution = _advice(tmp_path)
    assert answer == "Recommended constant global batch for a run like this one: about 256 samples."
    assert re.search(r"progress of the run: 200 \[\d+, \d+\] samples \(95 % interval; ", why)
    assert "as in SGD, though the optimizer is adamw" in why
    assert "Batch: 16 → 128" in moved
    assert caution == CAUTION
    assert "factor of six" in CAUTION


@pytest.mark.parametrize("noise", ["resolves", "bound only", "never"])
def test_no_batch_is_called_optimal(tmp_path, noise):
    """Nowhere in the advice, whatever is known."""
    assert "optimal" not in " ".join(_advice(tmp_path, noise=noise))


def test_a_bound_is_no_estimate(tmp_path):
    """Where only a lower end is known, that much is not too large, and more is not said."""
    answer, why, _ = _advice(tmp_path, noise="bound only")
    assert answer == "A global batch of 240 samples is not too large."
    assert "at least 240 samples (95 % interval" in why


def test_where_nothing_is_known_no_batch_is_named(tmp_path):
    """It says that, and what to do; not measured differs from not resolved."""
    unresolved = _advice(tmp_path / "a", noise="never")
    assert unresolved[0] == "No recommendation from this run."
    assert "was not resolved in this run: train longer" in unresolved[1]
    unmeasured = _advice(tmp_path / "b", edit=lambda rows: [row.pop("noise_scale/state") for row in rows])
    assert "was not measured in this run" in unmeasured[1]


def test_no_gain_is_said(tmp_path):
    """A run whose moves saved nothing against a fixed batch says so."""
    moved = _advice(tmp_path, batches=(64, 72))[2]
    assert "no gain over a constant batch of 68" in moved


def test_a_law_that_weighs_the_clock_is_named(tmp_path):
    """The goodput law does not aim at steps and samples alone; a fixed batch has no law to name."""
    assert "by progress per second on this hardware" in _advice(tmp_path / "a", control={"law": "goodput"})[2]
    fixed = _advice(tmp_path / "b", batches=(64,))[2]
    assert "gain over the best constant batch: upper bound for any adaptive batch" in fixed


def test_a_noise_scale_that_came_late_speaks_for_the_rest(tmp_path):
    """Resolved for a part of the run only, it is the advice for what follows."""
    late = _advice(tmp_path, edit=lambda rows: [row.update({"noise_scale/upper": None}) for row in rows[:280]])
    assert late[0].startswith("Recommended global batch from here on: about 256 samples")
