"""How long a step takes on other numbers of devices: by the run's own steps, and an all-reduce that grows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dptrain.batch import BatchPlan
from dptrain.control import StepTimeModel, StepTimes
from dptrain.errors import ConfigError
from dptrain.explain.text.findings import num_replicas

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dptrain.explain.record import Row, RunRecord

LATENCY_S = 1e-5
"""Of one hop between devices; of the order of one message over a network. An assumption, and named where it is used."""


@dataclass(frozen=True, kw_only=True)
class AllReduce:
    """The time of the all-reduce of a step on K devices: 2(K − 1)/K · volume + 2·log₂K · latency.

    The first term is a ring's, which no other algorithm beats; the second a tree's, which large numbers of devices
    are reduced by (Thakur et al. 2005; NCCL chooses between the two).

    Attributes:
        volume_s: seconds to send all gradients once; 0 where nothing is known of it.
        volume_range_s: what it may be.
        latency_s: of a hop.
        source: where the figure is from, in words.
    """

    volume_s: float
    volume_range_s: tuple[float, float]
    latency_s: float
    source: str

    def seconds(self, num_devices: int, *, volume_s: float | None = None) -> float:
        """Return the time on so many devices, none on one; by another volume where one is given."""
        ring = 2 * (1 - 1 / num_devices) * (self.volume_s if volume_s is None else volume_s)
        return ring + 2 * math.log2(num_devices) * self.latency_s


@dataclass(frozen=True, kw_only=True)
class Devices:
    """The time of any step on any number of devices.

    Attributes:
        model: fitted to the run.
        all_reduce: how it grows with the number of devices.
        micro_batch_sizes: smallest and largest that were timed; nothing is planned outside of them.
    """

    model: StepTimeModel
    all_reduce: AllReduce
    micro_batch_sizes: tuple[int, int]

    @property
    def world_size(self) -> int:
        """Number of devices of the run."""
        return self.model.world_size

    @property
    def error(self) -> float | None:
        """Relative error on shapes that were not timed; None where it is not known."""
        return self.model.error

    @property
    def is_split_known(self) -> bool:
        """Whether the run separates the cost per step from that per sample."""
        return self.model.is_split_known

    def seconds(self, shape: BatchPlan) -> float:
        """Return the time of a step of `shape`."""
        return self._seconds(shape, volume_s=self.all_reduce.volume_s)

    def seconds_range(self, shape: BatchPlan) -> tuple[float, float]:
        """Return what the time of a step may be, for what its all-reduce may be."""
        ends = [self._seconds(shape, volume_s=volume_s) for volume_s in self.all_reduce.volume_range_s]
        return min(ends), max(ends)

    def _seconds(self, shape: BatchPlan, *, volume_s: float) -> float:
        there, here = (
            self.all_reduce.seconds(number, volume_s=volume_s) for number in (shape.world_size, self.model.world_size)
        )
        # No step is faster than its samples.
        return self.model.seconds(shape) + max(there - here, -self.model.per_step_s)


def devices(
    record: RunRecord,
    *,
    gradient_bytes: float | None = None,
    gb_per_s: float | None = None,
    latency_s: float = LATENCY_S,
) -> Devices:
    """Fit the time of a step to the rows of a run.

    Args:
        record: the run.
        gradient_bytes: of one all-reduce; needed with `gb_per_s`.
        gb_per_s: bandwidth of the all-reduce between two devices. If not given, it is estimated from the run: from
            two numbers of devices if it was resumed on another one; else it is half of what a step costs beside its
            samples, and may be all or nothing of it.
        latency_s: of a hop.

    Raises:
        ConfigError: where the run has too few step times, or the size of the gradients is needed and not known.
    """
    timed = list(_timed(record))
    if not timed:
        raise ConfigError(f"{record.name} has no step times: plan from a run of this version with log.every_steps=1")
    times = StepTimes()
    for shape, seconds in timed:
        times = times.timed(shape, seconds)
    model = times.model()
    if model is None:
        raise ConfigError(
            f"{record.name} has only {len(timed)} timed steps, too few for a model of step times: train longer"
        )
    micro = [shape.micro_batch_size for shape, _ in timed]
    if gb_per_s is not None:
        all_reduce = _given(gradient_bytes=gradient_bytes, gb_per_s=gb_per_s, latency_s=latency_s)
    else:
        all_reduce = _fitted(timed, model, latency_s=latency_s)
    return Devices(model=model, all_reduce=all_reduce, micro_batch_sizes=(min(micro), max(micro)))


def _given(*, gradient_bytes: float | None, gb_per_s: float, latency_s: float) -> AllReduce:
    if gradient_bytes is None:
        raise ConfigError(
            "the size of the gradients is unknown: keep a checkpoint in the run folder, from which it is read"
        )
    volume_s = gradient_bytes / (1e9 * gb_per_s)
    source = f"{gradient_bytes / 1e6:,.3g} MB at {gb_per_s:g} GB/s, as given"
    return AllReduce(volume_s=volume_s, volume_range_s=(volume_s, volume_s), latency_s=latency_s, source=source)


def _fitted(timed: list[tuple[BatchPlan, float]], model: StepTimeModel, *, latency_s: float) -> AllReduce:
    models = _by_number_of_devices(timed)
    if len(models) > 1:
        (few, least), *_, (many, most) = sorted(models.items())
        latency = 2 * (math.log2(many) - math.log2(few)) * latency_s
        volume_s = max(most.per_step_s - least.per_step_s - latency, 0.0) / (2 * (1 / few - 1 / many))
        source = f"fitted to the run's steps on {few} and on {many} devices"
        return AllReduce(volume_s=volume_s, volume_range_s=(volume_s, volume_s), latency_s=latency_s, source=source)
    if model.world_size == 1:
        source = "unknown from a run on one device; assumed to be zero"
        return AllReduce(volume_s=0.0, volume_range_s=(0.0, 0.0), latency_s=latency_s, source=source)
    own = max(model.per_step_s - 2 * math.log2(model.world_size) * latency_s, 0.0)
    most_s = own / (2 * (1 - 1 / model.world_size))
    source = (
        f"assumed to be half of the time per step that does not depend on its samples, on {model.world_size} devices"
    )
    return AllReduce(volume_s=most_s / 2, volume_range_s=(0.0, most_s), latency_s=latency_s, source=source)


def _by_number_of_devices(timed: list[tuple[BatchPlan, float]]) -> dict[int, StepTimeModel]:
    """Fit each number of devices separately, if at least two batches separate cost per step and per sample."""
    found = {}
    for number in {shape.world_size for shape, _ in timed}:
        times = StepTimes()
        for shape, seconds in timed:
            times = times.timed(shape, seconds) if shape.world_size == number else times
        model = times.model()
        if model is not None and model.is_split_known:
            found[number] = model
    return found


def _timed(record: RunRecord) -> Iterator[tuple[BatchPlan, float]]:
    """Yield the steps of a run whose time is known."""
    for row in record.train:
        seconds = row.get("time/step_s")
        if seconds and row.get("batch/micro") and row.get("batch/accumulation"):
            yield _shape(row, record), seconds


def _shape(row: Row, record: RunRecord) -> BatchPlan:
    return BatchPlan(
        micro_batch_size=int(row["batch/micro"]),
        accumulation_steps=int(row["batch/accumulation"]),
        world_size=int(row.get("time/world_size") or num_replicas(record)),
    )
