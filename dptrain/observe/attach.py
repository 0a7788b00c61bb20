"""Puts a meter into a loop that somebody already has; what the meter does stands in `meter`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from dptrain.errors import ObservationError
from dptrain.noise import Smoothing
from dptrain.observe.checks.duplicate_data_check import DuplicateDataCheck
from dptrain.observe.geometry import AdamGeometry, Geometry, GeometryName, PlainGeometry
from dptrain.observe.groups import Groups, GroupsLike, resolve_groups
from dptrain.observe.hooks.base import GradientHook
from dptrain.observe.hooks.ddp import CommHook, DdpCommHook
from dptrain.observe.hooks.join import check_model
from dptrain.observe.hooks.parameter import ParameterHook
from dptrain.observe.hooks.wrapping import Wrapping, identify
from dptrain.observe.measurement_interval import MeasurementInterval
from dptrain.observe.meter import LossScale, Meter

Method = Literal["auto", "parameters", "hook"]
Loss = Literal["mean", "sum"]


def attach(
    model: nn.Module,
    *,
    method: Method = "auto",
    loss: Loss = "mean",
    micro_batch_size: int | None = None,
    loss_scale: LossScale | GradScaler | None = None,
    groups: GroupsLike | None = None,
    geometry: GeometryName = "sgd",
    optimizer: Optimizer | None = None,
    every: int | None = None,
    budget: float = 0.01,
    inner: CommHook | None = None,
    inner_state: object = None,
    smoothing: Smoothing | None = None,
    level: float = 0.95,
    population: int | None = None,
) -> Meter:
    """Measure the gradient noise scale in a loop of your own.

    ```python
    meter = dptrain.attach(model)        # after wrapping in DDP or fully_shard, before training
    ...                                  # forward, loss / accumulation_steps, backward: unchanged
    reading = meter.step()               # after the last backward, before clipping and optimizer.step()
    print(reading.noise_scale)           # when you like; only this waits
    ```

    The step's gradient is taken to be the mean over its micro-batches (each loss divided by the number of
    accumulation steps). Micro-batches are separated by the model's forward passes in training mode, until the loop
    calls `meter.begin` itself. `docs/measure.md` has the table of wrappers.

    Args:
        model: the module that the loop calls: in DDP, wrapped by `fully_shard` or `replicate()`, or plain in one
            process; compiled or not.
        method: "parameters" sees each micro-batch and needs at least two per step, over all replicas; "hook" sees
            each replica's accumulated gradient in DDP's communication hook and needs two replicas; "auto" takes
            the parameters.
        loss: whether a micro-batch's loss is the mean or the sum over its samples.
        micro_batch_size: samples in a micro-batch; by default the first dimension of the first tensor given to
            the model.
        loss_scale: the `GradScaler` of the loop, whose factor is used on the device; or a function, called at each
            measured step, that returns the factor on the loss. One that asks the scaler for a number
            (`scaler.get_scale`) makes the host wait for the device. The hooks see scaled gradients, so the meter must
            too: call `meter.step()` before `scaler.unscale_(optimizer)`.
        groups: parts of the model that get a noise scale of their own: name → prefix or parameters, "module" for
            the first-level children, or an optimizer for its parameter groups.
        geometry: the norm: "sgd" for the plain one, "adam" for the one of Adam's preconditioner.
        optimizer: whose state holds the preconditioner; `torch.optim.Adam` or `AdamW`.
        every: measure each such step; by default the meter chooses by what measuring costs.
        budget: the share of the step time that measuring may take, where `every` is not given.
        inner: with method="hook", your own communication hook, which the meter calls with the bucket untouched.
        inner_state: its state.
        smoothing: how fast the past is forgotten.
        level: confidence of the interval.
        population: samples in the data set where it is small and drawn without replacement.

    Raises:
        ObservationError: where the meter could not be right; the text has the remedy.
    """
    wrapping = identify(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    resolved = resolve_groups(groups, model=wrapping.inner)
    norm = _geometry(geometry, optimizer=optimizer, parameters=parameters, wrapping=wrapping)
    if loss not in ("mean", "sum"):
        raise ObservationError(f"loss must be 'mean' or 'sum' over the samples of a micro-batch, got {loss!r}")
    # All that may be refused comes before the hook, which puts hooks on the model.
    interval_rule = MeasurementInterval(every=every, budget=budget)
    meter = Meter(
        parameters,
        hook=_hook(wrapping, method, groups=resolved, geometry=norm, inner=inner, inner_state=inner_state),
        group=wrapping.group,
        loss_scale=_factor(loss_scale),
        smoothing=smoothing,
        level=level,
        population=population,
        groups=resolved,
        geometry=norm,
        num_shards=wrapping.num_shards,
        interval_rule=interval_rule,
        guard=DuplicateDataCheck(wrapping.group),
    )

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not (module.training and torch.is_grad_enabled()):
            return
        check_model(wrapping.model, meter=meter)
        if meter.measuring and not meter.by_hand:
            num_samples = micro_batch_size or _first_dimension(args, kwargs)
            meter.begin_forward(num_samples=num_samples, weight=num_samples if loss == "sum" else None)

    outside = torch.compiler.disable(note)  # type: ignore[no-untyped-call]

    def announce(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # Where the model is compiled in place, its hooks are inside; this one must stay outside of the graph. Elsewhere
        # the way round dynamo would cost 20 µs a call for nothing.
        (outside if torch.compiler.is_dynamo_compiling() else note)(module, args, kwargs)

    meter.on_remove(model.register_forward_pre_hook(announce, with_kwargs=True).remove)
    return meter


def _factor(loss_scale: LossScale | GradScaler | None) -> LossScale | None:
    """Return a function of the factor that needs no wait."""
    if not isinstance(loss_scale, GradScaler):
        return loss_scale
    if not loss_scale.is_enabled():
        return None
    scaler = loss_scale
    # The tensor itself: its public form is a number, and reading that waits for all that is queued.
    # One that has scaled no loss yet has none.
    return lambda: 1.0 if getattr(scaler, "_scale", None) is None else cast("Tensor", scaler._scale)  # noqa: SLF001


def _geometry(
    name: GeometryName, *, optimizer: Optimizer | None, parameters: list[nn.Parameter], wrapping: Wrapping
) -> Geometry:
    if name == "sgd":
        return PlainGeometry()
    if name != "adam":
        raise ObservationError(f"geometry must be 'sgd' or 'adam', got {name!r}")
    if optimizer is None:
        raise ObservationError("geometry='adam' reads the optimizer's state: give it as `optimizer`")
    if wrapping.num_shards > 1:
        raise ObservationError(
            f"geometry='adam' needs the whole preconditioner on each rank, but it is cut into {wrapping.num_shards} "
            "shards: measure with geometry='sgd', or with replicate() or DDP in place of fully_shard"
        )
    return AdamGeometry(parameters, optimizer=optimizer)


def _hook(
    wrapping: Wrapping,
    method: Method,
    *,
    groups: Groups,
    geometry: Geometry,
    inner: CommHook | None,
    inner_state: object,
) -> GradientHook:
    model = wrapping.model
    if method not in ("auto", "parameters", "hook"):
        raise ObservationError(f"method must be 'auto', 'parameters' or 'hook', got {method!r}")
    if method == "hook":
        if not isinstance(model, DistributedDataParallel):
            raise ObservationError(f"method='hook' needs a DistributedDataParallel module, got {type(model).__name__}")
        return DdpCommHook(model, inner=inner, inner_state=inner_state, groups=groups, geometry=geometry)
    if inner is not None:
        raise ObservationError(
            "`inner` is for method='hook': with the parameters, register your communication hook with DDP yourself"
        )
    if wrapping.kind == "fsdp":
        from dptrain.observe.hooks.fsdp import FsdpHook

        return FsdpHook(model, groups=groups, geometry=geometry)
    return ParameterHook(model.parameters(), groups=groups, geometry=geometry)


def _first_dimension(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    for tensor in _tensors((args, kwargs)):
        if tensor.dim() > 0:
            return tensor.shape[0]
    raise ObservationError("the model was called without a tensor, so its batch size is unknown: give micro_batch_size")


def _tensors(value: object) -> Iterator[Tensor]:
    """Walk through nested arguments, first come first."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
