"""Plans, on runs that follow the theory, with what every plan must hold and what is known of these."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from dptrain.cost.prices import DevicePrice
from dptrain.errors import ConfigError
from dptrain.explain.model.hardware.devices import devices
from dptrain.explain.model.plan import make_plan
from dptrain.explain.model.planner import HALF_GAIN, LARGEST_ERROR, NO_GAIN
from tests.ideal_runs import branch_of, ideal_record

NUMBERS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096]


def _plan(record=None, *, numbers=NUMBERS, fitted=None, **options):
    record = ideal_record() if record is None else record
    return make_plan(record, devices(record, **(fitted or {})), numbers=numbers, **options)


def test_the_knee_and_the_end_of_gains_are_what_they_say():
    """Twice the devices save 30 % up to the knee and less beyond; from the ceiling on they save less than 5 %."""
    plan = _plan()
    assert 1 <= plan.knee < plan.ceiling < 4096
    for last, bound in ((plan.knee, HALF_GAIN), (plan.ceiling // 2, NO_GAIN)):
        up_to, beyond = (_plan(numbers=[at, 2 * at]).points for at in (last, 2 * last))
        assert up_to[0].seconds / up_to[1].seconds >= bound * 0.999
        assert beyond[0].seconds / beyond[1].seconds < bound


def test_a_ceiling_above_all_that_was_asked_for_is_none():
    """Up to four devices, each doubling pays."""
    assert _plan(numbers=[1, 2, 4]).ceiling is None


def test_a_target_beyond_the_run_widens_the_interval_and_is_warned_of():
    """By the error of the fit, beside the noise scale's."""
    lowest = _plan().lowest
    within, beyond = _plan(target=lowest), _plan(target=0.7 * lowest)
    assert within.samples_of_run is not None
    assert beyond.samples_of_run is None
    assert beyond.points[0].seconds > within.points[0].seconds
    assert not any("beyond the run" in text for text in within.warnings)
    assert any("beyond the run" in text for text in beyond.warnings)


def test_money_is_the_price_of_all_devices():
    """Proportional to it, and none without it."""
    plan = _plan(price=DevicePrice.given(3.6))
    for point in plan.points:
        assert point.cost == pytest.approx(point.device_s / 1000)
        assert point.device_s == pytest.approx(point.seconds * point.num_devices)
    assert _plan().points[0].cost is None


def test_a_rental_has_a_least_time():
    """An hour is paid for on each of 64 devices, though they are needed for less."""
    plan = _plan(numbers=[64], price=DevicePrice.given(2.0), minimum_rental_s=3600.0)
    assert plan.points[0].seconds < 3600
    assert plan.points[0].cost == pytest.approx(64 * 2.0)


def test_more_devices_than_anybody_has_are_refused():
    """Also where the run does not tell the size of its data set."""
    with pytest.raises(ConfigError, match=r"no training has 1,000,000,000 devices"):
        _plan(numbers=[10**9])


def test_compute_by_both_methods_and_energy_are_those_of_the_ledger():
    """FLOPs per sample, the peak, and watts are the run's."""
    plan = _plan()
    (point, *_) = plan.points
    assert point.compute.by_count == pytest.approx(5e7 * point.samples)
    assert point.compute.by_time == pytest.approx(1e12 * 0.33 * point.device_s)
    assert point.energy_j == pytest.approx(200 * point.device_s)
    assert plan.compute_of_run.disagreement > 1


def test_a_run_that_branched_off_is_planned_from_there():
    """A sample and a second cost what they cost in the whole run, and the plan says where it begins."""
    record = ideal_record()
    branch = branch_of(record, at=300)
    plan = _plan(branch)
    (point, *_) = plan.points
    assert point.compute.by_count == pytest.approx(5e7 * point.samples)
    assert plan.compute_of_run.by_count == pytest.approx(branch.train[-1]["ledger/flops"])
    assert plan.samples_of_run <= branch.samples_trained
    assert any(f"{branch.start:,.0f} samples on" in text for text in plan.warnings)
    assert not any("of another" in text for text in _plan(record).warnings)


def test_what_the_run_did_not_measure_is_not_planned():
    """No ledger, no peak: no compute and no energy, and the plan stands all the same."""

    def bare(rows, _evals):
        for row in rows:
            for name in [key for key in row if key.startswith("ledger/")]:
                del row[name]

    plan = _plan(ideal_record(edit=bare, summary={}))
    assert plan.device == "replica"
    assert plan.points[0].compute.by_count is plan.points[0].compute.by_time is plan.points[0].energy_j is None


def test_a_run_of_one_batch_is_warned_of():
    """How a step's time splits is then assumed; so is the all-reduce of a run on one device."""
    texts = " ".join(_plan(ideal_record(batches=(32,), world_size=1)).warnings)
    assert "had one batch" in texts
    assert "run on one device" in texts
    assert _plan().warnings == ()


def test_sizes_for_a_budget_come_by_both_laws():
    """And none without a budget."""
    sizes = _plan(flops_budget=1e21).optimal_sizes
    assert {size.law for size in sizes} == {"Besiroglu 2024", "Hoffmann 2022"}
    assert all(6 * size.num_parameters * size.num_tokens == pytest.approx(1e21) for size in sizes)
    assert _plan().optimal_sizes == ()


@pytest.mark.parametrize("numbers", [[], [0], [4, -1]])
def test_no_devices_are_refused(numbers):
    """With the numbers."""
    with pytest.raises(ConfigError, match="at least 1"):
        _plan(numbers=numbers)


def test_a_target_that_is_no_number_is_refused():
    """With it."""
    with pytest.raises(ConfigError, match="nan"):
        _plan(target=math.nan)


def _epochs_of(num_samples):
    """An edit that gives a run a data set of this size."""

    def edit(rows, _evals):
        for row in rows:
            row["progress/epoch"] = row["progress/samples"] / num_samples

    return edit


def test_a_batch_above_the_data_set_is_refused():
    """A billion devices need a larger batch than there are samples; by default only numbers that fit are planned."""
    record = ideal_record(edit=_epochs_of(4096))
    with pytest.raises(ConfigError, match=r"1,000,000,000 devices need a batch of at least .*the data set has 4,096"):
        _plan(record, numbers=[2, 10**9])
    found = make_plan(record, devices(record))
    assert max(point.global_batch_size for point in found.points) <= 4096
    assert found.points[-1].num_devices < 4096


def test_the_knee_is_one_of_the_numbers_in_the_table():
    """The figure's line stands at a point of the table, and so does the end of gains."""
    for numbers in (NUMBERS, [3, 24, 192], [7]):
        plan = _plan(numbers=numbers)
        assert plan.knee in numbers
        assert plan.ceiling is None or plan.ceiling in numbers


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_beyond_a_run_whose_rate_falls_there_is_no_plan(schedule):
    """A target within it is planned; one beyond is refused, with what to do; a constant rate is planned either way."""
    record = ideal_record()
    falling, level = (
        replace(record, config={"optimizer": {"name": "sgd", "schedule": name}}) for name in (schedule, "constant")
    )
    beyond = 0.7 * _plan(level).lowest
    assert _plan(falling).samples_of_run is not None
    assert _plan(level, target=beyond).samples_of_run is None
    with pytest.raises(ConfigError, match=rf"learning rate falls \(optimizer.schedule={schedule}\).*--target"):
        _plan(falling, target=beyond)


def test_a_target_whose_samples_are_not_known_within_a_factor_of_two_is_refused():
    """Losses that scatter by 2 % tell a little of what lies beyond them, and not what half of the loss takes."""

    def scattered(_rows, evals):
        for number, row in enumerate(evals):
            row["eval/loss"] *= 1.02 if number % 2 else 0.98

    record = ideal_record(edit=scattered)
    lowest = min(row["eval/loss"] for row in record.evals)
    assert _plan(record, target=0.95 * lowest).target_error <= LARGEST_ERROR
    with pytest.raises(ConfigError, match=r"lies too far beyond .* within a factor of two .*train longer"):
        _plan(record, target=0.5 * lowest)
