"""The benchmark of plans: what a run took, read off runs that are known; the answer, the page and the settings."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest

from benchmarks.harness import Findings
from benchmarks.plan.__main__ import (
    CASES,
    NUM_DEFAULT_TARGETS,
    Runs,
    _fixed,
    _layout,
    constant_holds,
    default_holds,
    default_targets,
    findings,
    first_part,
    page,
)
from benchmarks.plan.timed_runs import took, train
from dptrain.explain.model.hardware.devices import devices
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
    at_64, at_16 = (
        _fixed(CASES["digits"], _layout(CASES["digits"], record, batch=batch, replicas=2)) for batch in (64, 16)
    )
    assert float(at_64["optimizer.learning_rate"]) == 2 * float(at_16["optimizer.learning_rate"])
    assert at_64["control.law"] == "constant"


def _took_what_was_planned(case, begun, *, factor):
    """Runs of the settings that took `factor` times the samples planned at each target."""
    settled = {}
    for batch, replicas in case.settings:
        evals, rows = [], []
        for number, target in enumerate(case.targets, start=1):
            point = Planner(begun, devices(begun), target=target).at(
                _layout(case, begun, batch=batch, replicas=replicas)
            )
            samples = factor * point.samples
            evals.append({"kind": "eval", "step": number, "progress/samples": samples, "eval/loss": target})
            rows.append({"progress/samples": samples, "batch/global": batch, "step": number, "time/step_s": 1.0})
        settled[batch, replicas] = replace(begun, train=rows, evals=evals)
    return settled


@cache
def _found(*, factor=1.0):
    """Findings of a run that follows the theory, whose settings took `factor` times what was planned."""
    begun = ideal_record()
    lowest = begun.evals[-1]["eval/loss"]
    case = replace(CASES["digits"], targets=(0.95 * lowest, 0.9 * lowest))
    whole = replace(begun, config={"optimizer": {"schedule": "cosine"}})
    runs = Runs(begun=begun, whole=whole, settled=_took_what_was_planned(case, begun, factor=factor))
    return findings(case=case, runs=runs), case


def test_the_answer_is_how_often_the_samples_were_inside():
    """And the median error of samples, which took 1.25 times what was planned."""
    found, far = _found()[0].figures, _found(factor=3.0)[0].figures
    assert found["samples_inside"] == found["num_predictions"] == 8
    assert far["samples_inside"] == 0
    assert _found(factor=1.25)[0].figures["samples_median_error"] == pytest.approx(0.2)
    assert found["num_given_up"] == 0
    assert constant_holds(found)
    assert not constant_holds(far)


def test_a_plan_from_the_default_schedule_is_refused_at_every_target():
    """Its learning rate falls, which no curve of the first fifth foresees; one with a constant rate is planned."""
    record = ideal_record()
    falling = replace(record, config={"optimizer": {"schedule": "cosine"}})
    assert default_targets(falling) == ["refused"] * NUM_DEFAULT_TARGETS
    assert "refused" not in default_targets(record)
    assert default_holds(_found()[0].figures)


def test_the_first_part_of_a_run_knows_nothing_of_the_rest():
    """Neither rows nor figures."""
    record = ideal_record()
    part = first_part(record, samples=5000)
    assert max(row["progress/samples"] for row in [*part.train, *part.evals]) <= 5000
    assert set(part.summary) <= {"task", "device", "world_size"}


def test_the_page_tells_the_answers_and_shows_every_prediction():
    """Yes or no for both schedules, a row for each prediction, what was run, and what it does not show."""
    (found, case), (bad, _) = _found(), _found(factor=3.0)
    text = page(found, case=case)
    assert isinstance(found, Findings)
    assert "\n\nRefused for the default schedule" in text
    assert "10 were refused with the reason, 0 were inside, and 0 outside" in text
    assert "\n\nYes for a constant rate" in text
    assert "\n\n**No** for a constant rate" in page(bad, case=case)
    for row in found.rows:
        assert f"| {row['target']:g} | {row['batch']} | {row['replicas']} |" in text
    assert "## What was run" in text
    assert "## What the numbers do not show" in text


def test_a_real_run_stops_where_its_loss_is_at_the_target(tmp_path):
    """A replica of digits, asked to end as soon as an evaluation is there."""
    settings = {"task": "digits", "max_samples": "100000", "log.eval_every_samples": "200"}
    record = train(tmp_path / "run", replicas=1, settings=settings, target=9.0)
    assert took(record, target=9.0).reached
    assert record.train[-1]["progress/samples"] < 100_000
