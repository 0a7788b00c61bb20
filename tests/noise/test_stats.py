"""Proves what `SquaredNorms.of` collects: weights, the two noise coefficients, and indifference to order."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dptrain.noise import SquaredNorms

SHARDS = st.lists(st.tuples(st.floats(0, 1e6), st.integers(1, 4096)), min_size=1, max_size=9)


def collected(shards):
    return SquaredNorms.of([s for s, _ in shards], sizes=[b for _, b in shards], large_sq_norm=1.0)


def test_uneven_shards_are_weighted_by_their_samples():
    """Shards of 4, 12 and 32 samples get the weights 1/12, 1/4 and 2/3, and the noise coefficients of F3."""
    norms = SquaredNorms.of([5.0, 3.0, 2.0], sizes=[4, 12, 32], large_sq_norm=1.5)
    weights = [Fraction(4, 48), Fraction(12, 48), Fraction(32, 48)]
    assert norms.small == pytest.approx(float(5 * weights[0] + 3 * weights[1] + 2 * weights[2]))
    assert norms.inverse_small == pytest.approx(float(weights[0] / 4 + weights[1] / 12 + weights[2] / 32))
    assert norms.inverse_large == pytest.approx(1 / 48)
    assert (norms.large, norms.num_small, norms.num_samples) == (1.5, 3, 48)


@given(b=st.integers(1, 10_000), K=st.integers(1, 64))
@settings(derandomize=True)
def test_equal_sizes_carry_the_noise_of_one_small_and_of_the_whole_batch(b, K):
    """With K equal batches the coefficients are 1/b and 1/B."""
    norms = SquaredNorms.of([1.0] * K, sizes=[b] * K, large_sq_norm=1.0)
    assert norms.inverse_small == pytest.approx(1 / b)
    assert norms.inverse_large == pytest.approx(1 / (b * K))


@given(shards=SHARDS)
@settings(derandomize=True)
def test_a_combination_is_at_least_as_quiet_as_its_parts(shards):
    """c2 ≤ c1, and c2 = 1/B where the weights are shares of the samples."""
    norms = collected(shards)
    assert norms.inverse_large <= norms.inverse_small * (1 + 1e-12)
    assert norms.inverse_large == pytest.approx(1 / norms.num_samples)


@given(shards=SHARDS, data=st.data())
@settings(derandomize=True)
def test_the_order_of_small_batches_is_irrelevant(shards, data):
    """Any permutation of the shards gives the same record, up to rounding."""
    first, second = collected(shards), collected(data.draw(st.permutations(shards)))
    for name in ("small", "inverse_small", "inverse_large", "num_small", "num_samples"):
        assert math.isclose(getattr(first, name), getattr(second, name), rel_tol=1e-12)


def test_given_weights_replace_the_shares():
    """A loop that averages unequal micro-batches with equal weights is described by those weights."""
    norms = SquaredNorms.of([4.0, 2.0], sizes=[1, 3], large_sq_norm=1.0, weights=[0.5, 0.5])
    assert norms.small == 3.0
    assert norms.inverse_small == pytest.approx(0.5 * (1 + 1 / 3))
    assert norms.inverse_large == pytest.approx(0.25 * (1 + 1 / 3))


@pytest.mark.parametrize("sizes", [[1], [1, 2, 3]])
def test_lists_of_different_length_are_an_error(sizes):
    """A norm without its size, or a size without its norm, is never dropped silently."""
    with pytest.raises(ValueError, match="zip"):
        SquaredNorms.of([1.0, 2.0], sizes=sizes, large_sq_norm=1.0)
