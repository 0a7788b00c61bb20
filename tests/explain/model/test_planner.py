"""What a layout of a step takes, on runs that follow the theory: against runs of it that are stepped through."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from dptrain.batch import BatchPlan
from dptrain.explain.model.hardware.devices import devices
from dptrain.explain.model.planner import RATIO_DOUBT, Planner
from tests.ideal_runs import PER_PASS_S, PER_SAMPLE_S, ideal_record, step_s, steps_to


def _planner(**fitted):
    record = ideal_record()
    return Planner(record, devices(record, **fitted))


@pytest.mark.parametrize("accumulation", [1, 3, 10, 40])
def test_any_layout_is_predicted(accumulation):
    """Steps, samples and seconds, on the run's own number of devices."""
    planner = _planner()
    point = planner.at(BatchPlan(micro_batch_size=8, accumulation_steps=accumulation, world_size=2))
    steps = steps_to(planner.target, batch=16 * accumulation)
    assert point.global_batch_size == 16 * accumulation
    assert point.steps == pytest.approx(steps, rel=0.03)
    assert point.samples == pytest.approx(steps * 16 * accumulation, rel=0.03)
    assert point.seconds == pytest.approx(steps * step_s(micro=8, accumulation=accumulation), rel=0.05)


def test_no_other_layout_is_faster():
    """Among all accumulations of the micro-batch that was timed, by stepping through each."""
    planner = _planner()
    best = min(
        steps_to(planner.target, batch=16 * accumulation) * step_s(micro=8, accumulation=accumulation)
        for accumulation in range(1, 40)
    )
    assert planner.at(planner.fastest(2)).seconds <= 1.05 * best


def test_the_batch_is_where_the_exchange_of_steps_and_samples_turns():
    """Near √(φ·α/β): α what a step costs, β what a sample adds on these devices (one grid point either way)."""
    planner = _planner()
    alpha, beta = devices(ideal_record()).model.per_step_s, (PER_SAMPLE_S + PER_PASS_S / 8) / 2
    turn = math.sqrt(planner.needed.implied.noise_scale * alpha / beta)
    assert turn / 2 <= planner.fastest(2).global_batch_size <= 2 * turn


def test_more_devices_are_never_slower_and_never_cheaper():
    """Where the all-reduce costs nothing; and no batch needs less than the fewest steps and samples."""
    planner = _planner(gb_per_s=1e9, gradient_bytes=1.0, latency_s=1e-12)
    points = [planner.at(planner.fastest(1 << power)) for power in range(13)]
    for few, many in pairwise(points):
        assert many.seconds <= few.seconds * 1.0001
        assert many.device_s >= few.device_s * 0.9999
    least = planner.needed.implied
    assert all(point.steps >= least.min_steps and point.samples >= least.min_samples for point in points)


def test_one_device_takes_at_least_two_micro_batches():
    """A single one gives no noise estimate."""
    shape = _planner().fastest(1)
    assert shape.accumulation_steps >= 2


def test_ranges_enclose_one_another():
    """The estimate in the interval, the interval in what history allows."""
    planner = _planner()
    for power in range(13):
        point = planner.at(planner.fastest(1 << power))
        (low, high), (least, most) = point.seconds_range, point.seconds_history
        assert 0 < least <= low <= point.seconds <= high <= most
        assert 0 < point.samples_range[0] <= point.samples <= point.samples_range[1]


def test_the_doubt_of_the_critical_ratio_grows_with_the_distance_from_the_run_s_batches():
    """Two standard deviations of its prior are a factor of four: little at the run's own batches, much far away."""
    planner = _planner()

    def width(accumulation):
        point = planner.at(BatchPlan(micro_batch_size=8, accumulation_steps=accumulation, world_size=2))
        return point.samples_range[1] / point.samples_range[0]

    mean = planner.needed.samples_of_run / len(ideal_record().train)
    near = width(round(mean / 16))
    assert RATIO_DOUBT == 4
    assert near < 1.3
    assert width(4000) > 2 * near
    assert width(4000) < RATIO_DOUBT**2
