"""Puts a meter together from how a model is wrapped and what its user asked for."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dptrain.errors import ObservationError
from dptrain.noise import Smoothing
from dptrain.observe.checks.duplicate_data_check import DuplicateDataCheck
from dptrain.observe.checks.gradient_checksum import GradientChecksum
from dptrain.observe.checks.step_check import StepCheck
from dptrain.observe.geometry import AdamGeometry, Geometry, GeometryName, PlainGeometry
from dptrain.observe.geometry.dual import DualGeometry, DualName
from dptrain.observe.global_gradient import GlobalGradient, UnreducedGradient
from dptrain.observe.groups import Groups, GroupsLike, resolve_groups
from dptrain.observe.hooks.base import GradientHook
from dptrain.observe.hooks.ddp import CommHook, DdpCommHook
from dptrain.observe.hooks.parameter import ParameterHook
from dptrain.observe.hooks.wrapping import Wrapping, over_stages, reduction_formats
from dptrain.observe.loop.arguments import LossScale
from dptrain.observe.loop.halves import HalfBatches
from dptrain.observe.measurement_interval import MeasurementInterval
from dptrain.observe.meter import Meter

GeometryLike = GeometryName | Mapping[str, DualName]
Method = Literal["auto", "parameters", "hook"]

_DUAL: tuple[DualName, ...] = ("sign", "spectral")
_LOSSY = ("powerSGD_hook", "quantization_hooks", "dptrain.exchange.compressed")
"""Modules whose communication hooks lose information on purpose."""
_HALF = {"fp16_compress": torch.float16, "bf16_compress": torch.bfloat16}
"""How the names of torch's hooks begin that send gradients in 16 bits, by themselves or round another hook."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What `attach` was asked for; the texts stand there."""

    method: Method = "auto"
    loss_scale: LossScale | None = None
    groups: GroupsLike | None = None
    geometry: GeometryLike = "sgd"
    optimizers: Sequence[Any] = field(default_factory=tuple)
    every: int | None = None
    budget: float = 0.01
    comm_hook: tuple[CommHook, object] | None = None
    smoothing: Smoothing | None = None
    level: float = 0.95
    population: int | None = None
    num_stages: int = 1


def build_meter(wrapping: Wrapping, options: Options) -> Meter:
    """Return a meter on the model's gradients, which nobody announces micro-batches to yet.

    Raises:
        ObservationError: where it could not be right.
    """
    wrapping = over_stages(wrapping, num_stages=options.num_stages)
    if wrapping.num_stages > 1 and (
        options.method == "hook" or options.groups is not None or options.geometry != "sgd"
    ):
        raise ObservationError(
            "the norms of pipeline stages are added up for the whole model, by parameters and in the plain norm: leave "
            "method, groups and geometry out, or measure one stage by itself, without num_stages"
        )
    every_parameter = list(wrapping.model.parameters())
    parameters = [p for p in every_parameter if p.requires_grad]
    by_rows = options.geometry == "sgd" and wrapping.reduction == "wrapper"
    groups = resolve_groups(options.groups, model=wrapping.inner, by_rows=by_rows)
    groups = replace(groups, shares=wrapping.shares(parameters))
    geometry = _geometry(options, parameters=parameters, wrapping=wrapping, groups=groups)
    # All that may be refused comes before the hook, which puts hooks on the model.
    interval_rule = MeasurementInterval(every=options.every, budget=options.budget)
    hook = _hook(wrapping, options, groups=groups, geometry=geometry)
    averaged = GlobalGradient if wrapping.reduction == "wrapper" else UnreducedGradient
    dual = _dual(wrapping, options, parameters=parameters, groups=groups)
    return Meter(
        parameters,
        hook=hook,
        group=wrapping.group,
        loss_scale=options.loss_scale,
        smoothing=options.smoothing,
        level=options.level,
        population=options.population,
        groups=groups,
        geometry=geometry,
        interval_rule=interval_rule,
        duplicate_data_check=DuplicateDataCheck(wrapping.group),
        check=_check(wrapping, options, parameters=parameters, every_parameter=every_parameter),
        divisor=wrapping.divisor,
        ranks_per_replica=wrapping.ranks_per_replica,
        halves=HalfBatches(parameters, model=wrapping.model, groups=groups, geometry=geometry),
        averaged=averaged(parameters, groups=groups, geometry=geometry, num_shards=wrapping.num_shards),
        dual=dual,
    )


def _dual(
    wrapping: Wrapping, options: Options, *, parameters: list[nn.Parameter], groups: Groups
) -> DualGeometry | None:
    """Return what measures in dual norms, or None where the geometry is another.

    Raises:
        ObservationError: where a micro-batch's or the averaged gradient is not there whole.
    """
    kinds: list[DualName]
    if isinstance(options.geometry, Mapping):
        if set(options.geometry) != set(groups.names) or not set(options.geometry.values()) <= set(_DUAL):
            raise ObservationError(
                f"geometry as a mapping must give 'sign' or 'spectral' to each of the groups {list(groups.names)}, got "
                f"{dict(options.geometry)}"
            )
        kinds = [options.geometry[groups.names[label]] for label in groups.labels]
    elif options.geometry in _DUAL:
        kinds = [options.geometry] * len(parameters)
    else:
        return None
    if wrapping.kind == "fsdp" or wrapping.reduction == "optimizer" or options.method == "hook":
        raise ObservationError(
            "the sign and spectral geometries need each parameter's whole gradient on each rank, of a single "
            "micro-batch and averaged: measure under DDP or in one process with method='parameters', or with "
            "geometry='sgd'"
        )
    if any(p.is_complex() for p in parameters):
        raise ObservationError("the sign and spectral geometries do not know complex parameters: use geometry='sgd'")
    return DualGeometry(parameters, kinds=kinds, groups=groups, smoothing=options.smoothing, level=options.level)


def _check(
    wrapping: Wrapping, options: Options, *, parameters: list[nn.Parameter], every_parameter: list[nn.Parameter]
) -> StepCheck:
    checksum = GradientChecksum(
        parameters,
        shard=(wrapping.shard, wrapping.num_shards),
        eligible=wrapping.cut_by_rows,
        num_rows=wrapping.num_rows,
    )
    hooks = [hook for _, hook in _comm_hooks(wrapping.model)]
    if options.comm_hook is not None:
        hooks.append(options.comm_hook[0])
    hooks = [inside for hook in hooks for inside in _with_those_inside(hook)]
    names = [str(getattr(hook, "__name__", "")) for hook in hooks]
    formats = [dtype for start, dtype in _HALF.items() if any(name.startswith(start) for name in names)]
    for dtype in (*formats, *reduction_formats(wrapping.model)):
        checksum.expect_reduction_in(dtype)
    return StepCheck(
        checksum,
        parameters=parameters,
        others=[p for p in every_parameter if not p.requires_grad],
        present=None if wrapping.kind == "fsdp" else wrapping.model.parameters,
        group=wrapping.group,
        whole=wrapping.reduction == "wrapper" and wrapping.num_shards == 1 and wrapping.ranks_per_replica == 1,
        exact=not any(str(getattr(hook, "__module__", "")).endswith(_LOSSY) for hook in hooks),
    )


def _with_those_inside(hook: Any) -> list[Any]:  # noqa: ANN401 - a communication hook
    """Return a communication hook and those that it calls: in a partial, or a wrapper's closure."""
    found, waiting = [], [hook]
    while waiting:
        one = waiting.pop()
        if isinstance(one, functools.partial):
            waiting.append(one.func)
            continue
        found.append(one)
        cells = [cell.cell_contents for cell in getattr(one, "__closure__", None) or ()]
        waiting += [inside for inside in cells if callable(inside) and not any(inside is known for known in found)]
    return found


def _comm_hooks(model: nn.Module) -> list[tuple[Any, Any]]:
    """Return (state, hook) of those that are registered with DDP already."""
    registered = getattr(model, "_comm_hooks", []) if isinstance(model, DistributedDataParallel) else []
    return [(state, hook) for hook, state in registered]


def _geometry(options: Options, *, parameters: list[nn.Parameter], wrapping: Wrapping, groups: Groups) -> Geometry:
    if isinstance(options.geometry, Mapping) or options.geometry in ("sgd", *_DUAL):
        return PlainGeometry(groups.rows)
    if options.geometry != "adam":
        raise ObservationError(
            f"geometry must be 'sgd', 'adam', 'sign', 'spectral' or a mapping from groups, got {options.geometry!r}"
        )
    if not options.optimizers:
        raise ObservationError("geometry='adam' reads the optimizer's state: give it as `optimizer`")
    if wrapping.num_shards > 1 or wrapping.reduction == "optimizer":
        raise ObservationError(
            f"geometry='adam' needs the whole preconditioner on each rank, but it is cut into "
            f"{max(wrapping.num_shards, dist.get_world_size())} shards: measure with geometry='sgd', or with "
            "replicate() or DDP in place of fully_shard"
        )
    if any(p.is_complex() for p in parameters):
        raise ObservationError("geometry='adam' does not know complex parameters: measure with geometry='sgd'")
    return AdamGeometry(parameters, optimizer=options.optimizers[0])


def _hook(wrapping: Wrapping, options: Options, *, groups: Groups, geometry: Geometry) -> GradientHook:
    model, method = wrapping.model, options.method
    if method not in ("auto", "parameters", "hook"):
        raise ObservationError(f"method must be 'auto', 'parameters' or 'hook', got {method!r}")
    if method == "hook":
        if not isinstance(model, DistributedDataParallel):
            raise ObservationError(f"method='hook' needs a DistributedDataParallel module, got {type(model).__name__}")
        return DdpCommHook(model, comm_hook=options.comm_hook, groups=groups, geometry=geometry)
    if options.comm_hook is not None:
        raise ObservationError(
            "`comm_hook` is for method='hook': with the parameters, register your communication hook with DDP yourself"
        )
    if wrapping.kind == "fsdp":
        from dptrain.observe.hooks.fsdp import FsdpHook

        return FsdpHook(model, groups=groups, geometry=geometry)
    return ParameterHook(model.parameters(), groups=groups, geometry=geometry)
