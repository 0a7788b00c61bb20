"""Reading a run's logs into columns, of any writer, and the smoothing of a column."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dptrain.errors import ConfigError
from dptrain.explain.record import MOST_ROWS, column, plain, read_jsonl, read_run, smooth
from dptrain.explain.text import findings, tables
from dptrain.explain.text.recommendation import advise
from tests.explain.made_runs import write_rows, write_run


def row(step, *, size=16, **fields):
    return {"kind": "train", "step": step, "progress/samples": size * step, "batch/global": size, **fields}


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
    write_rows(tmp_path / "metrics.jsonl", [row(1, size=64), row(2, size=64), row(9, size=16)])
    assert read_run(tmp_path).is_cut_short
    decision = {"step": 1, "progress/samples": 64, "batch/before": 64, "batch/after": 16}
    write_rows(tmp_path / "decisions.jsonl", [decision])
    assert not read_run(tmp_path).is_cut_short
    write_rows(tmp_path / "decisions.jsonl", [{**decision, "applied": False}])
    assert read_run(tmp_path).is_cut_short


def test_advice_is_no_change(tmp_path):
    """A decision that was not applied is kept apart from those that moved the batch."""
    record = read_run(write_run(tmp_path, applied=False))
    assert record.batch_changes == []
    assert len(record.advice) == len(record.decisions) == 4


def test_what_is_of_another_type_counts_as_not_known(tmp_path):
    """A text where a number belongs, a number beyond all measure, a truth value and a list are no figures."""
    odd = {
        "train/loss": "low",
        "train/lr": 10**400,
        "noise_scale/lower": True,
        "noise_scale/upper": [1],
        "noise_scale/state": 7,
        "x": 1e300,
    }
    write_rows(tmp_path / "metrics.jsonl", [row(1, **odd)])
    (found,) = read_run(tmp_path).train
    assert [found[name] for name in odd] == [None, None, None, None, "not resolved yet", None]


def test_a_row_that_stands_nowhere_is_left_out(tmp_path):
    """A training row needs its place and its batch; the rows that have them come in the order of their samples."""
    nowhere = [{"kind": "train", "step": 1}, row(2, size=0), {**row(3), "progress/samples": None}]
    write_rows(tmp_path / "metrics.jsonl", [row(5), *nowhere, row(4)])
    assert [found["step"] for found in read_run(tmp_path).train] == [4, 5]


def test_a_state_says_no_more_than_its_figures(tmp_path):
    """A row that calls itself resolved without an upper end is a lower bound, and without a lower one nothing."""
    figures = {"noise_scale/value": 5.0, "noise_scale/lower": 2.0, "noise_scale/upper": 9.0}
    for missing, state in (
        ("train/lr", "resolved"),
        ("noise_scale/upper", "at least"),
        ("noise_scale/lower", "not resolved yet"),
    ):
        write_rows(tmp_path / "metrics.jsonl", [row(1, **{**figures, "noise_scale/state": "resolved", missing: None})])
        assert read_run(tmp_path).train[0]["noise_scale/state"] == state, missing


def test_groups_are_read_with_their_state(tmp_path):
    """Each group has its latest interval, as a row of its own; names may hold slashes."""
    record = read_run(write_run(tmp_path, groups={"encoder/layers": 2.0, "head": 0.5}))
    groups, whole = record.groups(), record.train[-1]
    assert set(groups) == {"encoder/layers", "head"}
    assert groups["head"]["noise_scale/state"] == "resolved"
    assert groups["head"]["noise_scale/value"] == pytest.approx(0.5 * whole["noise_scale/value"])


def test_a_long_log_is_read_in_part(tmp_path):
    """Of more rows than a page can show some are taken, evenly, and both of the last."""
    num_rows = 3 * MOST_ROWS + 5
    write_rows(tmp_path / "metrics.jsonl", [row(step) for step in range(1, num_rows + 1)])
    steps = [found["step"] for found in read_run(tmp_path).train]
    assert MOST_ROWS <= len(steps) < MOST_ROWS + 5
    assert (steps[0], steps[-2:]) == (1, [num_rows - 1, num_rows])
    assert max(np.diff(steps)) == 3


def test_a_text_is_short_and_printable():
    """No character of it steers a terminal or ends a file's encoding, and it fits on a page."""
    assert plain("a\x1b[31m\ud800\n\u202e") == "a�[31m���"
    assert len(plain("x" * 10**6)) < 600


def test_settings_are_plain_values_by_dotted_name(tmp_path):
    """A setting is found in its section; a section, a list and what is missing are none."""
    record = read_run(write_run(tmp_path, control={"law": "noise", "schedule": [1, 2]}))
    names = ("control.law", "noise.level", "control", "control.schedule", "control.law.x", "nothing")
    assert [record.setting(name) for name in names] == ["noise", 0.95, None, None, None, None]


def test_a_figure_of_the_summary_goes_before_the_last_logged_one(tmp_path):
    """The summary is later than the last row; before the end there are rows alone."""
    record = read_run(write_run(tmp_path))
    assert record.last("progress/wall_s", in_summary="wall_s") == 212.4
    assert record.last("progress/wall_s") == record.train[-1]["progress/wall_s"]
    assert record.last("ledger/flops", in_summary="flops") is None


KEYS = [
    *("kind", "step", "progress/samples", "progress/wall_s", "train/loss", "train/lr", "train/steps_dropped"),
    *("batch/global", "batch/micro", "batch/accumulation", "batch/before", "batch/after", "applied", "reason"),
    *(
        "noise_scale/state",
        "noise_scale/value",
        "noise_scale/lower",
        "noise_scale/upper",
        "noise_scale/x/value",
        "noise_scale/x/lower",
        "noise_scale/effective_steps",
    ),
    *("eval/loss", "eval/bits_per_byte", "lr_factor/before", "lr_factor/after", "throughput/samples_per_sec"),
    *("ledger/flops", "ledger/device_s", "world_size", "samples_seen", "task", "wall_s", "mfu", "time/world_size"),
]
VALUES = st.one_of(
    st.sampled_from(["train", "eval", "resolved", "at least", "<b>", None, True, [], {}, 10**400]),
    st.integers(-3, 99),
    st.floats(),
)
ROWS = st.lists(st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=len(KEYS)), max_size=6)
PLACED = st.builds(
    lambda place, more: {**row(place), **more}, st.integers(1, 9), st.dictionaries(st.sampled_from(KEYS[4:]), VALUES)
)


@settings(max_examples=40)
@given(st.lists(PLACED, min_size=1, max_size=5), ROWS, ROWS)
def test_whatever_a_folder_holds_there_is_a_report_or_one_sentence(train, more, decisions):
    """Rows of any content give findings, advice and tables, or one error that is meant for the user."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder / "metrics.jsonl", [*train, *more])
        write_rows(folder / "decisions.jsonl", decisions)
        (folder / "summary.json").write_text(json.dumps((more or [{}])[0]))
        (folder / "config.yaml").write_text("task: [a, b]\nnoise: 3\noptimizer: {name: {}}\n")
        try:
            record = read_run(folder)
        except ConfigError:
            return
    assert advise(record)
    assert tables.costs(record).rows
    assert tables.comparison([record, record]).rows
    assert tables.decisions([record])
    for about in (findings.about_run, findings.about_noise_against_loss, findings.about_groups, findings.about_loss):
        assert about(record)
