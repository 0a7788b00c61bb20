"""Proves the closed forms of the noise scale against each other, against their limits and against simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dptrain.noise.derived import (
    efficiency,
    expert_noise_scale,
    gain,
    learning_rate_share,
    routed_noise_scale,
)

PHI = st.floats(0, 1e9)
BATCH = st.floats(1, 1e7)


@given(phi=PHI, batch=BATCH, scale=st.floats(1, 1e3))
@settings(derandomize=True)
def test_adascale_pollux_and_mccandlish_agree(phi, batch, scale):
    """AdaScale's gain = scale × Pollux's efficiency = the ratio of the two best learning rates, from 1 to the scale."""
    larger = scale * batch
    r = gain(phi, batch=larger, reference_batch=batch)
    adascale = (phi / batch + 1) / (phi / batch / scale + 1)
    rates = learning_rate_share(phi, batch=larger) / learning_rate_share(phi, batch=batch)
    assert r == pytest.approx(adascale)
    assert r == pytest.approx(rates)
    assert 1 - 1e-12 <= r <= scale * (1 + 1e-12)


def test_the_published_form_of_the_gain():
    """φ = 300, B0 = 32, s = 8 gives 4.776978."""
    assert gain(300, batch=256, reference_batch=32) == pytest.approx(4.776978, abs=1e-6)


def test_the_best_learning_rate_of_a_quadratic():
    """Shifted quadratic at B = 7: 1/(1 + φ/B) of the noiseless best rate is 0.2412266, and it is the best rate."""
    h, c, delta = np.array([4, 1, 0.5, 0.1]), np.array([1, 2, 3, 4]), np.array([1, -1, 2, 3])
    g = h * delta
    rate_max = (g @ g) / (g @ (h * g))
    with_curvature = (h * h * c * h).sum() / (g @ (h * g))
    best = rate_max * learning_rate_share(with_curvature, batch=7)
    assert best == pytest.approx(0.2412266, abs=1e-7)

    def decrease(rate):
        return rate * (g @ g) - rate**2 / 2 * (g @ (h * g) + (h * h * c * h).sum() / 7)

    assert decrease(best) == pytest.approx(2.1818951, abs=1e-7)
    assert decrease(2 * best) == pytest.approx(0, abs=1e-12)
    assert decrease(best) > max(decrease(0.99 * best), decrease(1.01 * best))


@given(phi=PHI, batch=BATCH, factor=st.floats(1, 100))
@settings(derandomize=True)
def test_a_larger_batch_buys_less_per_sample_and_more_per_step(phi, batch, factor):
    """Efficiency never rises with the batch; the share of the best step never falls."""
    larger = factor * batch
    assert efficiency(phi, batch=larger, reference_batch=batch) <= 1
    assert learning_rate_share(phi, batch=larger) >= learning_rate_share(phi, batch=batch)


def test_the_limits():
    """No noise: every step is a full step. Noise alone: every sample counts the same. Infinity is allowed."""
    assert learning_rate_share(0, batch=8) == 1
    assert gain(0, batch=64, reference_batch=8) == 1
    assert learning_rate_share(math.inf, batch=8) == 0
    assert efficiency(math.inf, batch=64, reference_batch=8) == 1
    assert gain(math.inf, batch=64, reference_batch=8) == 8


@pytest.mark.parametrize("probability", [0.5, 1 / 16, 1.0])
def test_an_expert_counts_the_choice_of_routing_as_noise(probability):
    """(φ_h + 1 − p)/p is the noise scale of rh, r being 1 with probability p, by enumeration; and back."""
    generator = np.random.default_rng(3)
    h = generator.normal(size=(400, 6)) + 0.4
    mean = h.mean(0)
    phi_routed = ((h - mean) ** 2).sum(1).mean() / (mean @ mean)
    # Each gradient comes with weight p, and zero with weight 1 − p.
    second, first = probability * (h**2).sum(1).mean(), probability * mean
    exact = (second - first @ first) / (first @ first)
    assert expert_noise_scale(phi_routed, probability=probability) == pytest.approx(exact)
    assert routed_noise_scale(exact, probability=probability) == pytest.approx(phi_routed)
