"""Numbers as people write them become exact whole numbers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dptrain.config.counts import as_count


@pytest.mark.parametrize(
    ("text", "number"),
    [("0", 0), ("7", 7), ("1e5", 10**5), ("1.5k", 1500), ("2M", 2 * 10**6), ("3B", 3 * 10**9), ("1e18", 10**18)],
)
def test_a_count_is_exact(text, number):
    """No float is involved, so nothing is rounded."""
    assert as_count(text) == number


@pytest.mark.parametrize("text", ["", "k", "-1", "1.0005k", "1m", "1e-3", "0x10", "1,000", "1k5", "inf", "nan"])
def test_anything_else_is_none(text):
    """Fractions, signs and unknown letters are left for the type check to refuse."""
    assert as_count(text) is None


@given(st.integers(0, 10**15))
def test_every_whole_number_is_itself(number):
    """With and without underscores between the thousands."""
    assert as_count(str(number)) == as_count(f"{number:_}") == number
