"""Puts a meter into a loop that somebody already has; what the meter does stands in `meter`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dptrain.errors import ObservationError
from dptrain.noise import Smoothing
from dptrain.observe.ddp_tap import DdpTap
from dptrain.observe.meter import LossScale, Meter
from dptrain.observe.parameter_tap import ParameterTap
from dptrain.observe.tap import Tap

Method = Literal["auto", "parameters", "hook"]


def attach(
    model: nn.Module,
    *,
    method: Method = "auto",
    micro_batch_size: int | None = None,
    loss_scale: LossScale | None = None,
    smoothing: Smoothing | None = None,
    level: float = 0.95,
    population: int | None = None,
) -> Meter:
    """Measure the gradient noise scale in a loop of your own.

    ```python
    meter = dptrain.attach(model)        # after wrapping in DDP, before training
    ...                                  # forward, loss / accumulation_steps, backward: as ever
    reading = meter.step()               # after the last backward, before clipping and optimizer.step()
    print(reading.noise_scale)           # when you like; only this waits
    ```

    The loss is taken to be the mean over its micro-batch, and the step's gradient the mean over its micro-batches
    (each loss divided by the number of accumulation steps). Micro-batches are told apart by the model's forward
    passes in training mode.

    Args:
        model: the module that the loop calls: in DDP, or plain in one process.
        method: "parameters" sees each micro-batch and needs at least two per step, over all replicas; "hook" sees
            each replica's accumulated gradient in DDP's communication hook and needs two replicas; "auto" takes
            the parameters.
        micro_batch_size: samples in a micro-batch; by default the first dimension of the first tensor given to
            the model.
        loss_scale: called at each step for the factor on the loss, such as `scaler.get_scale`. The taps see scaled
            gradients, so the meter must too: call `meter.step()` before `scaler.unscale_(optimizer)`.
        smoothing: how fast the past is forgotten.
        level: confidence of the interval.
        population: samples in the data set where it is small and drawn without replacement.

    Raises:
        ObservationError: where the meter could not be right; the text has the remedy.
    """
    wrapped = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    group = wrapped.process_group if isinstance(wrapped, DistributedDataParallel) else None
    _refuse_unknown_wrapping(wrapped)
    meter = Meter(
        model.parameters(),
        tap=_tap(wrapped, method),
        group=group,
        loss_scale=loss_scale,
        smoothing=smoothing,
        level=level,
        population=population,
    )

    def announce(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module.training and torch.is_grad_enabled():
            meter.begin(num_samples=micro_batch_size or _first_dimension(args, kwargs))

    meter.on_remove(model.register_forward_pre_hook(announce, with_kwargs=True).remove)
    return meter


def _refuse_unknown_wrapping(model: nn.Module) -> None:
    """Raise where gradients are combined in a way that the taps of this version do not see."""
    # A sharded parameter is known by its mesh: importing DTensor to ask for its type would double the import time.
    if any(hasattr(p, "device_mesh") for p in model.parameters()):
        raise ObservationError(
            "the parameters are sharded (FSDP2 or tensor parallelism): this version measures DDP and single processes"
        )
    if isinstance(model, DistributedDataParallel) or not dist.is_initialized() or dist.get_world_size() == 1:
        return
    raise ObservationError(
        f"{type(model).__name__} is not wrapped in DistributedDataParallel but the process group has "
        f"{dist.get_world_size()} ranks: attach to the module that DDP returns, after wrapping"
    )


def _tap(model: nn.Module, method: Method) -> Tap:
    if method in ("auto", "parameters"):
        return ParameterTap(model.parameters())
    if method != "hook":
        raise ObservationError(f"method must be 'auto', 'parameters' or 'hook', got {method!r}")
    if not isinstance(model, DistributedDataParallel):
        raise ObservationError(f"method='hook' needs a DistributedDataParallel module, got {type(model).__name__}")
    return DdpTap(model)


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
