"""How long a step takes on other numbers of devices: by the run's own steps, and an all-reduce that grows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dptrain.control import StepShape, StepTimeModel, StepTimes
from dptrain.errors import ConfigError
from dptrain.explain.findings import num_replicas

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
        latency_s: of a hop.
        source: where the figure is from, in words.
    """

    volume_s: float
    latency_s: float
    source: str

    def seconds(self, num_devices: int) -> float:
        """Return the time on so many devices; none on one."""
        ring = 2 * (num_devices - 1) / num_devices * self.volume_s
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

    def seconds(self, shape: StepShape) -> float:
        """Return the time of a step of `shape`."""
        return self.model.seconds(shape) + self._further(shape.world_size)

    def _further(self, num_devices: int) -> float:
        """What the all-reduce takes longer than on the devices of the run; no step is faster than its samples."""
        longer = self.all_reduce.seconds(num_devices) - self.all_reduce.seconds(self.model.world_size)
        return max(longer, -self.model.per_step_s)


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
        gb_per_s: bandwidth of the all-reduce between two devices. Where it is not given it is told from the run: from
            two numbers of devices if it was resumed on another one, else from all that a step costs beside its samples.
        latency_s: of a hop.

    Raises:
        ConfigError: where the run has too few step times, or the size of the gradients is needed and not known.
    """
    timed = list(_timed(record))
    if not timed:
        raise ConfigError(f"{record.name} has no step times: plan from a run of this version, with log.every_steps=1")
    times = StepTimes()
    for shape, seconds in timed:
        times = times.timed(shape, seconds)
    model = times.model()
    if model is None:
        raise ConfigError(f"{record.name} is too short to time its steps, it has {len(timed)}: train on")
    micro = [shape.micro_batch_size for shape, _ in timed]
    volume_s, source = _volume(timed, model, gradient_bytes=gradient_bytes, gb_per_s=gb_per_s, latency_s=latency_s)
    return Devices(
        model=model,
        all_reduce=AllReduce(volume_s=volume_s, latency_s=latency_s, source=source),
        micro_batch_sizes=(min(micro), max(micro)),
    )


def _volume(
    timed: list[tuple[StepShape, float]],
    model: StepTimeModel,
    *,
    gradient_bytes: float | None,
    gb_per_s: float | None,
    latency_s: float,
) -> tuple[float, str]:
    """Return the seconds to send all gradients once, and where that is known from."""
    if gb_per_s is not None:
        if gradient_bytes is None:
            raise ConfigError("the size of the gradients is not known: keep a checkpoint in the run folder, it tells")
        return gradient_bytes / (1e9 * gb_per_s), f"{gradient_bytes / 1e6:,.3g} MB at {gb_per_s:g} GB/s, as given"
    models = _by_number_of_devices(timed)
    if len(models) > 1:
        (few, least), *_, (many, most) = sorted(models.items())
        latency = 2 * (math.log2(many) - math.log2(few)) * latency_s
        rise = max(most.per_step_s - least.per_step_s - latency, 0.0)
        return rise / (2 * (1 / few - 1 / many)), f"fitted to the run's own steps on {few} and on {many} devices"
    if model.world_size == 1:
        return 0.0, "not known from a run on one device, and taken to be nothing: give --allreduce-gb-per-s"
    own = max(model.per_step_s - 2 * math.log2(model.world_size) * latency_s, 0.0)
    volume_s = own / (2 * (1 - 1 / model.world_size))
    return volume_s, f"all that a step costs beside its samples on {model.world_size} devices, an upper bound"


def _by_number_of_devices(timed: list[tuple[StepShape, float]]) -> dict[int, StepTimeModel]:
    """Fit each number of devices by itself, where at least two batches tell a step's cost from its samples'."""
    found = {}
    for number in {shape.world_size for shape, _ in timed}:
        times = StepTimes()
        for shape, seconds in timed:
            times = times.timed(shape, seconds) if shape.world_size == number else times
        model = times.model()
        if model is not None and model.is_split_known:
            found[number] = model
    return found


def _timed(record: RunRecord) -> Iterator[tuple[StepShape, float]]:
    """Yield the steps of a run whose time is known."""
    for row in record.train:
        seconds = row.get("time/step_s")
        if seconds and row.get("batch/micro") and row.get("batch/accumulation"):
            yield _shape(row, record), seconds


def _shape(row: Row, record: RunRecord) -> StepShape:
    return StepShape(
        micro_batch_size=int(row["batch/micro"]),
        accumulation_steps=int(row["batch/accumulation"]),
        world_size=int(row.get("time/world_size") or num_replicas(record)),
    )
