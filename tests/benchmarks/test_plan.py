"""The benchmark of plans: what a run took, read off runs that are known; the answer, the page and the settings."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.harness import Findings
from benchmarks.plan import CASES, _fixed, _layout, _row, findings, page
from benchmarks.timed_runs import Took, took, train
from dptrain.explain.model.devices import devices
from dptrain.explain.model.planner import Planner
from tests.ideal_runs import ideal_record, step_s


def test_what_a_run_took_is_read_off_its_rows():
    """Samples on the straight line between two evaluations, seconds of the steps up to there."""
    record = ideal_record(batches=(32,), steps_each=100)
    (before, after) = record.evals[4:6]
    target = (before["eval/loss"] + after["eval/loss"]) / 2
    found = took(record, target=target)
    assert found.reached
    assert found.samples == pytest.approx((before["progress/samples"] + after["progress/samples"]) / 2)
    assert found.step_s == pytest.approx(step_s(micro=8, accumulation=2))
    assert found.seconds == pytest.approx(found.samples / 32 * found.step_s)


def test_a_step_beside_an_evaluation_counts_as_the_others():
    """Its time is not known, but it took some."""

    def untimed(rows, _evals):
        for row in rows[::10]:
            row["time/step_s"] = None

    record = ideal_record(batches=(32,), steps_each=100, edit=untimed)
    target = record.evals[-1]["eval/loss"]
    assert took(record, target=target).seconds == pytest.approx(100 * step_s(micro=8, accumulation=2))


def test_a_run_that_never_came_there_took_all_it_had():
    """And says so."""
    record = ideal_record(batches=(32,), steps_each=100)
    found = took(record, target=0.1)
    assert not found.reached
    assert found.samples == 3200


@pytest.mark.parametrize(
    ("batch", "replicas", "micro", "accumulation"), [(16, 1, 8, 2), (32, 2, 8, 2), (8, 1, 4, 2), (16, 2, 8, 1)]
)
def test_settings_are_cut_into_the_micro_batches_of_the_run(batch, replicas, micro, accumulation):
    """At least two in a step, none larger than the run had."""
    shape = _layout(CASES["digits"], ideal_record(), batch=batch, replicas=replicas)
    assert (shape.micro_batch_size, shape.accumulation_steps) == (micro, accumulation)


def test_the_rate_follows_the_root_of_the_batch():
    """From that of the task at its own batch."""
    record = ideal_record()
    planner = Planner(record, devices(record))
    at_64, at_16 = (
        _fixed(CASES["digits"], planner.at(_layout(CASES["digits"], record, batch=batch, replicas=2)))
        for batch in (64, 16)
    )
    assert float(at_64["optimizer.learning_rate"]) == 2 * float(at_16["optimizer.learning_rate"])
    assert at_64["control.law"] == "constant"


def _found(*, factor=1.0):
    """Findings of a run that follows the theory, whose settings took `factor` times what was planned."""
    begun = ideal_record()
    case = replace(CASES["digits"], target=0.9 * begun.evals[-1]["eval/loss"])
    planner = Planner(begun, devices(begun), target=case.target)
    rows = []
    for batch, replicas in case.settings:
        point = planner.at(_layout(case, begun, batch=batch, replicas=replicas))
        measured = Took(
            samples=factor * point.samples, seconds=factor * point.seconds, step_s=point.step_s, reached=True
        )
        rows.append(_row(point, measured))
    return findings(rows, case=case, begun=begun), case


def test_the_answer_is_the_median_error():
    """Of samples and of seconds together, and each by itself."""
    found, _ = _found(factor=0.8)
    assert found.figures["plan_median_error"] == pytest.approx(0.25)
    assert found.figures["step_time_median_error"] == 0
    assert found.figures["num_given_up"] == 0
    assert found.figures["further"] > 1
    assert "held" in found.note
    assert "BROKEN" in _found(factor=0.5)[0].note


def test_the_page_tells_the_answer_and_shows_every_setting():
    """Yes or no in its first sentence, a row for each setting, what was run, and what it does not show."""
    (found, case), (bad, _) = _found(factor=0.9), _found(factor=0.5)
    text = page(found, case=case)
    assert isinstance(found, Findings)
    assert "\n\nYes: the median error is 11%" in text
    assert "\n\n**No**: " in page(bad, case=case)
    for row in found.rows:
        assert f"| {row['batch']} | {row['replicas']} |" in text
    assert "## What was run" in text
    assert "## What the numbers do not show" in text


def test_a_real_run_stops_where_its_loss_is_at_the_target(tmp_path):
    """A replica of digits, asked to end as soon as an evaluation is there."""
    settings = {"task": "digits", "max_samples": "100000", "log.eval_every_samples": "200"}
    record = train(tmp_path / "run", replicas=1, settings=settings, target=9.0)
    assert took(record, target=9.0).reached
    assert record.train[-1]["progress/samples"] < 100_000
