"""What `attach` may be given: the wrong kind of value is refused before anything is put on the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

from torch import Tensor, nn
from torch.amp import GradScaler

from dptrain.error_text import shown
from dptrain.errors import ObservationError
from dptrain.noise import Smoothing
from dptrain.observe.loop.sizes import is_count, is_real

LossScale = Callable[[], float | Tensor]
"""Returns the factor on the loss at the time of a step."""


def check_arguments(
    *,
    model: object,
    loss: object,
    micro_batch_size: object,
    loss_scale: object,
    smoothing: object,
    level: object,
    budget: object,
    population: object,
    comm_hook: object,
) -> None:
    """Raise for an argument of `attach` that is none; the wrapper, the method and the geometry are checked elsewhere.

    Raises:
        ObservationError: with the value and what to give instead.
    """
    if not isinstance(model, nn.Module):
        raise ObservationError(
            f"model must be the nn.Module that the loop calls, got {shown(model)}: attach to the module itself, after "
            "DistributedDataParallel or fully_shard"
        )
    if loss not in ("mean", "sum"):
        raise ObservationError(f"loss must be 'mean' or 'sum' over the samples of a micro-batch, got {loss!r}")
    if micro_batch_size is not None and not callable(micro_batch_size) and not is_count(micro_batch_size):
        raise ObservationError(
            "micro_batch_size must be a whole number of samples, at least 1, or a function of the model's arguments "
            f"that returns it, got {shown(micro_batch_size)}"
        )
    if loss_scale is not None and not callable(loss_scale) and not isinstance(loss_scale, GradScaler):
        raise ObservationError(
            f"loss_scale must be the loop's GradScaler or a function that returns the factor, got {shown(loss_scale)}: "
            "for a constant factor, give loss_scale=lambda: factor"
        )
    if smoothing is not None and not isinstance(smoothing, Smoothing):
        raise ObservationError(
            f"smoothing must be a dptrain.noise.Smoothing, such as Smoothing(memory=0.2), got {shown(smoothing)}"
        )
    if not is_real(level) or not 0 < level < 1:
        raise ObservationError(
            f"level must be the confidence of the interval, above 0 and below 1, such as 0.95, got {shown(level)}"
        )
    if not is_real(budget) or not budget > 0:
        raise ObservationError(f"budget must be a positive share of the step time, such as 0.01, got {shown(budget)}")
    if population is not None and not is_count(population):
        raise ObservationError(
            f"population must be the whole number of samples in the data set, at least 1, got {shown(population)}"
        )
    if comm_hook is not None and not _is_hook(comm_hook):
        raise ObservationError(f"comm_hook must be the pair (hook, state), got {shown(comm_hook)}")


def check_optimizers(optimizers: Sequence[Any], *, parameters: Iterable[nn.Parameter]) -> None:
    """Raise where an optimizer has none of the model's parameters: its steps are those of something else.

    Raises:
        ObservationError: with the remedy.
    """
    known = {id(p) for p in parameters}
    for optimizer in optimizers:
        groups = getattr(optimizer, "param_groups", None)
        if groups and not any(id(p) in known for group in groups for p in group["params"]):
            raise ObservationError(
                f"the {type(optimizer).__name__} given as `optimizer` has no parameter of the model, so its steps are "
                "not the model's: give the optimizer of this model, made after wrapping it; or leave `optimizer` out "
                "and call meter.step()"
            )


def loss_factor(loss_scale: LossScale | GradScaler | None) -> LossScale | None:
    """Return a function of the factor on the loss that needs no wait for the device; None for no factor."""
    if not isinstance(loss_scale, GradScaler):
        return None if loss_scale is None else lambda: _checked_factor(loss_scale())
    if not loss_scale.is_enabled():
        return None
    scaler = loss_scale
    # The tensor itself: its public form is a number, and reading that waits for all that is queued.
    # One that has scaled no loss yet has none.
    return lambda: 1.0 if getattr(scaler, "_scale", None) is None else cast("Tensor", scaler._scale)  # noqa: SLF001


def _checked_factor(factor: float | Tensor) -> float | Tensor:
    # A tensor is not looked at: its value is on the device, and a step with a wrong one is not finite.
    if isinstance(factor, Tensor):
        return factor
    if not is_real(factor) or not 0 < factor < math.inf:
        raise ObservationError(
            f"loss_scale returned {shown(factor)}: it must return the factor that the loss was multiplied by, a "
            "positive number"
        )
    return factor


def _is_hook(value: object) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and callable(value[0])  # noqa: PLR2004 - a pair
