"""The expected gain of a batch against the closed form and at its limits, and the prior of the critical ratio."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dptrain.control import CriticalRatio
from dptrain.control.progress_rate import gain, quantiles
from tests.control.known import AtLeast, Known, Unknown

EXACT = CriticalRatio(median=1.0, spread=1.0)
batches, phis = st.integers(1, 10**6), st.floats(1e-3, 1e7)


def of(phi, *, present, other, critical_ratio=EXACT, time=(0.0, 0.0)):
    return gain(present=present, other=other, noise_scales=quantiles(phi), critical_ratio=critical_ratio, time=time)


@given(phi=phis, kappa=st.floats(0.1, 10), present=batches, other=batches, log_time=st.floats(-5, 5))
def test_exact_inputs_give_the_closed_form(phi, kappa, present, other, log_time):
    """With φ, κ and T known it is the difference of ln b − ln(b + κφ) − ln T, with no spread."""
    found = of(
        Known(phi),
        present=present,
        other=other,
        critical_ratio=CriticalRatio(median=kappa, spread=1.0),
        time=(log_time, 0.0),
    )
    rate = {b: math.log(b) - math.log(b + kappa * phi) for b in (present, other)}
    assert found.mean == pytest.approx(rate[other] - rate[present] - log_time, abs=1e-9)
    assert found.noise_sd == pytest.approx(0, abs=1e-7)
    assert found.time_sd == 0


@given(present=batches, other=batches)
def test_the_limits_of_the_noise_scale_are_finite(present, other):
    """At φ = 0 a larger batch is no progress, at φ = ∞ it is all progress, and where nothing is known it is half."""
    most = math.log(other / present)
    assert of(Known(0.0), present=present, other=other).mean == pytest.approx(0, abs=1e-9)
    assert of(Known(math.inf), present=present, other=other).mean == pytest.approx(most)
    assert of(Unknown(), present=present, other=other).mean == pytest.approx(most / 2)


def test_the_spread_is_that_of_the_noise_scale():
    """The deviation is the slope of the gain times that of ln φ: 0.17 for a double at √2 times the present batch."""
    phi, spread = 64 * math.sqrt(2), 1.05
    found = of(Known(phi, spread), present=64, other=128)
    slope = phi / (64 + phi) - phi / (128 + phi)
    assert slope == pytest.approx(0.1716, abs=1e-4)
    assert found.noise_sd == pytest.approx(slope * math.log(spread), rel=0.1)
    assert found.lower(2.0) == pytest.approx(found.mean - 2 * found.noise_sd)


def test_the_time_adds_its_variance():
    """The lower bound holds both uncertainties, as the root of the sum of squares."""
    found = of(Known(64.0, 1.5), present=64, other=128, time=(0.1, 0.09))
    assert found.time_sd == pytest.approx(0.3)
    assert found.lower(1.0) == pytest.approx(found.mean - math.hypot(found.noise_sd, 0.3))


def test_ten_quantiles_stand_for_the_distribution():
    """They rise in pairs round the median, and where φ is open above the upper ones are infinite."""
    assert sorted(quantiles(Known(100.0, 2.0)))[4:6] == pytest.approx([100 / 2**0.1257, 100 * 2**0.1257], rel=1e-3)
    assert quantiles(AtLeast(100.0, 2.0, open_from=0.5)).count(math.inf) == 3


@given(phi=phis, spread=st.floats(1, 5))
def test_a_spread_of_kappa_widens_nothing(phi, spread):
    """The prior of κ enters the mean alone, for no step narrows it."""
    found = of(Known(phi), present=64, other=128, critical_ratio=CriticalRatio(spread=spread))
    assert found.noise_sd == pytest.approx(0, abs=1e-7)


@given(st.floats(0.01, 100), st.floats(1, 10))
def test_the_nodes_have_the_moments_of_the_prior(median, spread):
    """Weights add up to 1, and mean, variance and fourth moment of ln κ are those of a normal."""
    nodes = CriticalRatio(median=median, spread=spread).nodes
    logs = [(math.log(kappa / median), weight) for kappa, weight in nodes]
    sigma = math.log(spread)
    assert sum(weight for _, weight in logs) == pytest.approx(1)
    assert sum(weight * x for x, weight in logs) == pytest.approx(0, abs=1e-9)
    assert sum(weight * x**2 for x, weight in logs) == pytest.approx(sigma**2, abs=1e-12)
    assert sum(weight * x**4 for x, weight in logs) == pytest.approx(3 * sigma**4, abs=1e-12)
