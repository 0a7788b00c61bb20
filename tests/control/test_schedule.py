"""The laws that measure nothing: the schedule's stages and ramps, and the constant batch."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dptrain.control import Measurement
from dptrain.control.schedule import Constant, Schedule, Stage


def batch_at(schedule, samples_seen):
    measurement = Measurement(samples_seen=samples_seen, global_batch_size=1, noise_scale=None)
    return schedule.decide(measurement).global_batch_size


def test_stage_begins_at_its_first_sample():
    """A stage holds from its start, inclusive, up to the next start, exclusive; the last one for ever."""
    schedule = Schedule((Stage(0, 768), Stage(250_000, 1536)))
    assert [batch_at(schedule, p) for p in (0, 249_999, 250_000, 10**12)] == [768, 768, 1536, 1536]


def test_a_schedule_may_fall():
    """The batch of a later stage may be smaller."""
    assert batch_at(Schedule((Stage(0, 64), Stage(10, 8))), 10) == 8


sizes = st.integers(1, 10**5)


@given(first=sizes, last=sizes, length=sizes, seen=st.integers(0, 2 * 10**5))
def test_a_ramp_goes_straight_to_the_next_stage(first, last, length, seen):
    """From the first batch to the last in a straight line, never outside of the two, and the last from the end on."""
    ramp = Schedule((Stage(0, first, last), Stage(length, last)))
    expected = first + (last - first) * min(seen / length, 1)
    assert batch_at(ramp, seen) == pytest.approx(expected)
    assert min(first, last) <= batch_at(ramp, seen) <= max(first, last)


def test_the_reason_names_the_stage():
    """The reason says which stage holds, and where a ramp is."""
    reason = lambda *stages, seen: (  # noqa: E731 - short
        Schedule(stages).decide(Measurement(samples_seen=seen, global_batch_size=1, noise_scale=None)).reason
    )
    assert reason(Stage(0, 8), Stage(1000, 64), seen=2000) == "schedule: 64 from sample 1,000 on"
    assert reason(Stage(0, 8, 64), Stage(1000, 64), seen=500) == "schedule: ramp 8 → 64, sample 500 of 1,000"


@pytest.mark.parametrize("batch", [1, 64, 4096])
def test_constant_ignores_everything(batch):
    """The constant law asks for its batch from every batch in force, without looking at the measurement."""
    decision = Constant(64).decide(Measurement(samples_seen=10, global_batch_size=batch, noise_scale=None))
    assert decision.global_batch_size == 64
    assert "64" in decision.reason
