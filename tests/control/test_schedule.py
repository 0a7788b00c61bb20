"""The laws that measure nothing: the schedule's text form, its stages and ramps, and the constant batch."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dptrain.control import Constant, Measurement, Schedule
from dptrain.errors import ConfigError


def batch_at(schedule, samples_seen):
    measurement = Measurement(samples_seen=samples_seen, global_batch_size=1, noise_scale=None)
    return schedule.decide(measurement).global_batch_size


def test_stage_begins_at_its_first_sample():
    """A stage holds from its start, inclusive, up to the next start, exclusive; the last one for ever."""
    schedule = Schedule.parse("0:768 250000:1536")
    assert [batch_at(schedule, p) for p in (0, 249_999, 250_000, 10**12)] == [768, 768, 1536, 1536]


def test_a_schedule_may_fall():
    """The batch of a later stage may be smaller."""
    assert batch_at(Schedule.parse("0:64 10:8"), 10) == 8


@pytest.mark.parametrize(("text", "start"), [("7K", 7e3), ("7M", 7e6), ("250B", 250e9), ("1T", 1e12), ("7", 7)])
def test_suffixes(text, start):
    """K, M, B and T are powers of a thousand."""
    assert Schedule.parse(f"0:1 {text}:2").stages == ((0, 1, None), (int(start), 2, None))


@given(st.lists(st.integers(1, 10**12), unique=True), st.data())
def test_parse_inverts_writing(starts, data):
    """What is written as start:batch is read back as the same pairs."""
    starts = [0, *sorted(starts)]
    batches = data.draw(st.lists(st.integers(1, 10**6), min_size=len(starts), max_size=len(starts)))
    stages = tuple(zip(starts, batches, strict=True))
    assert Schedule.parse(" ".join(f"{s}:{b}" for s, b in stages)) == Schedule(stages)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "start at sample 0"),
        ("5:8", "start at sample 0"),
        ("0:8 20:16 10:32", "must rise"),
        ("0:8..64", "no end to ramp to"),
        ("0:8..0 10:64", "at least 1"),
        ("0:8.. 10:64", "cannot read '0:8..'"),
        ("0:8 20:16 20:32", "must rise"),
        ("0:0", "must be at least 1, got 0"),
        ("0:8 1.5M:16", "cannot read '1.5M:16'"),
        ("0:8 10:1K", "cannot read '10:1K'"),
        ("0:8,10:16", "cannot read"),
        ("0:8 -10:16", "cannot read"),
        ("0:8 10", "cannot read '10'"),
        ("0:8 10k:16", "cannot read '10k:16'"),
        ("0:8 \u0661\u0660:16", "cannot read"),
    ],
)
def test_unreadable_schedules(text, complaint):
    """What is not a rising list of start:batch from sample 0 is refused, quoting the entry."""
    with pytest.raises(ConfigError, match=complaint):
        Schedule.parse(text)


sizes = st.integers(1, 10**5)


@given(first=sizes, last=sizes, length=sizes, seen=st.integers(0, 2 * 10**5))
def test_a_ramp_goes_straight_to_the_next_stage(first, last, length, seen):
    """From the first batch to the last in a straight line, never outside of the two, and the last from the end on."""
    ramp = Schedule.parse(f"0:{first}..{last} {length}:{last}")
    assert ramp.batches == (first, last, last)
    expected = first + (last - first) * min(seen / length, 1)
    assert batch_at(ramp, seen) == pytest.approx(expected)
    assert min(first, last) <= batch_at(ramp, seen) <= max(first, last)


def test_a_ramp_by_doubling():
    """From 8 to 64 there are three doublings, after equal numbers of samples; down as well."""
    ramp = Schedule.doubling(first=8, last=64, num_samples=3000)
    assert [batch_at(ramp, p) for p in (0, 999, 1000, 1999, 2000, 2999, 3000)] == [8, 8, 16, 16, 32, 32, 64]
    down = Schedule.doubling(first=64, last=8, num_samples=3000)
    assert [batch_at(down, p) for p in (0, 1000, 2000, 3000)] == [64, 32, 16, 8]
    assert Schedule.doubling(first=8, last=8, num_samples=10).stages == ((0, 8, None),)
    with pytest.raises(ConfigError):
        Schedule.doubling(first=0, last=8, num_samples=10)


def test_the_reason_names_the_stage():
    """The reason says which stage holds, and where a ramp is."""
    reason = lambda text, seen: (  # noqa: E731 - short
        Schedule.parse(text).decide(Measurement(samples_seen=seen, global_batch_size=1, noise_scale=None)).reason
    )
    assert reason("0:8 1000:64", 2000) == "schedule: 64 from sample 1,000 on"
    assert reason("0:8..64 1000:64", 500) == "schedule: ramp 8 → 64, sample 500 of 1,000"


@pytest.mark.parametrize("batch", [1, 64, 4096])
def test_constant_ignores_everything(batch):
    """The constant law asks for its batch from every batch in force, without looking at the measurement."""
    decision = Constant(64).decide(Measurement(samples_seen=10, global_batch_size=batch, noise_scale=None))
    assert decision.global_batch_size == 64
    assert "64" in decision.reason


def test_constant_rejects_an_empty_batch():
    """A batch of no samples is refused with its value in the text."""
    with pytest.raises(ConfigError, match="got 0"):
        Constant(0)
