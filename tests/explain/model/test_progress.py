"""Progress and needs of runs, on runs that follow the theory, and so have known answers at every other batch."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from dptrain.errors import ConfigError
from dptrain.explain.model.progress import HIGH, HISTORY, LOW, MEASURED, Assumption, course, loss_curve, needs
from dptrain.explain.model.run_placement import position
from tests.ideal_runs import FALL, GROWTH, branch_of, ideal_record, loss_at, steps_to

ASSUMPTIONS = [MEASURED, LOW, HIGH, *HISTORY]


@pytest.fixture
def record():
    return ideal_record()


def _needs(record, target, assumption=MEASURED):
    curve = loss_curve(record)
    return needs(course(record, curve, assumption), curve, target=target)


def test_progress_is_that_of_a_batch_without_noise():
    """Its loss is the loss at that progress, at every evaluation."""
    record = ideal_record(resolved_after=0)
    curve = loss_curve(record)
    found = course(record, curve)
    progress = np.interp(curve.samples, found.samples, found.progress)
    np.testing.assert_allclose(loss_at(progress), curve.losses, rtol=1e-6)


@pytest.mark.parametrize("batch", [4, 16, 64, 256, 4096])
@pytest.mark.parametrize("part", [0.4, 0.8])
def test_other_batches_within_the_run_are_predicted(record, batch, part):
    """Steps to a loss on the way, against a run of that batch that was stepped through."""
    curve = loss_curve(record)
    target = float(curve.losses[int(part * len(curve.losses))])
    found = _needs(record, target)
    assert found.error == 0
    assert found.samples_of_run <= part * record.train[-1]["progress/samples"] * 1.5
    assert found.implied.steps(batch) == pytest.approx(steps_to(target, batch=batch), rel=0.03)


@pytest.mark.parametrize("batch", [16, 64, 512])
def test_other_batches_beyond_the_run_are_predicted(record, batch):
    """The loss goes on along its power law, and the noise scale along its own of the loss."""
    target = 0.8 * loss_curve(record).lowest
    found = _needs(record, target)
    assert found.samples_of_run is None
    assert found.implied.steps(batch) == pytest.approx(steps_to(target, batch=batch), rel=0.05)
    assert found.error < 0.01


def test_the_trends_are_those_of_the_problem(record):
    """The exponent of the noise scale against the loss."""
    curve = loss_curve(record)
    assert course(record, curve).growth == pytest.approx(GROWTH, rel=0.05)
    assert course(record, curve, LOW).growth == 0


def test_the_run_itself_is_predicted_whatever_the_noise_scale():
    """A run of one batch took the steps it took: no assumption on the noise scale moves them."""
    record = ideal_record(batches=(32,), steps_each=300)
    for assumption in ASSUMPTIONS:
        found = _needs(record, loss_curve(record).lowest, assumption)
        assert found.implied.steps(32) == pytest.approx(300)
        assert found.implied.samples(32) == pytest.approx(32 * 300)


def test_the_interval_encloses_the_estimate_and_history_the_interval(record):
    """At every batch; the range is widest far from the run's own batches."""
    target = loss_curve(record).lowest
    for batch in (1, 8, 512, 8192):
        low, mid, high, *history = (
            _needs(record, target, assumption).implied.steps(batch) for assumption in (LOW, MEASURED, HIGH, *HISTORY)
        )
        assert min(low, high) < mid < max(low, high)
        assert min(history) < min(low, high)
        assert max(low, high) < max(history)


def test_the_noise_scale_counts_as_often_for_each_optimizer():
    """The critical ratio has one default, that of the batch law."""
    record = ideal_record()
    plain, sgd, adam = (
        course(replace(record, config=config), loss_curve(record)).noise_scales
        for config in ({}, {"optimizer": {"name": "sgd"}}, {"optimizer": {"name": "adamw"}})
    )
    np.testing.assert_array_equal(plain, sgd)
    np.testing.assert_array_equal(plain, adam)


def test_a_run_may_say_how_often_the_noise_scale_counts():
    """Its own `control.critical_ratio` goes before what its optimizer suggests."""
    record = ideal_record()
    own = replace(record, config={"optimizer": {"name": "adamw"}, "control": {"critical_ratio": 5.0}})
    sgd = replace(record, config={"optimizer": {"name": "sgd"}})
    scales = [course(one, loss_curve(record)).noise_scales for one in (own, sgd)]
    np.testing.assert_allclose(scales[0], 5 * scales[1])


def test_a_run_that_branched_off_counts_from_there(record):
    """Steps and samples from there to a loss are the whole run's less those up to there; beyond it nothing is said."""
    at = 200
    branch = branch_of(record, at=at)
    assert (branch.start, branch.samples_trained) == (
        record.train[at - 1]["progress/samples"],
        record.train[-1]["progress/samples"] - record.train[at - 1]["progress/samples"],
    )
    whole, own = (course(one, loss_curve(one)) for one in (record, branch))
    np.testing.assert_allclose(own.progress, whole.progress[at:] - whole.progress[at - 1])
    target = float(loss_curve(branch).losses[-5])
    found, of_all = _needs(branch, target), _needs(record, target)
    assert found.implied.min_steps == pytest.approx(of_all.implied.min_steps - float(whole.progress[at - 1]))
    assert found.samples_of_run == pytest.approx(of_all.samples_of_run - branch.start)
    placed, before = position(branch), position(record, up_to_samples=branch.start)
    assert placed.samples == branch.samples_trained
    assert placed.implied.min_samples == pytest.approx(
        position(record).implied.min_samples - before.implied.min_samples
    )
    with pytest.raises(ConfigError, match=r"began after .* samples of another"):
        _needs(branch, 0.8 * loss_curve(branch).lowest)


def test_a_row_that_stands_still_counts_for_nothing():
    """Two rows at one position, as a log from elsewhere may have, are no division by zero."""

    def doubled(rows, _evals):
        rows.insert(100, rows[100])

    record = ideal_record(edit=doubled)
    target = loss_curve(record).lowest
    assert _needs(record, target).implied.steps(64) == pytest.approx(_needs(ideal_record(), target).implied.steps(64))


def test_rows_before_the_first_estimate_count_with_it():
    """And no row after it is left out."""
    late = ideal_record(resolved_after=100)
    found = course(late, loss_curve(late))
    assert (found.noise_scales[:100] == found.noise_scales[100]).all()


def test_a_run_without_enough_evaluations_goes_by_its_training_loss():
    """Which is named."""
    record = ideal_record(edit=lambda _, evals: evals.clear())
    curve = loss_curve(record)
    assert curve.name.startswith("training loss")
    assert needs(course(record, curve), curve, target=curve.lowest).samples_of_run is not None


def test_a_noise_scale_that_was_never_resolved_is_refused():
    """With what to do."""
    record = ideal_record(resolved_after=10**6)
    with pytest.raises(ConfigError, match=r"never resolved.*train on"):
        course(record, loss_curve(record))


def _level(_rows, evals):
    for index, row in enumerate(evals):
        row["eval/loss"] = 1.0 + 0.01 * (index % 2)


def _negative(_rows, evals):
    for index, row in enumerate(evals):
        row["eval/loss"] = -float(index)


@pytest.mark.parametrize(("edit", "target", "why"), [(_level, 0.5, "no longer falls"), (_negative, -1e6, "positive")])
def test_what_cannot_be_extrapolated_is_refused(edit, target, why):
    """A loss that stands still, and one that is no positive number; what the run reached is planned all the same."""
    record = ideal_record(edit=edit)
    with pytest.raises(ConfigError, match=why):
        _needs(record, target)
    assert _needs(record, loss_curve(record).lowest).samples_of_run is not None


def test_scatter_of_the_loss_is_in_the_error():
    """The standard error of a target beyond the run holds the truth in most of many draws."""
    target, held = None, 0
    for seed in range(40):
        random = np.random.default_rng(seed)

        def scatter(_rows, evals, random=random):
            for row in evals:
                row["eval/loss"] *= float(np.exp(0.02 * random.standard_normal()))

        record = ideal_record(edit=scatter, batches=(64,), steps_each=200)
        target = target or 0.75 * loss_curve(record).lowest
        found = _needs(record, target, Assumption())
        truth = (target / 5.0) ** (-1 / FALL)
        held += abs(np.log(found.implied.min_steps / truth)) < 2 * found.error
    assert held >= 34  # of 38 expected at two standard errors
