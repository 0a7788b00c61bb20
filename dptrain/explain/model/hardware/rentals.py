"""Which devices to rent for a training: the cheapest within a time, the fastest below a budget; makes no plan."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dptrain.errors import ConfigError
from dptrain.explain.model.planner import NO_GAIN

if TYPE_CHECKING:
    from dptrain.explain.model.plan import Plan
    from dptrain.explain.model.planner import Point

_HOUR_S = 3600.0


@dataclass(frozen=True, kw_only=True)
class Rental:
    """A number of devices of one kind, rented until the target is reached.

    Attributes:
        plan: that it is of, with the device and the assumptions.
        point: of the plan, with the number of devices and the time.
        cost: at the typical price, in the currency of the plan.
        cost_range: by the cheapest and the dearest offer, and both ends of the time's range.
    """

    plan: Plan
    point: Point
    cost: float
    cost_range: tuple[float, float]


def rental(plan: Plan, point: Point) -> Rental:
    """Return what a point of a plan costs.

    Raises:
        ConfigError: where the plan has no price.
    """
    if plan.price is None or point.cost is None:
        raise ConfigError(f"the {plan.device} has no price: give --price-per-gpu-hour, --device or --prices")
    hours = [point.num_devices * max(end, plan.minimum_rental_s) / _HOUR_S for end in point.seconds_range]
    return Rental(
        plan=plan, point=point, cost=point.cost, cost_range=(plan.price.low * hours[0], plan.price.high * hours[1])
    )


def rentals(plans: Iterable[Plan]) -> list[Rental]:
    """Return every point of every plan as a rental."""
    return [rental(plan, point) for plan in plans for point in plan.points]


def cheapest_within(found: Sequence[Rental], seconds: float) -> Rental | None:
    """Return the cheapest rental that takes no longer, the faster of equally cheap ones; None where all take longer."""
    in_time = [one for one in found if one.point.seconds <= seconds]
    return min(in_time, key=lambda one: (one.cost, one.point.seconds), default=None)


def fastest_below(found: Sequence[Rental], budget: float) -> Rental | None:
    """Return the fastest rental that costs no more; None where all cost more.

    Of those that take less than 5 % longer than the fastest the cheapest is taken: where time is nearly flat, the last
    per cent of it costs a multiple.
    """
    affordable = [one for one in found if one.cost <= budget]
    if not affordable:
        return None
    least = min(one.point.seconds for one in affordable)
    fast = [one for one in affordable if one.point.seconds <= NO_GAIN * least]
    return min(fast, key=lambda one: (one.cost, one.point.seconds))
