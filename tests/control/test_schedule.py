"""The schedule: its text form and the stage that holds a position."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dptrain.control import Measurement, Schedule
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
    assert Schedule.parse(f"0:1 {text}:2").stages == ((0, 1), (int(start), 2))


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
        ("0:8 20:16 20:32", "must rise"),
        ("0:0", "at least 1 sample"),
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
