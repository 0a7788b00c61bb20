"""The stream: whole epochs, one after another, the same however they are read."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dptrain.data.stream import SampleStream
from dptrain.errors import ConfigError

streams = st.builds(SampleStream, st.integers(1, 200), seed=st.integers(0, 2**64), shuffle=st.booleans())
positions = st.integers(0, 10**12)


@settings(max_examples=50)
@given(stream=streams, epoch=st.integers(0, 10**9))
def test_each_epoch_sees_each_sample_once(stream, epoch):
    """The positions of one epoch hold every index exactly once."""
    begin = epoch * stream.num_samples
    everything = np.arange(begin, begin + stream.num_samples)
    assert {stream.epoch(position) for position in everything.tolist()} == {epoch}
    assert np.array_equal(np.sort(stream.indices(everything)), np.arange(stream.num_samples))


@settings(max_examples=50)
@given(stream=streams, begin=positions, first=st.integers(0, 50), second=st.integers(0, 50))
def test_reading_in_parts_is_reading_at_once(stream, begin, first, second):
    """a…b followed by b…c equals a…c, within an epoch and across epochs."""
    middle, end = begin + first, begin + first + second
    parts = [stream.indices(np.arange(begin, middle)), stream.indices(np.arange(middle, end))]
    assert np.array_equal(np.concatenate(parts), stream.indices(np.arange(begin, end)))


@settings(max_examples=50)
@given(stream=streams, begin=positions, swapped=st.randoms())
def test_positions_may_come_in_any_order(stream, begin, swapped):
    """The index at a position does not depend on the positions read with it."""
    line = np.arange(begin, begin + 20)
    order = list(range(20))
    swapped.shuffle(order)
    assert np.array_equal(stream.indices(line[order]), stream.indices(line)[order])


def test_epochs_and_seeds_differ():
    """Two epochs of one seed, and one epoch of two seeds, have different orders."""
    first, other = SampleStream(100, seed=1), SampleStream(100, seed=2)
    epoch_0, epoch_1 = np.arange(100), np.arange(100, 200)
    assert not np.array_equal(first.indices(epoch_0), first.indices(epoch_1))
    assert not np.array_equal(first.indices(epoch_0), other.indices(epoch_0))


def test_without_shuffling_the_order_is_the_datasets_own():
    """shuffle=False counts through the dataset again and again."""
    stream = SampleStream(3, seed=0, shuffle=False)
    assert stream.indices(np.arange(7)).tolist() == [0, 1, 2, 0, 1, 2, 0]


def test_the_callers_positions_are_left_alone():
    """Reading indices does not write into the array of positions."""
    line = np.arange(10)
    SampleStream(4, seed=0).indices(line)
    assert np.array_equal(line, np.arange(10))


def test_an_empty_dataset_is_refused():
    """There is no stream of no samples."""
    with pytest.raises(ConfigError, match="got 0"):
        SampleStream(0, seed=0)


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("num_samples", [1, 5, 1497, 5000])
def test_a_window_is_what_its_positions_say(num_samples, shuffle):
    """Read as one stretch or position by position, across blocks and epochs: the same indices."""
    stream = SampleStream(num_samples, seed=3, shuffle=shuffle)
    for start, count in ((0, 1), (1020, 9), (num_samples - 1, 3), (3 * num_samples + 1, 2 * num_samples + 5)):
        assert stream.window(start, count).tolist() == stream.indices(np.arange(start, start + count)).tolist()
