"""The sentences of a plan for a terminal or a figure: result, uncertainty, and what it is based on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dptrain.cost.ledger import PETAFLOP_S_DAY
from dptrain.explain.model.compute import UTILISATION
from dptrain.explain.text.findings import count, short

if TYPE_CHECKING:
    from collections.abc import Callable

    from dptrain.explain.model.plan import Plan
    from dptrain.explain.model.planner import Point

_MINUTE_S, _HOUR_S, _DAY_S = 60.0, 3600.0, 86_400.0
_KWH_J = 3.6e6

NO_OPTIMUM = (
    "The noise scale is not the optimal batch size: it typically differs from the critical batch size by a factor of "
    "six (tasks in McCandlish et al. 2018). `dptrain branch` measures the critical batch size of this run."
)


def headline(plan: Plan) -> str:
    """Say what two numbers of devices take, and where more of them stop to pay."""
    return "; ".join([*(_point(plan, point) for point in _telling(plan)), _end(plan)])


def goal(plan: Plan) -> str:
    """Say which loss is meant, and where it lies."""
    if plan.samples_of_run is not None:
        where = f"reached by the run after {plan.samples_of_run:,.0f} samples"
    else:
        where = f"extrapolated: the run reached {plan.lowest:.4g}"
    return f"Target: {plan.loss} {plan.target:.4g}, {where}"


def doubt(plan: Plan) -> str:
    """Say how sure samples and times are: by what was measured, and by how the method fared elsewhere."""
    point = _telling(plan)[0]
    measured, history = (f"{about(low)}–{about(high)}" for low, high in (point.seconds_range, point.seconds_history))
    seen = " to ".join(short(end) for end in point.samples_range)
    return (
        f"Time on {_devices(plan, point.num_devices)}: {measured} for {seen} samples (noise scale, critical ratio "
        f"and fits); {history} if the noise scale is off by 6× (typical in McCandlish et al. 2018)"
    )


def trade_off(plan: Plan) -> str:
    """Say the fewest steps and samples, and the batch between the two, with what it is to the noise scale."""
    low, high = (short(value, digits=2) for value in plan.twice_both_range)
    times = "" if plan.critical_ratio == 1 else f", {short(plan.critical_ratio)}× the noise scale (critical_ratio)"
    return (
        f"Minimum steps {short(plan.min_steps)}, minimum samples {short(plan.min_samples)}, critical batch size "
        f"{short(plan.twice_both, digits=2)} [{low}, {high}]{times}"
    )


def compute(plan: Plan) -> str:
    """Say what the run has computed, by both methods, and how far they are apart."""
    found = plan.compute_of_run
    counted, timed = petaflop_s_days(found.by_count), petaflop_s_days(found.by_time)
    by_time = f"{timed} by device time at {100 * UTILISATION:.0f} % of peak"
    if found.disagreement is not None:
        return f"Compute of the run: {counted} petaflop/s-days counted, {by_time} (ratio {found.disagreement:.2g})"
    if found.by_count is not None:
        return f"Compute of the run: {counted} petaflop/s-days counted; not checked, the peak of this device is unknown"
    if found.by_time is not None:
        return f"Compute of the run: petaflop/s-days: {by_time}; operations were not counted"
    return "Compute of the run: unknown (operations were not counted, the peak of this device is unknown)"


def step_times(plan: Plan) -> str:
    """Say how good the model of step times is, and where its all-reduce is from."""
    if plan.assumptions:
        return f"Step time: assumed: {'; '.join(plan.assumptions)}; all-reduce: {plan.all_reduce}"
    error = "error unknown" if plan.step_time_error is None else f"±{100 * plan.step_time_error:.0f} % on new shapes"
    return f"Step time: fitted to the run ({error}); all-reduce: {plan.all_reduce}"


def about(seconds: float) -> str:
    """Write a predicted time, with no more digits than it deserves."""
    units = ((2 * _DAY_S, _DAY_S, "days"), (_HOUR_S / 2, _HOUR_S, "h"), (2 * _MINUTE_S, _MINUTE_S, "min"))
    for least_s, unit_s, unit in units:  # 0.6 h, since it will stand beside 3.1 h
        if seconds >= least_s:
            return f"{short(seconds / unit_s, digits=2)} {unit}"
    return f"{short(seconds, digits=2)} s"


def price(plan: Plan, point: Point) -> str:
    """Write what a point costs: money where there is a price, else the time of devices."""
    if point.cost is not None:
        return money(plan, point.cost)
    return f"{short(point.device_s / _HOUR_S, digits=2)} {plan.device}-hours"


def money(plan: Plan, amount: float) -> str:
    """Write an amount in the plan's currency, of a large one no digit that means nothing."""
    return f"{short(amount, digits=2)} {plan.currency}"


def energy(joules: float) -> str:
    """Write an energy in the unit of its bill."""
    return f"{short(joules / _KWH_J, digits=2)} kWh"


def petaflop_s_days(flops: float | None) -> str:
    """Write FLOPs in petaflop/s-days, a dash where they are not known."""
    return "–" if flops is None else f"{flops / PETAFLOP_S_DAY:.2g}"


def traded(plan: Plan, what: str, amount: Callable[[Point], float]) -> str:
    """Say by how much time falls and something else rises, such as samples, between the points of the headline."""
    first, last = _telling(plan)[0], _telling(plan)[-1]
    if first is last:
        return f"{_devices(plan, first.num_devices)}: at the knee"
    faster, more = (
        f"{short(ratio, digits=2)}×" for ratio in (first.seconds / last.seconds, amount(last) / amount(first))
    )
    return f"{first.num_devices:,} → {_devices(plan, last.num_devices)}: {faster} as fast, {more} the {what}"


def _telling(plan: Plan) -> list[Point]:
    """Return the points that the headline tells of: the run's own number of devices, and the one nearest the knee."""
    own = min(plan.points, key=lambda point: abs(point.num_devices - plan.own_devices))
    knee = min(plan.points, key=lambda point: abs(point.num_devices / plan.knee - 1))
    return [own] if knee == own else [own, knee]


def _point(plan: Plan, point: Point) -> str:
    return f"{_devices(plan, point.num_devices)}: {about(point.seconds)}, {price(plan, point)}"


def _end(plan: Plan) -> str:
    if plan.ceiling is None:
        return f"still faster at {_devices(plan, plan.points[-1].num_devices)}"
    return f"no gain beyond {_devices(plan, plan.ceiling)}"


def _devices(plan: Plan, number: int) -> str:
    return count(number, plan.device)
