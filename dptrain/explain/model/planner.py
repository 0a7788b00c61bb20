"""What any layout of a step takes to a loss, by a run's noise scale and step times: steps, samples, time, compute."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from dptrain.batch import BatchPlan
from dptrain.control import CriticalRatio
from dptrain.errors import ConfigError
from dptrain.explain.model.compute import Compute, flops_by_time
from dptrain.explain.model.hardware.other_devices import OtherDevices
from dptrain.explain.model.progress import (
    HIGH,
    HISTORY,
    LOW,
    MEASURED,
    Assumption,
    LossCurve,
    Needs,
    course,
    loss_curve,
    needs,
)
from dptrain.explain.record import SAMPLES

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from dptrain.explain.model.hardware.devices import Devices
    from dptrain.explain.record import RunRecord

HALF_GAIN = math.sqrt(2)
"""What twice the devices must save, as a ratio of times, up to the knee: the middle between all and nothing."""
NO_GAIN = 1.05
"""The same, below which nothing is said to be gained; a matter of taste."""

RATIO_DOUBT = CriticalRatio().spread ** 2
"""Factor of two standard deviations of the critical ratio's prior, which the law moves the batch by as well.

Without it the samples of batches far from the run's lay outside: 128 beside 16 took 1/1.7 of what was planned.
"""
LARGEST_ERROR = 0.5
"""Relative standard error of a target beyond the run, above which no plan is made: two of them are a factor of two.

Of `digits`, from 1.3 passes over its data to 25 times the progress, the samples were planned 17 times too many.
"""
_MOST_ACCUMULATION = 1 << 14
_HOUR_S = 3600.0


@dataclass(frozen=True, kw_only=True)
class Point:
    """Training to the target on a number of devices, with the layout of a step that takes the least time there.

    Attributes:
        num_devices: world size.
        micro_batch_size: samples in a pass; one that the run timed.
        accumulation_steps: passes of each device in a step.
        global_batch_size: the product of the three; the same through the whole training.
        steps: optimizer steps.
        samples: seen in training.
        samples_range: by the noise scale's interval, two standard deviations of the critical ratio's prior, and two
            standard errors of a target beyond the run.
        step_s: time of a step.
        seconds: time of training, without evaluations and saves.
        seconds_range: by the same, what the all-reduce may be, and the error of the step times.
        seconds_history: the same, were the noise scale off by a factor of six beside.
        device_s: seconds × devices.
        cost: for `device_s`, or for the minimum rental where that is longer, in the currency of the price; None
            without one.
        compute: FLOPs by both methods.
        energy_j: at the power that the run drew; None where it was not measured.
    """

    num_devices: int
    micro_batch_size: int
    accumulation_steps: int
    global_batch_size: int
    steps: float
    samples: float
    samples_range: tuple[float, float]
    step_s: float
    seconds: float
    seconds_range: tuple[float, float]
    seconds_history: tuple[float, float]
    device_s: float
    cost: float | None
    compute: Compute
    energy_j: float | None


class Planner:
    """Tells what any layout of a step takes to a target.

    A fixed batch B takes S_min + E_min/B steps (see `progress`), each as long as `devices` says. Whether the learning
    rate suits each batch is left open: the theory has a good one at each.

    Args:
        record: the run.
        devices: time of a step, fitted to it.
        target: loss to come to; the lowest of the run where it is None.
        price_per_device_hour: in any currency.
        minimum_rental_s: the shortest time of a device that is billed.

    Raises:
        ConfigError: if the run lacks what is needed.

    Attributes:
        curve: the loss that the target is one of.
        target: the loss to come to.
        needed: what that takes, by the noise scale as it was measured.
        num_samples: of the data set, above which no batch is planned; None where the run does not tell.
    """

    def __init__(
        self,
        record: RunRecord,
        devices: Devices | OtherDevices,
        *,
        target: float | None = None,
        price_per_device_hour: float | None = None,
        minimum_rental_s: float = 0.0,
    ) -> None:
        self.curve = loss_curve(record)
        self.target = self.curve.lowest if target is None else target
        if not math.isfinite(self.target):
            raise ConfigError(f"a target must be a finite loss, got {target}")
        self._record, self._devices = record, devices
        self.needed = self._needs(MEASURED)
        _refuse_a_falling_rate(record, self.needed, curve=self.curve, target=self.target)
        _refuse_too_far(record, self.needed, curve=self.curve, target=self.target)
        self.num_samples = _samples_of_data_set(record)
        self._of_noise = [self.needed.implied, *(self._needs(assumption).implied for assumption in (LOW, HIGH))]
        doubted = (replace(LOW, factor=1 / RATIO_DOUBT), replace(HIGH, factor=RATIO_DOUBT))
        self._interval = [*self._of_noise, *(self._needs(assumption).implied for assumption in doubted)]
        self._history = [self._needs(assumption).implied for assumption in HISTORY]
        self._price_per_device_s = None if price_per_device_hour is None else price_per_device_hour / _HOUR_S
        self._minimum_rental_s = minimum_rental_s
        self._rates = _rates(record, devices)

    def _needs(self, assumption: Assumption) -> Needs:
        return needs(course(self._record, self.curve, assumption), self.curve, target=self.target)

    @property
    def twice_both_range(self) -> tuple[float, float]:
        """The batch that takes twice the fewest steps and samples, by both ends of the noise scale's interval."""
        ends = [implied.noise_scale for implied in self._of_noise]
        return min(ends), max(ends)

    @property
    def compute_of_run(self) -> Compute:
        """The FLOPs that the run took, by both methods."""
        device_s = self._record.last("ledger/device_s", in_summary="device_s")
        peak = _peak_of_run(self._record)
        return self._compute(samples=self._record.samples_trained, device_s=device_s, peak_flops_per_s=peak)

    def fastest(self, num_devices: int) -> BatchPlan:
        """Return the layout of a step that takes the least time to the target.

        Raises:
            ConfigError: where each batch on so many devices would be above the data set.
        """
        found = list(self._allowed(num_devices))
        if not found:
            smallest = min(shape.global_batch_size for shape in self._all(num_devices))
            raise ConfigError(
                f"{num_devices:,} devices need a batch of at least {smallest:,} samples, and the data set has "
                f"{self.num_samples:,}: plan for fewer"
            )
        return min(found, key=self._seconds)

    def fits(self, num_devices: int) -> bool:
        """Return whether a batch on so many devices is within the data set."""
        return any(True for _ in self._allowed(num_devices))

    def _all(self, num_devices: int) -> Iterator[BatchPlan]:
        return _layouts(self._devices.micro_batch_sizes, num_devices=num_devices)

    def _allowed(self, num_devices: int) -> Iterator[BatchPlan]:
        largest = self.num_samples or math.inf
        return (shape for shape in self._all(num_devices) if shape.global_batch_size <= largest)

    def at(self, shape: BatchPlan) -> Point:
        """Return what a layout takes."""
        implied, step_s, batch = self.needed.implied, self._devices.seconds(shape), shape.global_batch_size
        seconds, samples = implied.steps(batch) * step_s, implied.samples(batch)
        ends = self._devices.seconds_range(shape)
        interval = [other.steps(batch) * end for other in self._interval for end in ends]
        history = [*interval, *(other.steps(batch) * end for other in self._history for end in ends)]
        seen = [other.samples(batch) for other in self._interval]
        far = 1 + 2 * self.needed.error
        unsure = 1 + math.hypot(2 * self.needed.error, self._devices.error or 0.0)
        device_s, price, rates = shape.world_size * seconds, self._price_per_device_s, self._rates
        billed_s = shape.world_size * max(seconds, self._minimum_rental_s)
        return Point(
            num_devices=shape.world_size,
            micro_batch_size=shape.micro_batch_size,
            accumulation_steps=shape.accumulation_steps,
            global_batch_size=batch,
            steps=implied.steps(batch),
            samples=samples,
            samples_range=(min(seen) / far, max(seen) * far),
            step_s=step_s,
            seconds=seconds,
            seconds_range=(min(interval) / unsure, max(interval) * unsure),
            seconds_history=(min(history) / unsure, max(history) * unsure),
            device_s=device_s,
            cost=None if price is None else price * billed_s,
            compute=self._compute(samples=samples, device_s=device_s, peak_flops_per_s=rates.peak_flops_per_s),
            energy_j=None if rates.watts is None else rates.watts * device_s,
        )

    def limits(self, numbers: Sequence[int]) -> tuple[int, int | None]:
        """Return the knee, and the number of devices beyond which nothing is gained, None where it is the last one.

        Both are of `numbers`, so that a figure and a table of them show the same.
        """
        ratios = {number: self._least(number) / self._least(2 * number) for number in numbers}
        knee = max((number for number in numbers if ratios[number] >= HALF_GAIN), default=min(numbers))
        gaining = max((number for number in numbers if ratios[number] >= NO_GAIN), default=0)
        return knee, min((number for number in numbers if number > gaining), default=None)

    def warnings(self) -> Iterator[str]:
        """Yield what the plan rests on that the run does not show."""
        devices = self._devices
        if self._record.start:
            yield (
                f"the run began at a checkpoint of another, {self._record.start:,.0f} samples on: steps, samples, time "
                f"and cost are those from there"
            )
        if self.needed.samples_of_run is None:
            further = self.needed.implied.min_steps / float(course(self._record, self.curve).progress[-1])
            yield (
                f"the target lies beyond the run, whose lowest {self.curve.name} is {self.curve.lowest:.4g}: "
                f"{further:.3g} times its progress, ±{2 * self.needed.error:.0%} if its power law goes on"
            )
        if isinstance(devices, OtherDevices):
            if devices.is_bound_by_host(self.fastest(1)):
                yield (
                    f"starting kernels takes longer than computing on the {devices.name}: the model is too small to "
                    f"tell GPUs apart, and its time is that of the host"
                )
            return
        if not devices.is_split_known:
            yield (
                "all steps of the run had one batch, so how much of a step's time is per step and how much per sample "
                "is assumed, half and half: let the batch move, or times at other batches mean little"
            )
        if devices.world_size == 1 and not devices.all_reduce.volume_s:
            yield (
                "the all-reduce is not known from a run on one device, and on more of them each step takes longer than "
                "planned: give --allreduce-gb-per-s"
            )
        if self._record.summary.get("device") == "cpu":
            yield "the run was on CPUs: a further replica is a further device only while there are cores for it"

    def _least(self, num_devices: int) -> float:
        return self._seconds(self.fastest(num_devices)) if self.fits(num_devices) else math.inf

    def _seconds(self, shape: BatchPlan) -> float:
        return self.needed.implied.steps(shape.global_batch_size) * self._devices.seconds(shape)

    def _compute(self, *, samples: float, device_s: float | None, peak_flops_per_s: float | None) -> Compute:
        counted, peak = self._rates.flops_per_sample, peak_flops_per_s
        by_count, by_time = None if counted is None else counted * samples, None
        if peak is not None and device_s is not None:
            by_time = flops_by_time(num_devices=1, peak_flops_per_s=peak, seconds=device_s)
        return Compute(by_count=by_count, by_time=by_time)


def _refuse_a_falling_rate(record: RunRecord, needed: Needs, *, curve: LossCurve, target: float) -> None:
    """Refuse a target beyond a run whose learning rate falls: the loss curve of another length is another one.

    Under the default cosine the samples to targets beyond the first fifth were predicted 1.16 to 1.61 times too many,
    in six of seven cases outside of the interval: a rate that is still to fall lowers the loss faster than before.
    """
    schedule = record.setting("optimizer.schedule")
    if needed.samples_of_run is None and schedule not in (None, "constant"):
        raise ConfigError(
            f"a {curve.name} of {target:.4g} lies beyond {record.name}, whose lowest is {curve.lowest:.4g} and whose "
            f"learning rate falls (optimizer.schedule={schedule}): how far a longer run would come is not "
            f"known; give a --target that the run has reached, or plan from a run with optimizer.schedule=constant"
        )


def _refuse_too_far(record: RunRecord, needed: Needs, *, curve: LossCurve, target: float) -> None:
    """Refuse a target whose samples the run does not tell within a factor of two."""
    if needed.error > LARGEST_ERROR:
        raise ConfigError(
            f"a {curve.name} of {target:.4g} lies too far beyond {record.name}, whose lowest is {curve.lowest:.4g}: "
            f"the samples to it are not known within a factor of two (standard error {needed.error:.0%}); train "
            f"longer, or give a nearer --target"
        )


def _samples_of_data_set(record: RunRecord) -> int | None:
    """Return the samples of the data set, from position and epoch of the last row that has both, or the run's facts."""
    for row in reversed(record.train):
        epoch = row.get("progress/epoch")
        if isinstance(epoch, int | float) and epoch > 0:
            return round(float(row[SAMPLES]) / epoch)
    known = record.facts.get("num_samples")
    return int(known) if isinstance(known, int | float) and known > 0 else None


@dataclass(frozen=True, kw_only=True)
class _Rates:
    """What a sample and a second of a device cost, as far as the run's ledger tells."""

    flops_per_sample: float | None
    peak_flops_per_s: float | None
    watts: float | None


def _rates(record: RunRecord, devices: Devices | OtherDevices) -> _Rates:
    flops = record.last("ledger/flops", in_summary="flops")
    device_s = record.last("ledger/device_s", in_summary="device_s")
    energy_j = record.last("ledger/energy_j", in_summary="energy_j")
    # A device that the run was not on draws another power.
    is_metered = not isinstance(devices, OtherDevices) and energy_j is not None
    watts = energy_j / device_s if is_metered and energy_j is not None and device_s else None
    return _Rates(
        flops_per_sample=flops / record.samples_trained if flops else None,
        peak_flops_per_s=devices.peak_flops_per_s if isinstance(devices, OtherDevices) else _peak_of_run(record),
        watts=watts,
    )


def _peak_of_run(record: RunRecord) -> float | None:
    peak = record.summary.get("peak_flops_per_s")
    return float(peak) if isinstance(peak, int | float) else None


def _layouts(micro_batch_sizes: tuple[int, int], *, num_devices: int) -> Iterator[BatchPlan]:
    """Yield the layouts that are tried: timed micro-batches on the grid, at least two of them in a step.

    A single micro-batch gives no noise estimate, and dptrain trains none such.
    """
    smallest, largest = micro_batch_sizes
    grid = {smallest, largest, *(1 << power for power in range(smallest.bit_length(), largest.bit_length()))}
    numbers = [base << power for power in range(_MOST_ACCUMULATION.bit_length()) for base in (1, 3)]
    for micro in sorted(size for size in grid if smallest <= size <= largest):
        for accumulation in sorted({1, *numbers}):
            if num_devices * accumulation > 1:
                yield BatchPlan(micro_batch_size=micro, accumulation_steps=accumulation, world_size=num_devices)
