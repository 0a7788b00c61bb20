"""The sentences about a run, on records of two or three rows whose finding is plain."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from dptrain.explain.model.run_placement import position
from dptrain.explain.record import RunRecord, read_run
from dptrain.explain.text import findings
from tests.explain.made_runs import write_run


def _record(*rows, **fields):
    base = {"batch/global": 16, "batch/micro": 8, "batch/accumulation": 1}
    train = [{"step": index, "progress/samples": 16 * index, **base, **row} for index, row in enumerate(rows, start=1)]
    return RunRecord(
        **{"name": "run", "evals": [], "decisions": [], "summary": {}, "config": {}, "train": train, **fields}
    )


def _resolved(value, lower, upper):
    return {
        "noise_scale/state": "resolved",
        "noise_scale/value": value,
        "noise_scale/lower": lower,
        "noise_scale/upper": upper,
    }


def _at_least(lower):
    return {
        "noise_scale/state": "at least",
        "noise_scale/value": None,
        "noise_scale/lower": lower,
        "noise_scale/upper": None,
    }


UNKNOWN = {
    "noise_scale/state": "not resolved yet",
    "noise_scale/value": None,
    "noise_scale/lower": 0.0,
    "noise_scale/upper": None,
}


def test_a_change_is_claimed_only_where_the_intervals_lie_apart():
    """A noise scale "grew" or "fell" between intervals that do not overlap; else the two are only put side by side."""
    low, high, wide = _resolved(40, 30, 50), _resolved(310, 240, 420), _resolved(60, 20, 300)
    grew, fell, unclear = (
        findings.about_noise_scale(_record(*rows)) for rows in ((low, high), (high, low), (low, wide))
    )
    assert grew == "The noise scale grew from 40 [30, 50] to 310 [240, 420] samples"
    assert fell == "The noise scale fell from 310 [240, 420] to 40 [30, 50] samples"
    assert unclear == "The noise scale went from 40 [30, 50] to 60 [20, 300] samples"


def test_a_lower_bound_above_the_first_interval_is_growth():
    """An interval that is open above proves growth, though never a fall."""
    assert "grew from 40 [30, 50] to at least 90" in findings.about_noise_scale(
        _record(_resolved(40, 30, 50), _at_least(90))
    )
    assert "went from 40 [30, 50] to at least 2 " in findings.about_noise_scale(
        _record(_resolved(40, 30, 50), _at_least(2))
    )


def test_the_first_resolved_value_counts_where_there_is_one():
    """Bounds from before the first estimate are not what the run started from."""
    record = _record(UNKNOWN, _at_least(3), _resolved(40, 30, 50), UNKNOWN)
    assert findings.about_noise_scale(record) == "The noise scale was 40 [30, 50] samples"
    assert findings.about_noise_scale(_record(UNKNOWN)) == "The noise scale was not resolved in this run"
    assert findings.about_noise_scale(_record({})) == "The noise scale was not measured in this run"


def test_the_noise_scale_is_reported_beside_the_loss():
    """Both are told from the first resolved moment to the end, with no claim that the intervals do not prove."""
    record = _record(
        {"train/loss": 3.0, **_at_least(3)},
        {"train/loss": 2.0, **_resolved(40, 30, 50)},
        {"train/loss": 1.0, **_resolved(90, 80, 99)},
    )
    assert findings.about_noise_against_loss(record) == (
        "The training loss fell from 2 to 1; the noise scale grew from 40 [30, 50] to 90 [80, 99] samples"
    )
    assert findings.about_noise_against_loss(_record(UNKNOWN)) == "The noise scale was not resolved in this run"


def test_moments_are_where_the_loss_first_fell_so_far(tmp_path):
    """The loss falls from moment to moment but for the end of the run, which is always among them."""
    record = read_run(write_run(tmp_path))
    losses, rows = findings.moments(record)
    assert (np.diff(losses[:-1]) < 0).all()
    assert rows[-1] is record.train[-1]
    assert 5 < len(rows) <= 21
    assert all(row["noise_scale/state"] == "resolved" for row in rows)


def test_only_decisions_that_moved_the_batch_are_moves():
    """A decision that left the batch alone is on record, but no move; nor is one that was only advised."""
    stay = {"progress/samples": 16, "batch/before": 16, "batch/after": 16}
    move = {"progress/samples": 32, "batch/before": 16, "batch/after": 32}
    rows = ({}, {"batch/global": 32})
    assert findings.about_batch(_record(*rows, decisions=[stay, move])) == "Batch size: 16 → 32 samples in 1 change"
    assert findings.about_batch(_record({}, {}, decisions=[stay])) == "Batch size: constant, 16 samples"
    advised = _record({}, {}, decisions=[{**move, "applied": False}])
    assert findings.about_batch(advised) == "Batch size: constant, 16 samples; 1 change advised, the last one to 32"


def test_a_last_step_that_the_end_cut_short_is_no_move():
    """The batch that was decided on counts, not what was left of the samples for the last step."""
    move = {"progress/samples": 32, "batch/before": 16, "batch/after": 32}
    record = _record({}, {"batch/global": 32}, {"batch/global": 10, "batch/micro": 4}, decisions=[move])
    assert findings.about_batch(record).endswith("16 → 32 samples in 1 change")
    assert findings.about_geometry(record).endswith("× 2 replicas")


def test_a_loss_without_bits_per_byte_has_no_unit_of_ours():
    """A task's loss may be anything; its other figures are named as the task named them."""
    evals = [{"eval/loss": 4.0, "eval/perplexity": 54.6}, {"eval/loss": 4.5, "eval/perplexity": 90.0}]
    text = findings.about_loss(_record({}, evals=evals))
    assert text == "Held-out loss rose from 4 to 4.5 (90.0 perplexity)"


def test_a_constant_learning_rate_stayed():
    """No change is called no change."""
    assert (
        findings.about_learning_rate(_record({"train/lr": 0.1}, {"train/lr": 0.1})) == "The learning rate stayed at 0.1"
    )
    assert findings.about_learning_rate(_record({"train/lr": 0.1}, {"train/lr": 0.2})).endswith("rose from 0.1 to 0.2")


def test_the_factor_of_the_rate_is_that_of_the_end():
    """A rule that reads the noise scale moves it at a batch that stays; older logs tell it where it cannot move."""
    move = {"progress/samples": 16, "batch/before": 16, "batch/after": 32, "lr_factor/after": 1.2}
    told = _record({"train/lr": 0.1}, {"train/lr": 0.1, "batch/lr_factor": 1.35}, decisions=[move])
    assert findings.about_learning_rate(told).endswith(" (scaling with the batch: ×1.35)")
    older = _record({"train/lr": 0.1}, {"train/lr": 0.1}, decisions=[move])
    for rule, factor in (("square_root", 1.2), ("root_gain", None), (None, None)):
        text = findings.about_learning_rate(replace(older, config={"optimizer": {"rule": rule}}))
        assert text.endswith("at 0.1" if factor is None else f" (scaling with the batch: ×{factor})")


def test_a_fixed_batch_is_no_gain_and_a_moving_one_is_reported_against_it(tmp_path):
    """A run of one batch is told what it took; one that moved, what it saved, or that there was no gain."""
    phi = [_resolved(value, value / 2, value * 2) for value in (10.0, 1000.0)]
    fixed = _record(phi[0], phi[1])
    assert findings.about_position(position(fixed), fixed).startswith("Constant batch 16: ")
    for batches, end in (
        ((70, 700), "% fewer steps and samples than a constant batch of 380"),
        ((700, 70), "% more steps and samples"),
    ):
        samples = (batches[0], sum(batches))
        rows = [
            {"step": step, "progress/samples": done, "batch/global": batch, **known}
            for step, done, batch, known in zip((1, 2), samples, batches, phi, strict=True)
        ]
        move = {"step": 1, "progress/samples": samples[0], "batch/before": batches[0], "batch/after": batches[1]}
        record = _record({}, train=rows, decisions=[move])
        assert end in findings.about_position(position(record), record)
    small = read_run(write_run(tmp_path, batches=(16, 20)))
    assert findings.about_position(position(small), small).endswith("no gain over a constant batch of 18")


def test_groups_differ_only_where_their_intervals_do(tmp_path):
    """Two groups are set against each other where the intervals lie apart, and not where they overlap."""
    apart = read_run(write_run(tmp_path / "a", groups={"embedding": 20.0, "head": 0.5}))
    text = findings.about_groups(apart)
    assert text.startswith("The noise scale goes from 1")
    assert text.index("in head") < text.index("in embedding")
    same = read_run(write_run(tmp_path / "b", groups={"embedding": 1.1, "head": 1.0}))
    assert findings.about_groups(same) == "2 groups with a noise scale; no significant difference between any two"
    never = read_run(write_run(tmp_path / "c", noise="never", groups={"head": 1.0}))
    assert findings.about_groups(never) == "The noise scale of no group was resolved"


@pytest.mark.parametrize(
    ("value", "text"), [(0.00123, "0.00123"), (1.78, "1.78"), (12345.0, "12,300"), (999.7, "1,000"), (64.0, "64")]
)
def test_a_number_has_the_digits_that_count(value, text):
    """No exponent, and no digit that means nothing."""
    assert findings.short(value) == text
