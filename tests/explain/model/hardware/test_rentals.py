"""Which devices to rent, on plans whose times and costs are made up."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dptrain.cost.prices import DevicePrice
from dptrain.errors import ConfigError
from dptrain.explain.model.hardware.devices import devices
from dptrain.explain.model.hardware.rentals import cheapest_within, fastest_below, rental, rentals
from dptrain.explain.model.plan import make_plan
from tests.ideal_runs import ideal_record

PRICE = DevicePrice(low=1.0, typical=2.0, high=6.0, providers=("a", "b"), read="2026-01-01")


@pytest.fixture(scope="module")
def plan():
    """2 $ an hour: 1, 2 and 4 devices take 10 h, 6 h and 5.8 h, for 20 $, 24 $ and 46.4 $."""
    record = ideal_record()
    made = make_plan(record, devices(record), numbers=[1, 2, 4], price=PRICE, minimum_rental_s=1800.0)
    hours = {1: 10.0, 2: 6.0, 4: 5.8}
    points = tuple(
        replace(
            point,
            seconds=3600 * hours[point.num_devices],
            seconds_range=(3600.0 * 0.25, 3600.0 * 20),
            cost=2.0 * point.num_devices * hours[point.num_devices],
        )
        for point in made.points
    )
    return replace(made, points=points)


@pytest.mark.parametrize(("hours", "num_devices"), [(100, 1), (10, 1), (9.9, 2), (6, 2), (5.9, 4), (5, None)])
def test_the_cheapest_within_a_time(plan, hours, num_devices):
    """Fewer devices are cheaper and slower; where none is in time there is none."""
    found = cheapest_within(rentals([plan]), 3600.0 * hours)
    assert (None if found is None else found.point.num_devices) == num_devices


@pytest.mark.parametrize(("budget", "num_devices"), [(100, 2), (30, 2), (23, 1), (20, 1), (19, None)])
def test_the_fastest_below_a_budget(plan, budget, num_devices):
    """Four devices are 3 % faster than two for twice the money, which nobody is advised to pay."""
    found = fastest_below(rentals([plan]), float(budget))
    assert (None if found is None else found.point.num_devices) == num_devices


def test_the_range_of_a_cost_is_that_of_time_and_of_offers(plan):
    """Two devices: 2 × 0.5 h at least at 1 $ (a quarter of an hour is billed as half of one), 2 × 20 h at 6 $."""
    found = rental(plan, plan.points[1])
    assert found.cost == 24.0
    assert found.cost_range == (pytest.approx(1.0), pytest.approx(240.0))


def test_several_plans_compete(plan):
    """The same device at half the price wins."""
    cheap = replace(plan, price=DevicePrice.given(1.0), points=tuple(replace(p, cost=p.cost / 2) for p in plan.points))
    assert cheapest_within(rentals([plan, cheap]), 1e9).plan is cheap


def test_a_plan_without_a_price_costs_nothing_known(plan):
    """And that is said."""
    with pytest.raises(ConfigError, match="has no price"):
        rentals([replace(plan, price=None)])
