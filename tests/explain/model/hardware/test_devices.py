"""The time of steps on other numbers of devices, against runs whose times are known by formula."""

from __future__ import annotations

import pytest

from dptrain.batch import BatchPlan
from dptrain.errors import ConfigError
from dptrain.explain.model.hardware.devices import LATENCY_S, AllReduce, devices
from tests.ideal_runs import PER_STEP_S, ideal_record, step_s


def _shape(num_devices, *, micro=8, accumulation=2):
    return BatchPlan(micro_batch_size=micro, accumulation_steps=accumulation, world_size=num_devices)


def test_a_ring_and_a_tree():
    """Nothing on one device; on two half the volume each way; from there on at most twice that, and the hops."""
    found = AllReduce(volume_s=1.0, volume_range_s=(1.0, 1.0), latency_s=0.01, source="")
    assert found.seconds(1) == 0
    assert found.seconds(2) == pytest.approx(1.0 + 0.02)
    assert found.seconds(1024) == pytest.approx(2.0, rel=0.11)
    assert found.seconds(1 << 40) - found.seconds(1 << 20) == pytest.approx(2 * 20 * 0.01, rel=1e-4)


@pytest.mark.parametrize("accumulation", [1, 2, 4, 16])
def test_the_runs_own_devices_are_timed_as_they_were(accumulation):
    """Whatever the all-reduce is taken to be."""
    for options in ({}, {"gb_per_s": 0.1, "gradient_bytes": 1e6}, {"latency_s": 1.0}):
        found = devices(ideal_record(), **options)
        assert found.seconds(_shape(2, accumulation=accumulation)) == pytest.approx(
            step_s(micro=8, accumulation=accumulation), rel=0.02
        )


def test_a_given_bandwidth_adds_its_all_reduce():
    """The difference between two numbers of devices is that of their all-reduces."""
    found = devices(ideal_record(), gb_per_s=2.0, gradient_bytes=1e7)
    ring = 1e7 / 2e9 * 2 * (15 / 16 - 1 / 2)
    assert found.seconds(_shape(16)) - found.seconds(_shape(2)) == pytest.approx(ring + 2 * 3 * LATENCY_S)
    assert found.all_reduce.source == "10 MB at 2 GB/s, as given"
    with pytest.raises(ConfigError, match="size of the gradients"):
        devices(ideal_record(), gb_per_s=2.0)


def test_without_one_it_may_be_all_or_nothing_of_a_steps_own_cost():
    """Half of it, in the middle: on one device half is gone, on many it is half more; all of it doubles, or is gone."""
    found = devices(ideal_record(), latency_s=0.0)
    two = found.seconds(_shape(2))
    for number, share in ((1, -0.5), (1 << 20, 0.5)):
        assert found.seconds(_shape(number)) - two == pytest.approx(share * PER_STEP_S, rel=0.05)
        low, high = found.seconds_range(_shape(number))
        ends = sorted([two, two + 2 * share * PER_STEP_S])
        assert (low, high) == (pytest.approx(ends[0], rel=0.02), pytest.approx(ends[1], rel=0.02))
    assert found.seconds_range(_shape(2)) == (two, two)
    assert "assumed to be half" in found.all_reduce.source


def test_one_device_tells_nothing_of_an_all_reduce():
    """All numbers of devices then take the same time, and it says so."""
    record = ideal_record(world_size=1)
    found = devices(record, latency_s=0.0)
    assert found.seconds(_shape(64)) == found.seconds(_shape(1))
    assert "unknown" in found.all_reduce.source


def test_a_run_on_two_numbers_of_devices_tells_the_all_reduce():
    """Half the rows are on four devices, and each step there takes longer by a known all-reduce."""
    volume_s = 0.04

    def resumed(rows, _evals):
        for row in rows[::-1]:
            on = 4 if row["step"] > 300 else 2
            row["time/world_size"], row["batch/accumulation"] = on, row["batch/global"] // (8 * on)
            row["time/step_s"] = step_s(micro=8, accumulation=row["batch/accumulation"]) + volume_s * 2 * (1 - 1 / on)

    record = ideal_record(edit=resumed, batches=(32, 64, 64, 128))
    found = devices(record, latency_s=0.0)
    assert found.all_reduce.volume_s == pytest.approx(volume_s, rel=0.1)
    assert found.all_reduce.source == "fitted to the run's steps on 2 and on 4 devices"
    assert found.seconds(_shape(64)) == pytest.approx(
        step_s(micro=8, accumulation=2) + volume_s * 2 * 63 / 64, rel=0.05
    )


def test_no_step_is_faster_than_its_samples():
    """A wrong bandwidth cannot make what a step costs negative."""
    found = devices(ideal_record(), gb_per_s=1e-3, gradient_bytes=1e9)
    assert found.seconds(_shape(1)) == pytest.approx(2 * found.model.micro_batch_s(8))


def test_micro_batches_that_were_timed_are_known():
    """From the smallest to the largest."""

    def two_sizes(rows, _evals):
        for row in rows[300:]:
            row["batch/micro"], row["batch/accumulation"] = 16, max(1, row["batch/accumulation"] // 2)

    assert devices(ideal_record(edit=two_sizes)).micro_batch_sizes == (8, 16)


@pytest.mark.parametrize(("num_steps", "why"), [(0, "no step times"), (3, "only 3 timed steps")])
def test_a_run_without_enough_times_is_refused(num_steps, why):
    """Rows that know no time are passed over; where too few are left, it says what to do."""

    def forgotten(rows, _evals):
        for row in rows[num_steps:]:
            row["time/step_s"] = None

    with pytest.raises(ConfigError, match=why):
        devices(ideal_record(edit=forgotten))
