"""What an hour of a device costs: the dated list that ships, a file of the user's, or the catalogue of gpuhunt."""

from __future__ import annotations

import importlib
import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, TypeGuard

from dptrain.cost.device_peaks import DEVICES, device_named
from dptrain.errors import ConfigError

GPUHUNT = "gpuhunt"
"""The word, and the package, that asks for its catalogue instead of a file."""

_SHIPPED = "prices.json"
_LARGEST_BYTES = 1 << 20
_FIELDS = ("source", "date", "currency", "minimum_rental_s", "prices")
_FORM = '{"currency": "EUR", "date": "2026-12-01", "prices": {"H100": 2.4, "L4": [0.6, 0.8]}}'

# Names and memory by which gpuhunt tells these from others. It calls PCIe and SXM cards of an A100 or H100 the same, so
# that a price of the PCIe cards cannot be had from it.
_GPUHUNT_NAMES: Mapping[str, tuple[str, float]] = {
    "V100": ("V100", 16),
    "V100-32GB": ("V100", 32),
    "T4": ("T4", 16),
    "A10": ("A10", 24),
    "A100": ("A100", 80),
    "A100-40GB": ("A100", 40),
    "H100": ("H100", 80),
    "H100-NVL": ("H100NVL", 94),
    "H200": ("H200", 141),
    "H200-NVL": ("H200NVL", 141),
    "L4": ("L4", 24),
    "L40S": ("L40S", 48),
    "RTX4090": ("RTX4090", 24),
    "B200": ("B200", 180),
}
_GPUHUNT_MEMORY_SLACK = 0.1
"""GB and GiB, and memory that a provider keeps back."""


@dataclass(frozen=True, kw_only=True)
class Offer:
    """One provider's price of one device.

    Attributes:
        provider: its name, with the product.
        per_hour: of one device, in the list's currency.
        read: the date on which that was read, as text.
    """

    provider: str
    per_hour: float
    read: str


@dataclass(frozen=True, kw_only=True)
class DevicePrice:
    """What an hour of one device costs.

    Attributes:
        low: the cheapest offer.
        typical: the median of the offers, which is what is planned with.
        high: the dearest offer.
        providers: of the cheapest and of the dearest offer.
        read: when the offers were read, as text: one date, or the oldest and the newest.
    """

    low: float
    typical: float
    high: float
    providers: tuple[str, str]
    read: str

    @classmethod
    def given(cls, per_hour: float) -> DevicePrice:
        """Return the one price that a user gave."""
        return cls(low=per_hour, typical=per_hour, high=per_hour, providers=("as given", "as given"), read="")


@dataclass(frozen=True, kw_only=True)
class PriceList:
    """Prices of devices on demand.

    Attributes:
        source: where they are from, in words.
        date: of the list, as text.
        currency: of all prices, such as USD.
        minimum_rental_s: the shortest time that is billed.
        offers: by the short name of the device.
    """

    source: str
    date: str
    currency: str
    minimum_rental_s: float
    offers: Mapping[str, tuple[Offer, ...]]

    def of(self, device: str) -> DevicePrice:
        """Return the price of a device.

        Raises:
            ConfigError: where the list has none.
        """
        found = sorted(self.offers.get(device, ()), key=lambda offer: offer.per_hour)
        if not found:
            listed = ", ".join(self.offers) or "none"
            raise ConfigError(
                f"no price of the {device} in the list of {self.date} ({self.source}): give --price-per-gpu-hour, or "
                f"a file with --prices (priced devices: {listed})"
            )
        dates = sorted({offer.read for offer in found})
        return DevicePrice(
            low=found[0].per_hour,
            typical=statistics.median(offer.per_hour for offer in found),
            high=found[-1].per_hour,
            providers=(found[0].provider, found[-1].provider),
            read=dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}",
        )

    def in_currency(self, currency: str, *, rate: float) -> PriceList:
        """Return the same prices in another currency.

        Args:
            currency: its name.
            rate: how much of it one unit of the present currency is.
        """
        offers = {
            device: tuple(replace(offer, per_hour=rate * offer.per_hour) for offer in found)
            for device, found in self.offers.items()
        }
        return replace(self, currency=currency, offers=offers)


def shipped_prices() -> PriceList:
    """Return the list that comes with the package; its date says how old it is."""
    text = resources.files("dptrain.cost").joinpath(_SHIPPED).read_text(encoding="utf-8")
    return _price_list(json.loads(text), name="the list that comes with dptrain")


def prices_of(path: Path) -> PriceList:
    """Read a JSON file of prices, in the form of the one that ships; a price may be a number or a list of numbers.

    Raises:
        ConfigError: where it cannot be read, or has a device that is not listed or a price that is not positive.
    """
    try:
        if path.stat().st_size > _LARGEST_BYTES:
            raise ConfigError(f"{path} has more than {_LARGEST_BYTES:,} bytes, too many for prices")
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read prices from {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON ({error}); prices look like {_FORM}") from error
    return _price_list(found, name=str(path))


def gpuhunt_prices(*, date: str) -> PriceList:
    """Return the offers on demand of gpuhunt's catalogue, which it downloads.

    Args:
        date: of today, as text.

    Raises:
        ConfigError: where the package is not installed, or has no catalogue.
    """
    try:
        gpuhunt = importlib.import_module(GPUHUNT)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"--prices {GPUHUNT} needs the package {error.name}, which is not installed: pip install {GPUHUNT}; or "
            f"give a file of prices"
        ) from error
    try:
        items = gpuhunt.query(gpu_name=sorted({name for name, _ in _GPUHUNT_NAMES.values()}), spot=False)
    except Exception as error:
        raise ConfigError(
            f"{GPUHUNT} could not load its catalogue ({type(error).__name__}: {error}): it needs the internet; leave "
            f"out --prices for the list that comes with dptrain"
        ) from error
    offers: dict[str, list[Offer]] = {}
    for item in items:
        device = _device_of_item(item)
        if device is not None:
            per_hour = item.price / item.gpu_count
            offers.setdefault(device, []).append(
                Offer(provider=f"{item.provider} {item.instance_name}", per_hour=per_hour, read=date)
            )
    return PriceList(
        source=f"{GPUHUNT}, on demand",
        date=date,
        currency="USD",
        minimum_rental_s=60.0,
        offers={device: tuple(found) for device, found in offers.items()},
    )


def _device_of_item(item: Any) -> str | None:  # noqa: ANN401 - of a package without types
    if not (item.gpu_count and item.price and item.gpu_memory):
        return None
    for device, (name, memory_gb) in _GPUHUNT_NAMES.items():
        if item.gpu_name == name and math.isclose(item.gpu_memory, memory_gb, rel_tol=_GPUHUNT_MEMORY_SLACK):
            return device
    return None


def _price_list(found: object, *, name: str) -> PriceList:
    if not isinstance(found, dict) or not isinstance(found.get("prices"), dict) or not found["prices"]:
        raise ConfigError(f"{name} holds no prices; they look like {_FORM}")
    unknown = sorted(set(found) - set(_FIELDS))
    if unknown:
        raise ConfigError(f"{name}: no field {unknown[0]!r} (fields: {', '.join(_FIELDS)})")
    date, currency = (found.get(key, default) for key, default in (("date", "no date"), ("currency", "USD")))
    if not (isinstance(date, str) and isinstance(currency, str) and currency):
        raise ConfigError(f"{name}: date and currency are texts, got {date!r} and {currency!r}")
    minimum = found.get("minimum_rental_s", 0)
    if not _is_number(minimum) or minimum < 0:
        raise ConfigError(f"{name}: minimum_rental_s is a number of seconds of at least 0, got {minimum!r}")
    offers = {}
    for text, prices in found["prices"].items():
        device, _ = device_named(text)
        listed = prices if isinstance(prices, list) else [prices]
        offers[device] = tuple(_offer(price, device=device, name=name, date=date) for price in listed)
    return PriceList(
        source=str(found.get("source", name)),
        date=date,
        currency=currency,
        minimum_rental_s=float(minimum),
        offers={device: offers[device] for device in DEVICES if device in offers},
    )


def _offer(price: object, *, device: str, name: str, date: str) -> Offer:
    fields = price if isinstance(price, dict) else {"per_gpu_hour": price}
    per_hour = fields.get("per_gpu_hour")
    if not _is_number(per_hour) or not per_hour > 0:
        raise ConfigError(f"{name}: a price per hour of the {device} must be a positive number, got {per_hour!r}")
    provider, read = str(fields.get("provider", name)), str(fields.get("read", date))
    return Offer(provider=provider, per_hour=float(per_hour), read=read)


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
