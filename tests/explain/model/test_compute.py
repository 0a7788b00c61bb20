"""The accounting of compute, against the figures that its sources print."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dptrain.errors import ConfigError
from dptrain.explain.model.compute import (
    PETAFLOP_S_DAY,
    SCALING_LAWS,
    Compute,
    flops_by_count,
    flops_by_time,
    trend_place,
)

DAY_S = 86_400
BUDGETS = st.floats(1e12, 1e30)

# Multiply-adds per image, images × epochs (× networks), and petaflop/s-days: "AI and Compute", appendix.
COUNTED = {
    "AlexNet": (0.75e9, 1.2e6 * 90, 0.0054),
    "VGG": (16e9, 1.2e6 * 74, 0.098),
    "ResNet-152": (11.4e9, 1.2e6 * 128, 0.117),
    "architecture search": (10e9, 5e4 * 50 * 12_800, 22),
}
# Devices, their peak in FLOP/s, days, and petaflop/s-days, at a utilisation of 0.33: the same appendix. For VGG it
# prints 0.12, from its product rounded up to 10,000 petaflop; the product itself is 8,725, which is 0.101.
TIMED = {
    "AlexNet": (2, 1.58e12, 5.5, 0.0058),
    "VGG": (4, 5.1e12, 15, 0.101),
    "Xception": (60, 8.5e12, 30, 5.0),
    "architecture search": (800, 4.2e12, 28, 31),
}


def _counted(name):
    macs, images, _ = COUNTED[name]
    return flops_by_count(macs_per_sample=macs, num_samples=images) / PETAFLOP_S_DAY


def _timed(name):
    devices, peak, days, _ = TIMED[name]
    flops = flops_by_time(num_devices=devices, peak_flops_per_s=peak, seconds=days * DAY_S)
    return flops / PETAFLOP_S_DAY


def test_a_petaflop_s_day():
    """10^15 operations in each of 86,400 seconds."""
    assert PETAFLOP_S_DAY == 8.64e19


@pytest.mark.parametrize("name", COUNTED)
def test_published_counts(name):
    """The source's own arithmetic, within 5 %: it rounds to two digits."""
    assert _counted(name) == pytest.approx(COUNTED[name][2], rel=0.05)


@pytest.mark.parametrize("name", TIMED)
def test_published_times(name):
    """The same by time of devices."""
    assert _timed(name) == pytest.approx(TIMED[name][3], rel=0.05)


@pytest.mark.parametrize("name", sorted(COUNTED.keys() & TIMED.keys()))
def test_the_methods_agree_as_well_as_their_source_claims(name):
    """Within a factor of 2."""
    assert Compute(by_count=_counted(name), by_time=_timed(name)).disagreement < 2


def test_a_method_that_is_not_known_has_no_disagreement():
    """On an unknown device there is one method only; and which is larger does not matter."""
    assert Compute(by_count=1.0, by_time=None).disagreement is None
    assert Compute(by_count=None, by_time=1.0).disagreement is None
    assert Compute(by_count=3.0, by_time=1.5).disagreement == Compute(by_count=1.5, by_time=3.0).disagreement == 2


@pytest.mark.parametrize(("law", "tokens_per_parameter"), [("Besiroglu 2024", 18.4), ("Hoffmann 2022", 92.6)])
def test_optimal_tokens_per_parameter_at_the_budget_of_chinchilla(law, tokens_per_parameter):
    """At 5.76e23 FLOPs, for both sets of coefficients."""
    num_parameters, num_tokens = SCALING_LAWS[law].optimum(5.76e23)
    assert num_tokens / num_parameters == pytest.approx(tokens_per_parameter, rel=0.01)


@given(budget=BUDGETS, law=st.sampled_from(sorted(SCALING_LAWS)), shift=st.floats(0.2, 5.0))
def test_the_optimum_spends_the_budget_and_is_one(budget, law, shift):
    """6·N·D is the budget, and no other split of it has a lower loss."""
    law = SCALING_LAWS[law]
    n, d = law.optimum(budget)
    assert 6 * n * d == pytest.approx(budget)
    best = law.loss(num_parameters=n, num_tokens=d)
    assert law.floor < best <= law.loss(num_parameters=n * shift, num_tokens=d / shift) * (1 + 1e-12)


@pytest.mark.parametrize("nothing", [0.0, -1.0, math.nan])
def test_no_budget_is_refused(nothing):
    """With the value."""
    with pytest.raises(ConfigError, match="budget"):
        SCALING_LAWS["Besiroglu 2024"].optimum(nothing)


def test_the_place_on_the_trend_of_ai_and_compute():
    """AlexNet is its first point; twelve months later the largest trainings took 2^(12/3.4), 11.5 times as much."""
    first, later = trend_place(0.0058 * PETAFLOP_S_DAY), trend_place(0.0058 * 2 ** (12 / 3.4) * PETAFLOP_S_DAY)
    assert first.doublings == pytest.approx(0)
    assert later.year - first.year == pytest.approx(1)
    assert later.petaflop_s_days == pytest.approx(0.0058 * 11.55, rel=1e-3)


def test_the_trend_says_nothing_outside_of_its_years():
    """Its last point, 300,000 times AlexNet, is in the end of 2017, which its doubling time agrees with."""
    assert trend_place(0.0058 * 2.99e5 * PETAFLOP_S_DAY).year == pytest.approx(2017.9, abs=0.1)
    assert trend_place(0.0058 * 3.01e5 * PETAFLOP_S_DAY).year is None
    below = trend_place(0.0029 * PETAFLOP_S_DAY)
    assert (below.year, below.doublings) == (None, pytest.approx(-1))
