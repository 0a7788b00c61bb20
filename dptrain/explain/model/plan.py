"""What training to a loss would take on other numbers of devices: time, samples, compute and money, from one run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dptrain.cost.prices import DevicePrice
from dptrain.errors import ConfigError
from dptrain.explain.model.compute import Compute, TrendPlace, trend_place
from dptrain.explain.model.hardware.other_devices import OtherDevices
from dptrain.explain.model.model_sizes import OptimalSize, PaidSizes, optimal_sizes, paid_sizes
from dptrain.explain.model.planner import Planner, Point
from dptrain.explain.model.run_placement import critical_ratio

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dptrain.explain.model.hardware.devices import Devices
    from dptrain.explain.record import RunRecord

MOST_DEVICES = 1_000_000
"""More than any one training has had; a larger number is a slip of the keyboard."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run says about others like it.

    Attributes:
        run: its name.
        device: what its replicas ran on, one word.
        own_devices: how many it ran on.
        loss: which loss is meant.
        target: its value.
        lowest: the lowest that the run reached.
        samples_of_run: after how many samples the run reached the target; None where it lies beyond the run.
        target_error: relative standard error of steps and samples to a target beyond the run; 0 within it.
        min_steps: S_min, the fewest steps, by ever larger batches.
        min_samples: E_min, the fewest samples, by ever smaller ones.
        twice_both: E_min/S_min, the batch that takes twice the fewest steps and twice the fewest samples.
        twice_both_range: the same by both ends of the noise scale's interval.
        critical_ratio: `twice_both` over the noise scale averaged over the way, see `control.critical_ratio`.
        points: one for each number of devices that was asked for.
        knee: the number of devices up to which twice as many save at least 30 % of the time.
        ceiling: the first number that was asked for from which on twice as many save less than 5 %; None where there is
            none.
        compute_of_run: FLOPs that the run itself took, by both methods.
        trend: where the counted ones lie on the trend of "AI and Compute"; None where they were not counted.
        paid_sizes: what the same compute would pay for; None where the run's model is no language model.
        step_time_error: of the step-time model on shapes it had not seen; None where there were none.
        all_reduce: where its time is known from.
        optimal_sizes: for the budget, by each law; empty without one.
        currency: of all costs.
        price: of an hour of the device, with its range; None without one.
        minimum_rental_s: the shortest time of a device that is billed.
        flops_per_s: that a device is planned to compute in training; None where the step times are the run's own.
        assumptions: of the step times, in words; empty where they are the run's own.
        warnings: what the plan rests on that the run does not show.
    """

    run: str
    device: str
    own_devices: int
    loss: str
    target: float
    lowest: float
    samples_of_run: float | None
    target_error: float
    min_steps: float
    min_samples: float
    twice_both: float
    twice_both_range: tuple[float, float]
    critical_ratio: float
    points: tuple[Point, ...]
    knee: int
    ceiling: int | None
    compute_of_run: Compute
    trend: TrendPlace | None
    paid_sizes: PaidSizes | None
    step_time_error: float | None
    all_reduce: str
    optimal_sizes: tuple[OptimalSize, ...]
    currency: str
    price: DevicePrice | None
    minimum_rental_s: float
    flops_per_s: float | None
    assumptions: tuple[str, ...]
    warnings: tuple[str, ...]


def make_plan(
    record: RunRecord,
    devices: Devices | OtherDevices,
    *,
    numbers: Sequence[int] | None = None,
    target: float | None = None,
    price: DevicePrice | None = None,
    currency: str = "$",
    minimum_rental_s: float = 0.0,
    flops_budget: float | None = None,
) -> Plan:
    """Plan from a run that measured its noise scale and its step times.

    Args:
        record: the run.
        devices: time of a step, fitted to it.
        numbers: of devices to plan for; for each the layout of a step with the least time to the target is taken. None:
            the powers of two up to 4,096 whose batches are within the data set.
        target: loss to come to; the lowest of the run where it is None.
        price: of an hour of a device; its typical value is planned with.
        currency: of the price.
        minimum_rental_s: the shortest time of a device that is billed.
        flops_budget: to find the sizes of a language model for.

    Raises:
        ConfigError: if the run lacks what is needed.
    """
    if numbers is not None and (not numbers or min(numbers) < 1):
        raise ConfigError(f"numbers of devices must be at least 1, got {list(numbers)}")
    planner = Planner(
        record,
        devices,
        target=target,
        price_per_device_hour=None if price is None else price.typical,
        minimum_rental_s=minimum_rental_s,
    )
    needed, curve = planner.needed, planner.curve
    numbers = sorted(set(numbers or [n for n in (1 << power for power in range(13)) if planner.fits(n)] or [1]))
    points = tuple(planner.at(planner.fastest(number)) for number in numbers)
    if max(numbers) > MOST_DEVICES:  # of a run that does not tell the size of its data set
        raise ConfigError(f"no training has {max(numbers):,} devices: plan for at most {MOST_DEVICES:,}")
    knee, ceiling = planner.limits(numbers)
    counted = planner.compute_of_run.by_count
    own_device = "GPU" if record.summary.get("device") == "cuda" else "replica"
    return Plan(
        run=record.name,
        device=f"{devices.name} GPU" if isinstance(devices, OtherDevices) else own_device,
        own_devices=devices.world_size,
        loss=curve.name,
        target=planner.target,
        lowest=curve.lowest,
        samples_of_run=needed.samples_of_run,
        target_error=needed.error,
        min_steps=needed.implied.min_steps,
        min_samples=needed.implied.min_samples,
        twice_both=needed.implied.noise_scale,
        twice_both_range=planner.twice_both_range,
        critical_ratio=critical_ratio(record),
        points=points,
        knee=knee,
        ceiling=ceiling,
        compute_of_run=planner.compute_of_run,
        trend=trend_place(counted) if counted else None,
        paid_sizes=paid_sizes(record, flops=counted, num_samples=record.samples_trained),
        step_time_error=devices.error,
        all_reduce=devices.all_reduce.source,
        optimal_sizes=() if flops_budget is None else optimal_sizes(flops_budget),
        currency=currency,
        price=price,
        minimum_rental_s=minimum_rental_s,
        flops_per_s=devices.flops_per_s if isinstance(devices, OtherDevices) else None,
        assumptions=devices.assumptions if isinstance(devices, OtherDevices) else (),
        warnings=tuple(planner.warnings()),
    )
