"""Prices of devices: the list that ships, files of the user's, gpuhunt's catalogue; each with its refusals."""

from __future__ import annotations

import datetime as dt
import json
import sys
from types import SimpleNamespace

import pytest

from dptrain.cost.device_peaks import DEVICES
from dptrain.cost.prices import gpuhunt_prices, prices_of, shipped_prices
from dptrain.errors import ConfigError


def _file(tmp_path, content):
    path = tmp_path / "prices.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_the_list_that_ships_is_dated_and_sourced():
    """Each offer names its provider and the date on which it was read, none after that of the list."""
    found = shipped_prices()
    last = dt.date.fromisoformat(found.date)
    assert {"H100", "H200", "A100", "L4"} <= set(found.offers) <= set(DEVICES)
    assert found.currency == "USD"
    for offers in found.offers.values():
        for offer in offers:
            assert offer.provider
            assert dt.date.fromisoformat(offer.read) <= last
            assert 0.1 < offer.per_hour < 20


def test_the_median_of_the_offers_is_planned_with(tmp_path):
    """Of 1, 2 and 9 it is 2; of 1 and 2 it is 1.5; the ends are the range."""
    found = prices_of(
        _file(tmp_path, {"currency": "EUR", "date": "2026-12-01", "prices": {"h100": [9, 1, 2], "L4": [1, 2]}})
    )
    price = found.of("H100")
    assert (price.low, price.typical, price.high, price.read) == (1, 2, 9, "2026-12-01")
    assert found.of("L4").typical == 1.5
    assert (found.currency, found.minimum_rental_s) == ("EUR", 0)


def test_another_currency_is_a_factor_on_all_prices(tmp_path):
    """0.92 EUR for a dollar: 2 $ are 1.84 EUR."""
    found = prices_of(_file(tmp_path, {"prices": {"H100": 2}})).in_currency("EUR", rate=0.92)
    assert found.of("H100").typical == pytest.approx(1.84)
    assert found.currency == "EUR"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ({}, "holds no prices"),
        ([1], "holds no prices"),
        ({"prices": {"H100": -1}}, "of the H100 must be a positive number, got -1"),
        ({"prices": {"H100": 0}}, "got 0"),
        ({"prices": {"H100": "2"}}, "got '2'"),
        ({"prices": {"H100": True}}, "got True"),
        ({"prices": {"H10": 2}}, "no device 'H10' is listed; did you mean H100"),
        ({"prices": {"H100": 2}, "price": 1}, "no field 'price'"),
        ({"prices": {"H100": 2}, "minimum_rental_s": -5}, "of at least 0, got -5"),
        ({"prices": {"H100": 2}, "currency": 5}, "are texts"),
    ],
)
def test_a_file_that_makes_no_sense_is_refused(tmp_path, content, message):
    """With the value."""
    with pytest.raises(ConfigError, match=message):
        prices_of(_file(tmp_path, content))


def test_a_file_that_is_not_there_is_named(tmp_path):
    """As an error of the user's, and so is a device that has no price."""
    with pytest.raises(ConfigError, match=r"cannot read prices from .*none\.json"):
        prices_of(tmp_path / "none.json")
    with pytest.raises(ConfigError, match=r"no price of the L4 .*priced devices: H100"):
        prices_of(_file(tmp_path, {"prices": {"H100": 2}})).of("L4")


def _item(name, *, memory, price, count=1):
    return SimpleNamespace(
        gpu_name=name, gpu_memory=memory, gpu_count=count, price=price, provider="someone", instance_name="big"
    )


def test_gpuhunt_is_read_where_it_is_installed(monkeypatch):
    """Per GPU, by name and memory; what is not listed or has no price is left out."""
    items = [
        _item("H100", memory=80.0, price=24.0, count=8),
        _item("A100", memory=40.0, price=1.0),
        _item("A100", memory=80.0, price=2.0),
        _item("K80", memory=12.0, price=0.1),
        _item(None, memory=None, price=0.1, count=0),
    ]
    asked = {}
    monkeypatch.setitem(sys.modules, "gpuhunt", SimpleNamespace(query=lambda **options: asked.update(options) or items))
    found = gpuhunt_prices(date="2026-12-01")
    assert asked["spot"] is False
    assert {name: found.of(name).typical for name in found.offers} == {"H100": 3.0, "A100-40GB": 1.0, "A100": 2.0}
    assert found.of("H100").read == "2026-12-01"


def test_gpuhunt_that_is_missing_or_offline_is_an_error_with_its_name(monkeypatch):
    """Never a guess in its place."""
    monkeypatch.setitem(sys.modules, "gpuhunt", None)
    with pytest.raises(ConfigError, match=r"needs the package gpuhunt, which is not installed: pip install gpuhunt"):
        gpuhunt_prices(date="2026-12-01")

    def offline(**_):
        raise OSError("no route")

    monkeypatch.setitem(sys.modules, "gpuhunt", SimpleNamespace(query=offline))
    with pytest.raises(ConfigError, match=r"gpuhunt could not load its catalogue \(OSError: no route\)"):
        gpuhunt_prices(date="2026-12-01")
