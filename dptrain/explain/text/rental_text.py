"""Three questions of those who pay, answered in two sentences each: the answer with its range, and what it assumes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dptrain.explain.model.hardware.rentals import Rental, cheapest_within, fastest_below, rental, rentals
from dptrain.explain.model.model_sizes import optimal_sizes
from dptrain.explain.text import plan_text
from dptrain.explain.text.findings import count, short

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dptrain.explain.model.plan import Plan


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One question with its answer.

    Attributes:
        question: in words.
        answer: a sentence with time, money and their ranges.
        assumes: a sentence with what that rests on.
    """

    question: str
    answer: str
    assumes: str


def answers(plans: Sequence[Plan], *, within_s: float, budget: float, prices: str) -> list[Answer]:
    """Answer how long and how much, what is cheapest within a time, and what is fastest below a budget.

    Args:
        plans: one for each device, all with a price; the first is asked about in the first question.
        within_s: of the second question.
        budget: of the third, in the currency of the plans.
        prices: where they are from and of which date, in words.
    """
    first, found = plans[0], rentals(plans)
    at_knee = rental(first, min(first.points, key=lambda point: abs(point.num_devices / first.knee - 1)))
    time, money = plan_text.about(within_s), plan_text.money(first, budget)
    return [
        Answer(
            question=f"How long does it take on {first.device}s, and what does it cost?",
            answer=f"{_reported(at_knee)}, at the knee of time against devices",
            assumes=_assumes(at_knee, prices=prices),
        ),
        _chosen(
            f"What is the cheapest within {time}?",
            cheapest_within(found, within_s),
            otherwise=fastest_below(found, float("inf")),
            none=f"Nothing that was planned takes less than {time}; the fastest is",
            prices=prices,
        ),
        _chosen(
            f"What is the fastest below {money}?",
            fastest_below(found, budget),
            otherwise=cheapest_within(found, float("inf")),
            none=f"Nothing that was planned costs less than {money}; the cheapest is",
            prices=prices,
        ),
    ]


def _chosen(question: str, one: Rental | None, *, otherwise: Rental | None, none: str, prices: str) -> Answer:
    found = one or otherwise
    if found is None:
        raise AssertionError("a plan has at least one point")
    reported = _reported(found)
    answer = reported if one is not None else f"{none} {reported}"
    return Answer(question=question, answer=answer, assumes=_assumes(found, prices=prices))


def _reported(one: Rental) -> str:
    (fast, slow), (low, high) = one.point.seconds_range, one.cost_range
    cost, least, most = (plan_text.money(one.plan, value) for value in (one.cost, low, high))
    return (
        f"{_rented(one)}: {plan_text.about(one.point.seconds)} [{plan_text.about(fast)}, {plan_text.about(slow)}] and "
        f"{cost} [{least}, {most}]"
    )


def _assumes(one: Rental, *, prices: str) -> str:
    plan = one.plan
    billed = f"a rental of at least {plan_text.about(plan.minimum_rental_s)}" if plan.minimum_rental_s else ""
    price = plan.price
    of_price = ""
    if price is not None:
        of_price = f"{plan_text.money(plan, price.typical)} per {plan.device}-hour"
        if price.high > price.low:
            of_price += f" [{plan_text.money(plan, price.low)}, {plan_text.money(plan, price.high)}]"
        of_price += f" ({prices}, read {price.read})" if price.read else f" ({prices})"
    speed = plan.assumptions or (f"the step times of the run on {plan.device}s",)
    batch = f"the run's noise scale and a learning rate that suits a batch of {one.point.global_batch_size:,}"
    return f"This assumes {'; '.join(part for part in (*speed, of_price, billed, batch) if part)}"


def _rented(one: Rental) -> str:
    return count(one.point.num_devices, one.plan.device)


def comparison(plans: Sequence[Plan]) -> list[tuple[str, ...]]:
    """Return a row for each device: its name, its cheapest point and its knee, each with devices, time and cost."""
    rows = []
    for plan in plans:
        cheapest = min(plan.points, key=lambda point: (point.cost or 0.0, point.seconds))
        knee = min(plan.points, key=lambda point: abs(point.num_devices / plan.knee - 1))
        cells = [
            cell
            for point in (cheapest, knee)
            for cell in (f"{point.num_devices:,}", plan_text.about(point.seconds), plan_text.price(plan, point))
        ]
        rows.append((plan.device, *cells))
    return rows


def sizes(plan: Plan) -> str | None:
    """Say what the run's compute would pay for, beside what it trained; None where no law applies."""
    paid = plan.paid_sizes
    if paid is None:
        return None
    by_law = " or ".join(
        f"{_size(size.num_parameters)} parameters on {_size(size.num_tokens)} tokens ({size.law})"
        for size in paid.optimal
    )
    family = "" if paid.nearest is None else f"; the nearest ready-made {paid.family} is {paid.nearest}"
    fitted = "" if paid.is_fitted else "; an extrapolation, the laws were fitted to 6e18 to 3e21 FLOPs of text tokens"
    return (
        f"The run trained {_size(paid.num_parameters)} parameters on {_size(paid.num_tokens)} tokens; the same compute "
        f"({paid.flops:.2g} FLOPs) would pay for {by_law}{family}{fitted}"
    )


def sizes_of_budget(plan: Plan, budget: float) -> str | None:
    """Say which model a budget would train from the start, were it of the run's kind; None where no law applies."""
    if plan.paid_sizes is None or plan.price is None or plan.flops_per_s is None:
        return None
    hours = budget / plan.price.typical
    flops = hours * 3600 * plan.flops_per_s
    paid = optimal_sizes(flops)
    by_law = " or ".join(
        f"{_size(size.num_parameters)} parameters on {_size(size.num_tokens)} tokens ({size.law})" for size in paid
    )
    return (
        f"A language model for {plan_text.money(plan, budget)}: {short(hours, digits=2)} {plan.device}-hours compute "
        f"{flops:.2g} FLOPs at the planned utilisation, which pay for {by_law}"
    )


def _size(number: float) -> str:
    for unit, name in ((1e12, " trillion"), (1e9, " billion"), (1e6, " million")):
        if number >= unit:
            return f"{short(number / unit)}{name}"
    return short(number)


def trend(plan: Plan) -> str | None:
    """Say where the run's compute lies on the trend of "AI and Compute"; None where it was not counted."""
    place = plan.trend
    if place is None:
        return None
    source = "the trend of AI and Compute (Amodei and Hernandez 2018), doubling every 3.4 months from 2012 to 2018"
    amount = f"{place.petaflop_s_days:.2g} petaflop/s-days"
    if place.year is not None:
        return f"{amount}: what the largest trainings took in {place.year:.1f}, by {source}"
    where = f"{abs(place.doublings):.1f} doublings {'below its first' if place.doublings < 0 else 'above its first'}"
    return f"{amount}: outside {source}; {where} point, AlexNet"
