"""Agreement, one common factor and contradiction are told apart, on plain numbers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dptrain.observe.checks.common_factor import combined_differs, common_factor

SEEN = [1.0, -2.0, 0.5, 3.0, -0.1, 0.7, 1.1, -0.4]
NUM_CHECKS = len(SEEN)
VARIANCES = [1e-6] * NUM_CHECKS

factors = st.floats(1e-6, 1e6).filter(lambda factor: abs(factor - 1) > 0.01) | st.floats(-1e6, -1e-6)


def test_agreement_is_a_factor_of_one():
    """Also where all is zero, of which no factor can be known."""
    found = common_factor(SEEN, VARIANCES, SEEN)
    assert (found.value, found.resolved, found.agrees, found.rescales) == (1.0, True, True, False)
    nothing = common_factor([0.0] * 8, [0.0] * 8, [0.0] * 8)
    assert (nothing.value, nothing.resolved, nothing.agrees) == (1.0, False, True)


def test_a_factor_within_rounding_is_kept():
    """By least squares, not set to 1: what would be missed at each step adds up over a run."""
    found = common_factor(SEEN, [1e-3] * NUM_CHECKS, [0.99 * x for x in SEEN])
    assert found.value == pytest.approx(0.99)
    assert found.agrees
    assert not found.rescales


@given(factors)
def test_a_common_factor_is_found(factor):
    """From a millionth, as a loss scale taken out, to a million; a negative one is that of a loop that ascends."""
    found = common_factor(SEEN, VARIANCES, [factor * x for x in SEEN])
    assert found.value == pytest.approx(factor, rel=1e-6)
    assert found.resolved
    assert found.rescales


@given(factors, st.integers(0, NUM_CHECKS - 1))
def test_one_check_that_differs_is_a_contradiction(factor, position):
    """Whatever the factor of the others."""
    combined = [factor * x for x in SEEN]
    combined[position] += factor * 0.1
    assert common_factor(SEEN, VARIANCES, combined) is None


@pytest.mark.parametrize(
    "combined",
    [[0.0] * 8, [-x for x in SEEN[:4]] + SEEN[4:], [*SEEN[:4], 0.0, 0.0, 0.0, 0.0]],
    ids=["cleared", "half negated", "half cleared"],
)
def test_what_no_factor_explains_is_a_contradiction(combined):
    """Cleared, or cleared or negated in part."""
    assert common_factor(SEEN, VARIANCES, combined) is None


def test_a_gradient_that_nobody_brought_is_a_contradiction():
    """Where nothing was seen `.grad` must hold nothing."""
    assert common_factor([0.0] * 8, [0.0] * 8, SEEN) is None
    assert common_factor([0.0] * 8, [1e-70] * 8, SEEN) is None


def test_a_factor_that_rounding_hides_is_not_taken_for_known():
    """With checks of a few standard deviations neither 0.5 nor 1 can be divided out."""
    hidden = [0.06] * NUM_CHECKS
    for factor, agrees in ((0.5, False), (0.95, True)):
        found = common_factor(SEEN, hidden, [factor * x for x in SEEN])
        assert (found.resolved, found.agrees) == (False, agrees)


def test_ranks_that_differ_are_distinguished_from_rounding():
    """The spread over the ranks is compared with rounding, of gradients that a loss scale was taken out of too."""
    for factor in (1.0, 2.0**-16):
        combined = [factor * x for x in SEEN]
        squares = [x * x for x in combined]
        assert not combined_differs(combined, squares, SEEN, VARIANCES)
        apart = [squares[0] + (0.1 * factor) ** 2, *squares[1:]]
        assert combined_differs(combined, apart, SEEN, VARIANCES)
