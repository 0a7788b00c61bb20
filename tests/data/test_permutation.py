"""The keyed permutation: a bijection for every size, fixed for ever by its key, without a visible pattern."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2, chisquare

from dptrain.data.permutation import MAX_ITEMS, KeyedPermutation
from dptrain.errors import ConfigError

UNLIKELY = 1e-3


@functools.cache
def orders(num_items, *, num_epochs):
    everything = np.arange(num_items)
    return np.stack([KeyedPermutation(num_items, seed=5, epoch=epoch)(everything) for epoch in range(num_epochs)])


@settings(max_examples=50)
@given(num_items=st.integers(1, 3000), seed=st.integers(), epoch=st.integers(0, 2**40))
def test_every_item_appears_exactly_once(num_items, seed, epoch):
    """The images of all offsets are all items, for any size and key."""
    images = KeyedPermutation(num_items, seed=seed, epoch=epoch)(np.arange(num_items))
    assert np.array_equal(np.sort(images), np.arange(num_items))


@settings(max_examples=50)
@given(num_items=st.integers(2**20, MAX_ITEMS), data=st.data())
def test_large_sets_need_no_table(num_items, data):
    """At any size up to the largest, distinct offsets have distinct images, all of them in range."""
    offsets = np.array(data.draw(st.lists(st.integers(0, num_items - 1), min_size=1, max_size=50, unique=True)))
    images = KeyedPermutation(num_items, seed=1, epoch=0)(offsets)
    assert len(np.unique(images)) == len(offsets)
    assert images.min() >= 0
    assert images.max() < num_items


@settings(max_examples=50)
@given(num_items=st.integers(1, 500), data=st.data())
def test_access_is_random(num_items, data):
    """An item's place does not depend on what it was asked for together with."""
    permutation = KeyedPermutation(num_items, seed=2, epoch=3)
    offsets = np.array(data.draw(st.lists(st.integers(0, num_items - 1), min_size=2, max_size=20)))
    one_by_one = [permutation(np.array([offset])).item() for offset in offsets]
    assert permutation(offsets).tolist() == one_by_one


def test_the_order_of_a_key_never_changes():
    """A run begun with an older version continues with the same samples: these values are a promise."""
    everything = np.arange(10)
    assert KeyedPermutation(10, seed=0, epoch=0)(everything).tolist() == [4, 5, 2, 6, 3, 7, 8, 0, 9, 1]
    assert KeyedPermutation(10, seed=0, epoch=1)(everything).tolist() == [1, 3, 2, 6, 7, 9, 5, 4, 8, 0]
    assert KeyedPermutation(10, seed=1, epoch=0)(everything).tolist() == [0, 7, 9, 3, 1, 4, 5, 6, 2, 8]
    ends = np.array([0, 1, 2**48 - 1])
    images = KeyedPermutation(2**48, seed=7, epoch=3)(ends).tolist()
    assert images == [6906028403274, 34404710650253, 210465039615211]


def test_each_order_of_four_items_is_as_frequent_as_another():
    """Over many epochs the 24 orders of four items pass a chi-square test."""
    found = [tuple(order) for order in orders(4, num_epochs=2400).tolist()]
    counts = [found.count(order) for order in itertools.permutations(range(4))]
    assert chisquare(counts).pvalue > UNLIKELY


@pytest.mark.parametrize(("num_items", "num_epochs"), [(3, 2000), (5, 2000), (10, 2000), (97, 1000)])
def test_no_item_prefers_a_place(num_items, num_epochs):
    """Over many epochs each item lands in each place equally often."""
    places = orders(num_items, num_epochs=num_epochs)
    counts = np.stack([np.bincount(column, minlength=num_items) for column in places.T])
    expected = num_epochs / num_items
    # Rows and columns of the counts both have fixed sums, hence (n-1)² degrees of freedom, and n-1 in place of n.
    statistic = ((counts - expected) ** 2 / expected).sum() * (num_items - 1) / num_items
    assert chi2.sf(statistic, (num_items - 1) ** 2) > UNLIKELY


@pytest.mark.parametrize(("num_items", "num_epochs"), [(3, 2000), (5, 2000), (10, 2000), (97, 1000)])
def test_no_item_prefers_a_successor(num_items, num_epochs):
    """Over many epochs each item is followed by each other item equally often."""
    places = orders(num_items, num_epochs=num_epochs)
    pairs = (places[:, :-1] * num_items + places[:, 1:]).ravel()
    counts = np.bincount(pairs, minlength=num_items**2).reshape(num_items, num_items)
    assert not counts.diagonal().any()
    assert chisquare(counts[~np.eye(num_items, dtype=bool)]).pvalue > UNLIKELY


def test_neighbouring_epochs_are_unrelated():
    """Where an item stands in one epoch says nothing about the item that stands there in the next."""
    num_items, num_epochs = 10, 2000
    places = orders(num_items, num_epochs=num_epochs)
    counts = np.bincount((places[:-1] * num_items + places[1:]).ravel(), minlength=num_items**2)
    expected = (num_epochs - 1) / num_items
    statistic = ((counts - expected) ** 2 / expected).sum() * (num_items - 1) / num_items
    assert chi2.sf(statistic, (num_items - 1) ** 2) > UNLIKELY


@pytest.mark.parametrize("num_items", [0, -1, MAX_ITEMS + 1])
def test_impossible_sizes_are_refused(num_items):
    """A size without a permutation here is named in the error."""
    with pytest.raises(ConfigError, match=f"got {num_items}"):
        KeyedPermutation(num_items, seed=0, epoch=0)


@pytest.mark.parametrize("offset", [-1, 7])
def test_offsets_outside_are_refused(offset):
    """An offset outside 0 … num_items-1 has no image."""
    with pytest.raises(IndexError, match="0 … 6"):
        KeyedPermutation(7, seed=0, epoch=0)(np.array([0, offset]))
