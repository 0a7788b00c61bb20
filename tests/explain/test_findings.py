"""The sentences about a run, on records of two or three rows whose finding is plain."""

from __future__ import annotations

import numpy as np

from dptrain.explain import findings
from dptrain.explain.record import RunRecord


def _record(*rows, **fields):
    base = {"batch/global": 16, "batch/micro": 8, "batch/accumulation": 1}
    train = [{"progress/samples": 16 * index, **base, **row} for index, row in enumerate(rows, start=1)]
    return RunRecord(
        **{"name": "run", "evals": [], "decisions": [], "summary": {}, "config": {}, "train": train, **fields}
    )


def _resolved(value, lower, upper):
    return {"gns/state": "resolved", "gns/b_simple": value, "gns/lower": lower, "gns/upper": upper}


def _at_least(lower):
    return {"gns/state": "at least", "gns/b_simple": None, "gns/lower": lower, "gns/upper": None}


UNKNOWN = {"gns/state": "not resolved yet", "gns/b_simple": None, "gns/lower": 0.0, "gns/upper": None}


def test_a_change_is_claimed_only_where_the_intervals_lie_apart():
    """A noise scale "grew" or "fell" between intervals that do not overlap; else the two are only put side by side."""
    low, high, wide = _resolved(40, 30, 50), _resolved(310, 240, 420), _resolved(60, 20, 300)
    grew, fell, unclear = (
        findings.about_noise_scale(_record(*rows)) for rows in ((low, high), (high, low), (low, wide))
    )
    assert grew == "The noise scale grew from 40 (30–50) to 310 (240–420) samples"
    assert fell == "The noise scale fell from 310 (240–420) to 40 (30–50) samples"
    assert unclear == "The noise scale went from 40 (30–50) to 60 (20–300) samples"


def test_a_lower_bound_above_the_first_interval_is_growth():
    """An interval that is open above proves growth, though never a fall."""
    assert "grew from 40 (30–50) to at least 90" in findings.about_noise_scale(
        _record(_resolved(40, 30, 50), _at_least(90))
    )
    assert "went from 40 (30–50) to at least 2 " in findings.about_noise_scale(
        _record(_resolved(40, 30, 50), _at_least(2))
    )


def test_the_first_resolved_value_counts_where_there_is_one():
    """Bounds from before the first estimate are not what the run started from."""
    record = _record(UNKNOWN, _at_least(3), _resolved(40, 30, 50), UNKNOWN)
    assert findings.about_noise_scale(record) == "The noise scale was 40 (30–50) samples"
    assert findings.about_noise_scale(_record(UNKNOWN)) == "The noise scale was not resolved in this run"
    assert findings.about_noise_scale(_record({})) == "The noise scale was not measured in this run"


def test_only_decisions_that_moved_the_batch_are_moves():
    """A decision that left the batch alone is on record, but no move."""
    stay = {"progress/samples": 16, "batch/before": 16, "batch/after": 16}
    move = {"progress/samples": 32, "batch/before": 16, "batch/after": 32}
    rows = ({}, {"batch/global": 32})
    assert findings.about_batch(_record(*rows, decisions=[stay, move])) == "The batch moved once, from 16 to 32 samples"
    assert findings.about_batch(_record({}, {}, decisions=[stay])) == "The global batch stayed at 16 samples"


def test_a_last_step_that_the_end_cut_short_is_no_move():
    """The batch that was decided on counts, not what was left of the samples for the last step."""
    move = {"progress/samples": 32, "batch/before": 16, "batch/after": 32}
    record = _record({}, {"batch/global": 32}, {"batch/global": 10, "batch/micro": 4}, decisions=[move])
    assert findings.about_batch(record).endswith("from 16 to 32 samples")
    assert findings.about_geometry(record).endswith("× 2 replicas")


def test_a_loss_without_bits_per_byte_has_no_unit_of_ours():
    """A task's loss may be anything; its other figures are named as the task named them."""
    evals = [{"eval/loss": 4.0, "eval/perplexity": 54.6}, {"eval/loss": 4.5, "eval/perplexity": 90.0}]
    text = findings.about_loss(_record({}, evals=evals), smoothed=np.array([4.0]))
    assert text == "Held-out loss rose from 4 to 4.5 (90.0 perplexity)"


def test_a_constant_learning_rate_stayed():
    """No change is called no change."""
    assert (
        findings.about_learning_rate(_record({"train/lr": 0.1}, {"train/lr": 0.1})) == "The learning rate stayed at 0.1"
    )
    assert findings.about_learning_rate(_record({"train/lr": 0.1}, {"train/lr": 0.2})).endswith("rose from 0.1 to 0.2")
