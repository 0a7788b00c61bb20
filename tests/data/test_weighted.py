"""Weighted order: each sample as often as its weight says, at a position that depends on the seed alone."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import chisquare

from dptrain.data.weighted import WeightedStream
from dptrain.errors import ConfigError


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_samples_come_as_often_as_their_weights_say(seed):
    """Over 40,000 positions the counts pass a chi-square test, and a weight of 0 is never drawn."""
    weights = np.array([0.0, 1.0, 2.0, 5.0, 0.0, 0.5])
    counts = np.bincount(WeightedStream(weights, seed=seed).indices(np.arange(40_000)), minlength=6)
    assert counts[0] == counts[4] == 0
    kept = weights > 0
    assert chisquare(counts[kept], 40_000 * weights[kept] / weights.sum()).pvalue > 1e-3


def test_neighbouring_positions_and_seeds_are_independent():
    """Pairs of neighbours, and the same positions under another seed, show no dependence in a chi-square test."""
    first, second = (WeightedStream(np.ones(4), seed=seed).indices(np.arange(32_001)) for seed in (3, 4))
    for pairs in (4 * first[:-1] + first[1:], 4 * first + second):
        assert chisquare(np.bincount(pairs, minlength=16)).pvalue > 1e-3


def test_a_position_has_its_sample_however_it_is_read():
    """In one piece, in several, in any order."""
    stream = WeightedStream([1.0, 2.0, 3.0], seed=5)
    whole = stream.indices(np.arange(50))
    assert np.array_equal(np.concatenate([stream.indices(np.arange(20)), stream.indices(np.arange(20, 50))]), whole)
    assert stream.indices(np.array([7, 3]))[1] == whole[3]
    assert (stream.num_samples, stream.epoch(7)) == (3, 2)


@pytest.mark.parametrize("weights", [[1.0, -1.0], [0.0, 0.0], [1.0, float("nan")], [[1.0, 2.0]]])
def test_weights_that_are_none_are_refused(weights):
    """Negative, all 0, no number, or a table."""
    with pytest.raises(ConfigError, match="one number of at least 0 for each sample"):
        WeightedStream(weights, seed=0)


def test_a_window_of_a_weighted_order_is_drawn_by_weight():
    """Read as one stretch the order is the one that its positions give, not a permutation."""
    stream = WeightedStream([0.0, 1.0, 3.0, 0.0], seed=1)
    found = stream.window(5, 300).tolist()
    assert found == stream.indices(np.arange(5, 305)).tolist()
    assert set(found) == {1, 2}
