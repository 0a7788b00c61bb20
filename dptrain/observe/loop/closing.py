"""Has an optimizer's step close the meter's, so that a loop needs no line for it."""

from __future__ import annotations

import functools
from typing import Any

from torch.optim import LBFGS

from dptrain.errors import ObservationError
from dptrain.observe.meter import Meter


def close_with_optimizer(meter: Meter, optimizer: Any) -> None:  # noqa: ANN401 - torch's, or a wrapper round it
    """Close each of the meter's steps when `optimizer.step` begins, before it changes a parameter.

    By then the gradients may be unscaled and clipped: the meter's checks find the factor. A GradScaler that finds an
    overflow does not call the optimizer; the micro-batches of that step are dropped when `.grad` is cleared.

    Args:
        meter: whose steps are closed.
        optimizer: torch's, or accelerate's round one.

    Raises:
        ObservationError: where the optimizer has no hook for it, or runs the backward passes itself.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it under this name
    if not hasattr(optimizer, "register_step_pre_hook") or isinstance(optimizer, LBFGS):
        raise ObservationError(
            f"{type(optimizer).__name__} cannot close the step: leave `optimizer` out, and call meter.step() after the "
            "last backward()"
        )

    def close(_: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # The first argument is the optimizer itself.
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is not None and not _does_nothing(closure):
            raise ObservationError(
                "the optimizer's closure runs its backward passes after the meter's step is closed: call step() "
                "without a closure, or leave `optimizer` out of attach and call meter.step() yourself"
            )
        meter.close_by_optimizer()

    meter.expect_optimizer()
    meter.on_remove(optimizer.register_step_pre_hook(close).remove)


def _does_nothing(closure: object) -> bool:
    """Whether a closure is the empty one that Lightning hands on in manual optimization, where the user gave none."""
    if isinstance(closure, functools.partial):  # its precision plugin wraps it, with the closure as an argument
        return any(map(_does_nothing, closure.args))
    module, name = getattr(closure, "__module__", None) or "", getattr(closure, "__name__", None)
    return name == "do_nothing_closure" and module.endswith(".core.optimizer")
