"""Reading a run's logs into columns, and the smoothing of a column."""

from __future__ import annotations

import json

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dptrain.explain.record import column, read_jsonl, read_run, smooth


def test_a_missing_or_null_figure_is_nan():
    """What a row does not hold is no zero."""
    values = column([{"a": 1}, {"a": None}, {}, {"a": 2.5}], "a")
    np.testing.assert_array_equal(values, [1.0, np.nan, np.nan, 2.5])


def test_no_file_is_no_rows(tmp_path):
    """A log that was never begun reads as empty."""
    assert read_jsonl(tmp_path / "none.jsonl") == []


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50), st.floats(1.0, 1e4))
def test_a_smoothed_line_stays_within_its_values(values, window):
    """An average lies between the smallest and the largest of what it averages."""
    values = np.array(values)
    line = smooth(np.arange(len(values)) * 16.0, values, window=window)
    assert (line >= values.min() - 1e-6).all()
    assert (line <= values.max() + 1e-6).all()


def test_smoothing_counts_samples_and_does_not_lag():
    """On a straight line over uneven steps it returns the line, away from the ends."""
    samples = np.cumsum(np.repeat([1.0, 4.0, 2.0], 100))
    line = smooth(samples, np.ones_like(samples), window=50.0)
    assert (line == 1.0).all()
    even = np.arange(200.0)
    np.testing.assert_allclose(smooth(even, 3 * even, window=20.0)[20:-20], 3 * even[20:-20])


def test_a_last_step_cut_short_is_no_move(tmp_path):
    """The end of a run makes its last step smaller; a decision that did so one step before counts as one."""
    rows = [
        {"kind": "train", "step": step, "progress/samples": 16 * step, "batch/global": size}
        for step, size in ((1, 64), (2, 64), (3, 16))
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_run(tmp_path).is_cut_short
    decision = {"step": 1, "batch/before": 64, "batch/after": 16}
    (tmp_path / "decisions.jsonl").write_text(json.dumps(decision) + "\n")
    assert not read_run(tmp_path).is_cut_short
