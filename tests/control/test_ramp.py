"""The batch warm-up: its two shapes, its ends, and its length in tokens."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dptrain.control import Measurement, Ramp
from dptrain.errors import ConfigError

sizes = st.integers(1, 10**5)


def batch_at(ramp, position):
    measurement = Measurement(samples_seen=position, global_batch_size=1, noise_scale=None)
    return ramp.decide(measurement).global_batch_size


@given(
    first=sizes,
    last=sizes,
    num_samples=sizes,
    seen=st.integers(0, 2 * 10**5),
    shape=st.sampled_from(["linear", "doubling"]),
)
def test_ends_and_order(first, last, num_samples, seen, shape):
    """From the first batch to the last, never outside of the two, never backwards, and the last from the end on."""
    ramp = Ramp(first=first, last=last, num_samples=num_samples, shape=shape)
    here, later = batch_at(ramp, seen), batch_at(ramp, seen + 1)
    assert batch_at(ramp, 0) == first
    assert batch_at(ramp, num_samples) == batch_at(ramp, 3 * num_samples) == last
    assert min(first, last) <= here <= max(first, last)
    assert (later - here) * (last - first) >= 0


def test_linear():
    """A quarter of the way a straight line has gone a quarter of the way."""
    assert batch_at(Ramp(first=100, last=500, num_samples=1000), 250) == 200


def test_doubling():
    """From 8 to 64 there are three doublings, after equal numbers of samples."""
    ramp = Ramp(first=8, last=64, num_samples=3000, shape="doubling")
    assert [batch_at(ramp, p) for p in (0, 999, 1000, 1999, 2000, 2999, 3000)] == [8, 8, 16, 16, 32, 32, 64]
    down = Ramp(first=64, last=8, num_samples=3000, shape="doubling")
    assert [batch_at(down, p) for p in (0, 1000, 2000, 3000)] == [64, 32, 16, 8]


def test_over_tokens():
    """A warm-up over tokens is one over as many samples as hold them."""
    ramp = Ramp.over_tokens(first=8, last=64, num_tokens=4096 * 1000, tokens_per_sample=4096, shape="doubling")
    assert ramp == Ramp(first=8, last=64, num_samples=1000, shape="doubling")


@pytest.mark.parametrize("settings", [{"first": 0}, {"last": 0}, {"num_samples": 0}, {"shape": "cosine"}], ids=str)
def test_settings_out_of_range(settings):
    """Sizes below one sample and unknown shapes are refused."""
    with pytest.raises(ConfigError):
        Ramp(**{"first": 8, "last": 64, "num_samples": 100, **settings})
    with pytest.raises(ConfigError):
        Ramp.over_tokens(first=8, last=64, num_tokens=100, tokens_per_sample=0)
