"""The judgement on branches: the largest batch that is no worse, as are all smaller ones."""

from __future__ import annotations

import math

import pytest

from dptrain.errors import ConfigError
from dptrain.explain.model.branching import branched


@pytest.mark.parametrize(
    ("losses", "largest", "is_open"),
    [
        ({1: 2.0, 2: 2.005, 4: 2.02, 8: 2.1}, 2, False),
        ({1: 2.0, 2: 1.9, 4: 1.95, 8: 2.0}, 8, True),
        ({1: 2.0, 2: 2.02, 4: 2.0}, 1, False),
        ({1: 2.0, 2: math.nan, 4: 2.0}, 1, False),
        ({2: 2.0, 4: 2.0101}, 2, False),
        ({8: 2.1, 1: 2.0, 4: 2.0, 2: 2.0}, 4, False),
    ],
)
def test_the_largest_that_is_no_worse(losses, largest, is_open):
    """Up to the tolerance above the smallest; what does well again after a worse one, or diverged, does not count."""
    found = branched(losses, tolerance=0.01)
    assert (found.largest_multiple, found.is_open) == (largest, is_open)


def test_the_batch_in_force_is_no_lower_bound_of_the_critical_one():
    """Losses 2.2885, 2.3217, 2.3678 at ×1, ×4, ×16: the critical batch is below ×4, and ×1 is not what was found."""
    found = branched({1: 2.2885, 4: 2.3217, 16: 2.3678}, tolerance=0.01)
    assert found.only_below
    assert found.first_worse == 4
    known = branched({1: 2.0, 2: 2.005, 4: 2.02}, tolerance=0.01)
    assert not known.only_below
    assert known.first_worse == 4
    assert branched({1: 2.0, 2: 1.9}, tolerance=0.01).first_worse is None


def test_nothing_to_compare_with():
    """Where the batch in force itself diverged, nothing can be said."""
    with pytest.raises(ConfigError, match="diverged"):
        branched({1: math.nan, 2: 1.0}, tolerance=0.01)
