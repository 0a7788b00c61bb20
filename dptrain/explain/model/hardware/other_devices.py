"""How long a step takes on a device that the run was not on: by data sheets and named assumptions; fits nothing."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from dptrain.cost.device_peaks import DEVICES, DeviceSpec, device_of
from dptrain.errors import ConfigError
from dptrain.explain.model.compute import UTILISATION
from dptrain.explain.model.hardware.devices import LATENCY_S, AllReduce, Devices

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dptrain.batch import BatchPlan
    from dptrain.explain.record import RunRecord

UTILISATION_RANGE = (0.1, 0.5)
"""What a share of the peak may be where nobody measured it.

Chowdhery et al. 2022 (arXiv 2204.02311, table 3) list 21 % (GPT-3) to 46 % (PaLM), rounded up here. The lower end is
half of the least of them, for models that are not made of large matrix products; an assumption.
"""
HOST_S = 5e-3
"""What the host takes to start the kernels of a forward–backward, and again those of an optimizer step.

Some hundred launches of about 10 µs each in uncompiled PyTorch. It overlaps with the device's own work: a pass takes
the longer of the two. An assumption, as is its range.
"""
HOST_RANGE_S = (1e-3, 20e-3)
DEVICES_PER_HOST = 8
NETWORK_GB_PER_S = 12.5
"""Of each device between hosts: 100 Gb/s. Instances that are sold have 50 Gb/s (AWS p4d) to 400 Gb/s (AWS p5)."""
NETWORK_RANGE_GB_PER_S = (6.25, 50.0)

_LINK_SHARE = 0.5
"""Of the link's peak, at the slow end of the range."""
_BYTES = 4
"""Of a parameter, a gradient and each moment of Adam, in float32: what dptrain trains with by default."""
_TRAINED_COPIES = 3
"""Gradient and two moments: of the parameters that are trained, beside each parameter itself."""
_READ_IN_PASS, _WRITTEN_IN_PASS, _MOVED_IN_STEP = 2, 1, 7
"""Copies that cross the memory at least: of the parameters, forward and backward; of those that are trained, the
gradient, and in a step what Adam reads (4) and writes (3)."""
_LARGER_MICRO_BATCHES = 64
"""Times the largest micro-batch that a CPU timed: GPUs are planned with larger ones."""
_PRECISIONS = ("bfloat16", "float16", "tf32", "float32")
_PRECISION_OF_RUN = {"bf16": "bfloat16", "bf16_parameters": "bfloat16", "fp16": "float16", "fp8": "bfloat16"}


@dataclass(frozen=True, kw_only=True)
class Utilisation:
    """Share of the peak speed that training reaches.

    Attributes:
        value: planned with.
        low: lower end of the range.
        high: upper end of the range.
        source: where it is from, in words.
    """

    value: float
    low: float
    high: float
    source: str


ASSUMED = Utilisation(
    value=UTILISATION,
    low=UTILISATION_RANGE[0],
    high=UTILISATION_RANGE[1],
    source="assumed (Amodei and Hernandez 2018)",
)


@dataclass(frozen=True, kw_only=True)
class Speed:
    """The time of a step on any number of devices, at one set of assumptions.

    Attributes:
        step_s: optimizer, and what else a step costs once.
        pass_s: of each forward–backward, whatever its samples.
        floor_s: what the samples of a forward–backward take at least.
        sample_s: of each sample.
        host_gb_per_s: of the all-reduce within a host.
        network_gb_per_s: of the all-reduce between hosts.
    """

    step_s: float
    pass_s: float
    floor_s: float
    sample_s: float
    host_gb_per_s: float
    network_gb_per_s: float

    def seconds(self, shape: BatchPlan, *, all_reduce: AllReduce, gradient_bytes: float) -> float:
        """Return the time of a step of `shape`."""
        gb_per_s = self.host_gb_per_s if shape.world_size <= DEVICES_PER_HOST else self.network_gb_per_s
        samples_s = max(self.floor_s, self.sample_s * shape.micro_batch_size)
        passes_s = shape.accumulation_steps * (self.pass_s + samples_s)
        return self.step_s + passes_s + all_reduce.seconds(shape.world_size, volume_s=gradient_bytes / gb_per_s / 1e9)


@dataclass(frozen=True, kw_only=True)
class OtherDevices:
    """The time of any step on any number of devices of another kind than the run's.

    Attributes:
        name: short name of the device.
        spec: what it can do.
        precision: of its matrix products, a field of `DeviceSpec`.
        peak_flops_per_s: at that precision.
        utilisation: share of that which is planned with.
        planned: times that are planned with.
        fastest: times at the good end of all assumptions.
        slowest: times at the bad end of all assumptions.
        gradient_bytes: of one all-reduce.
        all_reduce: how it grows with the number of devices.
        micro_batch_sizes: smallest and largest that are planned.
        world_size: of the run.
        assumptions: in words, each a clause.
    """

    name: str
    spec: DeviceSpec
    precision: str
    peak_flops_per_s: float
    utilisation: Utilisation
    planned: Speed
    fastest: Speed
    slowest: Speed
    gradient_bytes: float
    all_reduce: AllReduce
    micro_batch_sizes: tuple[int, int]
    world_size: int
    assumptions: tuple[str, ...]

    is_split_known = True
    """Nothing is left to the prior of a fit."""
    error = None
    """No step was timed on such a device."""

    @property
    def flops_per_s(self) -> float:
        """What a device computes at the planned utilisation."""
        return self.peak_flops_per_s * self.utilisation.value

    def seconds(self, shape: BatchPlan) -> float:
        """Return the time of a step of `shape`."""
        return self._at(self.planned, shape)

    def seconds_range(self, shape: BatchPlan) -> tuple[float, float]:
        """Return what the time of a step may be, at both ends of all assumptions."""
        return self._at(self.fastest, shape), self._at(self.slowest, shape)

    def is_bound_by_host(self, shape: BatchPlan) -> bool:
        """Return whether a forward–backward takes what it takes at least, whatever its samples."""
        return self.planned.floor_s > self.planned.sample_s * shape.micro_batch_size

    def _at(self, speed: Speed, shape: BatchPlan) -> float:
        return speed.seconds(shape, all_reduce=self.all_reduce, gradient_bytes=self.gradient_bytes)


def other_devices(
    record: RunRecord,
    here: Devices,
    *,
    name: str,
    precision: str | None = None,
    utilisation: float | None = None,
    gradient_bytes: float | None = None,
    gb_per_s: float | None = None,
    latency_s: float = LATENCY_S,
) -> Devices | OtherDevices:
    """Return the step times on a device of the table; those of the run where it was on one such.

    From a run on a CPU, or on a GPU that is not listed, the counted FLOPs are divided by the peak and an assumed
    utilisation. From a run on a listed GPU the time per sample is scaled: by the ratio of the peaks at one end, by that
    of the memory bandwidths at the other, and by the mean of both (geometric) between.

    Args:
        record: the run.
        here: its step times.
        name: short name of the device, a key of `DEVICES`.
        precision: of the matrix products there, a field of `DeviceSpec`. None: that of the run, and for a run in
            float32 on a CPU the fastest of 16 bits.
        utilisation: share of the peak that is reached there; None to go by the run, or to assume one.
        gradient_bytes: of one all-reduce; None for 4 bytes a parameter that is trained.
        gb_per_s: bandwidth of the all-reduce; None for the data sheet within a host, and an assumed network beyond.
        latency_s: of a hop.

    Raises:
        ConfigError: where the run did not count its FLOPs or parameters, the device has no such precision, or the model
            does not fit.
    """
    spec, own = DEVICES[name], device_of(_text(record, "device_name"))
    if own == name and precision is None and utilisation is None:
        return here
    chosen = _precision(record, spec, asked=precision)
    peak = spec.flops_per_s(chosen)
    if peak is None:
        has = ", ".join(other for other in _PRECISIONS if spec.flops_per_s(other))
        raise ConfigError(f"the {name} has no {chosen} (it has {has}): choose one with --precision")
    sizes = _sizes(record)
    _refuse_too_large(sizes, spec, name=name)
    gradient_bytes = gradient_bytes or _BYTES * sizes.num_trained
    per_sample = _flops_per_sample(record)
    own_peak = _own_peak(record, own)
    if own is not None and own_peak is not None and utilisation is None:
        used, speeds = _scaled(here, per_sample, own_peak=own_peak, own=DEVICES[own], spec=spec, peak=peak)
        shapes, micro = f"step times scaled from the {own}", here.micro_batch_sizes
    else:
        used = ASSUMED if utilisation is None else _given(utilisation)
        speeds = _assumed(here, per_sample, used, spec=spec, peak=peak, sizes=sizes)
        shapes, micro = (
            _host_text(speeds),
            (here.micro_batch_sizes[0], _LARGER_MICRO_BATCHES * here.micro_batch_sizes[1]),
        )
    if gb_per_s is not None:
        speeds = tuple(replace(speed, host_gb_per_s=gb_per_s, network_gb_per_s=gb_per_s) for speed in speeds)
        network = f"{gradient_bytes / 1e6:,.3g} MB at {gb_per_s:g} GB/s, as given"
    else:
        network = (
            f"{gradient_bytes / 1e6:,.3g} MB at {spec.link_gb_per_s:g} GB/s in a host of {DEVICES_PER_HOST} (data "
            f"sheet), {NETWORK_GB_PER_S:g} GB/s between hosts (assumed, {NETWORK_RANGE_GB_PER_S[0]:g} to "
            f"{NETWORK_RANGE_GB_PER_S[1]:g})"
        )
    planned, fastest, slowest = speeds
    volumes = [gradient_bytes / speed.network_gb_per_s / 1e9 for speed in speeds]
    return OtherDevices(
        name=name,
        spec=spec,
        precision=chosen,
        peak_flops_per_s=peak,
        utilisation=used,
        planned=planned,
        fastest=fastest,
        slowest=slowest,
        gradient_bytes=gradient_bytes,
        all_reduce=AllReduce(
            volume_s=volumes[0], volume_range_s=(volumes[1], volumes[2]), latency_s=latency_s, source=network
        ),
        micro_batch_sizes=micro,
        world_size=here.world_size,
        assumptions=(
            _told(used, peak=peak, precision=chosen),
            shapes,
            "activations fit into memory",
        ),
    )


def _told(used: Utilisation, *, peak: float, precision: str) -> str:
    value, low, high = (f"{100 * share:.2g}" for share in (used.value, used.low, used.high))
    share = f"{value} %" if low == high else f"{value} % [{low}, {high}]"
    return f"utilisation {share} of {peak / 1e12:g} TFLOP/s in {precision}, {used.source}"


def _given(share: float) -> Utilisation:
    if not 0 < share <= 1:
        raise ConfigError(f"a utilisation is a share of the peak, above 0 and at most 1, got {share:g}")
    return Utilisation(value=share, low=share, high=share, source="as given")


def _host_text(speeds: Sequence[Speed]) -> str:
    """Return what a pass and a step take at least, in words: planned, and at both ends."""
    each = [
        " ".join((f"{1e3 * times[0]:.2g}", f"[{1e3 * times[1]:.2g}, {1e3 * times[2]:.2g}]"))
        for times in ([speed.floor_s for speed in speeds], [speed.step_s for speed in speeds])
    ]
    both = (
        f"{each[0]} ms per pass and per step" if each[0] == each[1] else f"{each[0]} ms per pass and {each[1]} per step"
    )
    return f"host time of at least {both} (assumed)"


def _assumed(
    here: Devices, per_sample: float, used: Utilisation, *, spec: DeviceSpec, peak: float, sizes: _Sizes
) -> tuple[Speed, ...]:
    """Return the times by counted FLOPs and assumptions: planned, fastest, slowest."""
    all_s, trained_s = (_BYTES * number / (1e9 * spec.memory_gb_per_s) for number in (sizes.num_all, sizes.num_trained))
    pass_s = _READ_IN_PASS * all_s + _WRITTEN_IN_PASS * trained_s
    # The run's own host did it in less: its fixed cost has the same launches and more.
    model = here.model
    most_pass_s, most_step_s = (max(own, HOST_RANGE_S[0]) for own in (model.per_micro_batch_s, model.per_step_s))
    return tuple(
        Speed(
            step_s=max(min(host_s, most_step_s), _MOVED_IN_STEP * trained_s),
            pass_s=0.0,
            floor_s=max(min(host_s, most_pass_s), pass_s),
            sample_s=per_sample / (peak * share),
            host_gb_per_s=link * spec.link_gb_per_s,
            network_gb_per_s=network,
        )
        for share, host_s, link, network in (
            (used.value, HOST_S, 1.0, NETWORK_GB_PER_S),
            (used.high, HOST_RANGE_S[0], 1.0, NETWORK_RANGE_GB_PER_S[1]),
            (used.low, HOST_RANGE_S[1], _LINK_SHARE, NETWORK_RANGE_GB_PER_S[0]),
        )
    )


def _scaled(
    here: Devices, per_sample: float, *, own_peak: float, own: DeviceSpec, spec: DeviceSpec, peak: float
) -> tuple[Utilisation, tuple[Speed, ...]]:
    """Return the utilisation and the times from those of another listed device: planned, fastest, slowest."""
    by_peak, by_memory = own_peak / peak, own.memory_gb_per_s / spec.memory_gb_per_s
    fast, slow = sorted((by_peak, by_memory))
    model, between = here.model, (by_peak * by_memory) ** 0.5
    reached = [min(per_sample / (model.per_sample_s * factor * peak), 1.0) for factor in (between, slow, fast)]
    used = Utilisation(value=reached[0], low=reached[1], high=reached[2], source="scaled from the run's own")
    alone_s = here.all_reduce.seconds(model.world_size)
    speeds = tuple(
        Speed(
            step_s=max(model.per_step_s - alone_s, 0.0),
            pass_s=model.per_micro_batch_s,
            floor_s=factor * model.per_sample_s * model.full_at_samples,
            sample_s=factor * model.per_sample_s,
            host_gb_per_s=link * spec.link_gb_per_s,
            network_gb_per_s=network,
        )
        for factor, link, network in (
            (between, 1.0, NETWORK_GB_PER_S),
            (fast, 1.0, NETWORK_RANGE_GB_PER_S[1]),
            (slow, _LINK_SHARE, NETWORK_RANGE_GB_PER_S[0]),
        )
    )
    return used, speeds


def _precision(record: RunRecord, spec: DeviceSpec, *, asked: str | None) -> str:
    """Return the precision of matrix products there: as asked for, else as in the run.

    A run in float32 on a CPU says nothing of what its user would train with on a GPU: the fastest of 16 bits is taken.
    """
    if asked is not None:
        return asked
    of_run = _PRECISION_OF_RUN.get(str(record.setting("precision")))
    if of_run is None and _text(record, "device_name") is not None:
        of_run = "tf32" if record.setting("execution.tf32") == "true" and spec.tf32 else "float32"
    found = of_run or next(field for field in _PRECISIONS if spec.flops_per_s(field))
    if found == "bfloat16" and spec.bfloat16 is None:
        return "float16"
    return found


@dataclass(frozen=True, kw_only=True)
class _Sizes:
    """Numbers of parameters: all, and those that are trained; the others have neither gradient nor moments."""

    num_all: float
    num_trained: float


def _sizes(record: RunRecord) -> _Sizes:
    num_all, num_trained = (record.facts.get(name) for name in ("num_parameters", "num_trained_parameters"))
    if not isinstance(num_all, int | float) or num_all <= 0:
        raise ConfigError(f"{record.name} does not tell its number of parameters: plan from a run of this version")
    if not isinstance(num_trained, int | float) or not 0 < num_trained <= num_all:
        num_trained = num_all
    return _Sizes(num_all=num_all, num_trained=num_trained)


def _refuse_too_large(sizes: _Sizes, spec: DeviceSpec, *, name: str) -> None:
    needed_gb = _BYTES * (sizes.num_all + _TRAINED_COPIES * sizes.num_trained) / 1e9
    if needed_gb > spec.memory_gb:
        frozen = f", {sizes.num_trained:,.0f} of them trained," if sizes.num_trained < sizes.num_all else ""
        raise ConfigError(
            f"a replica needs at least {needed_gb:,.0f} GB for weights, gradients and two moments of "
            f"{sizes.num_all:,.0f} parameters{frozen} in float32, and the {name} has {spec.memory_gb:g} GB: choose a "
            f"device with more memory, or shard (execution.wrapper=fsdp), which plan does not model"
        )


def _flops_per_sample(record: RunRecord) -> float:
    flops = record.last("ledger/flops", in_summary="flops")
    if not flops:
        raise ConfigError(
            f"{record.name} did not count its FLOPs, without which another device cannot be planned for: plan without "
            f"--device, or from a run whose ledger has them"
        )
    return float(flops) / record.samples_trained


def _own_peak(record: RunRecord, own: str | None) -> float | None:
    peak = record.summary.get("peak_flops_per_s")
    if own is None or not isinstance(peak, int | float) or not peak > 0:
        return None
    return float(peak)


def _text(record: RunRecord, name: str) -> str | None:
    value = record.facts.get(name)
    return value if isinstance(value, str) else None
