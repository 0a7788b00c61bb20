"""The text form of a batch schedule: suffixes, ramps, and what cannot be read."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dptrain.config.batch_schedule import batch_schedule
from dptrain.control.schedule import Schedule, Stage
from dptrain.errors import ConfigError


@pytest.mark.parametrize(("text", "start"), [("7K", 7e3), ("7M", 7e6), ("250B", 250e9), ("1T", 1e12), ("7", 7)])
def test_suffixes(text, start):
    """K, M, B and T are powers of a thousand."""
    assert batch_schedule(f"0:1 {text}:2").stages == ((0, 1, None), (int(start), 2, None))


@given(st.lists(st.integers(1, 10**12), unique=True), st.data())
def test_parse_inverts_writing(starts, data):
    """What is written as start:batch is read back as the same pairs."""
    starts = [0, *sorted(starts)]
    batches = data.draw(st.lists(st.integers(1, 10**6), min_size=len(starts), max_size=len(starts)))
    stages = tuple(Stage(start, batch) for start, batch in zip(starts, batches, strict=True))
    assert batch_schedule(" ".join(f"{s}:{b}" for s, b, _ in stages)) == Schedule(stages)


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
        ("0:8 1.5:16", "cannot read '1.5:16'"),
        ("0:8 10:1.5", "cannot read '10:1.5'"),
        ("0:8 10:16..1m 20:8", "cannot read '10:16..1m'"),
        ("0:8,10:16", "cannot read"),
        ("0:8 -10:16", "cannot read"),
        ("0:8 10", "cannot read '10'"),
        ("0:8 10m:16", "cannot read '10m:16' in the batch schedule .* in samples, such as '0:768"),
        ("0:8 \u0661\u0660:16", "cannot read"),
    ],
)
def test_unreadable_schedules(text, complaint):
    """What is not a rising list of start:batch from sample 0 is refused, quoting the entry."""
    with pytest.raises(ConfigError, match=complaint):
        batch_schedule(text)


def test_batches_have_suffixes_as_starts_have():
    """The form that the help of control.schedule_tokens shows, and a ramp in it."""
    assert batch_schedule("0:64K 100M:128K").stages == ((0, 64_000, None), (100_000_000, 128_000, None))
    assert batch_schedule("0:1.5K..1e6 2k:1M").stages == ((0, 1500, 10**6), (2000, 10**6, None))


@pytest.mark.parametrize("text", ["0:8 10", "5:8", "0:8..64", "0:0"])
def test_a_schedule_in_tokens_is_not_told_of_samples(text):
    """Errors name the unit of the setting."""
    with pytest.raises(ConfigError, match=r"token|'0:64K 100M:128K'") as caught:
        batch_schedule(text, unit="tokens")
    assert "sample" not in str(caught.value)


def test_a_ramp():
    """`start:batch..last` is a stage with a batch to ramp to."""
    assert batch_schedule("0:8..64 1000:64").stages == ((0, 8, 64), (1000, 64, None))
