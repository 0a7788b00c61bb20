"""The norm in which gradients are measured: the plain one, or the one that Adam's preconditioner makes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from dptrain.errors import ObservationError

GeometryName = Literal["sgd", "adam"]

_norm: Callable[..., Tensor] = torch.linalg.vector_norm
_PRECISE = (torch.float32, torch.float64)


class Geometry(Protocol):
    """How long a gradient is.

    Attributes:
        name: as it is shown beside the noise scale.
    """

    name: str

    def open(self) -> None:
        """Take what stays in force for one optimizer step; called before its first gradient is seen."""

    def norm(self, index: int, grad: Tensor, *, out: Tensor | None = None) -> Tensor:
        """Return the norm of the gradient of parameter `index`, a scalar of at least single precision.

        Args:
            index: of the parameter.
            grad: its gradient.
            out: what was returned for such a gradient before, to write it to.
        """


class PlainGeometry:
    """‖g‖, the geometry of SGD."""

    name = "sgd"

    def open(self) -> None:
        """Nothing to take."""

    def norm(self, index: int, grad: Tensor, *, out: Tensor | None = None) -> Tensor:  # noqa: ARG002 - all alike
        """Return ‖g‖."""
        return _precise_norm(grad, out=out)


def _precise_norm(grad: Tensor, *, out: Tensor | None) -> Tensor:
    # Reduced precision would lose the very difference that is measured. To name the dtype costs 2 µs a call.
    if grad.dtype in _PRECISE:
        return _norm(grad, out=out)
    return _norm(grad, dtype=torch.float32, out=out)


class AdamGeometry:
    """‖Pg‖ with Adam's preconditioner P = 1/(√v̂ + ε) (Naganuma et al., arXiv 2602.03001).

    v̂ is Adam's bias-corrected second moment as it stands *before* the step: it is the same on all replicas, for all
    micro-batches and for the combined gradient, and does not depend on the samples of the step. A step before Adam
    has a state has no such norm: it is measured as not a number, and so dropped on all replicas alike.

    Args:
        parameters: those that are watched.
        optimizer: `torch.optim.Adam` or `AdamW` over them.

    Raises:
        ObservationError: for another optimizer, or parameters that it does not train.
    """

    name = "adam"

    def __init__(self, parameters: Sequence[nn.Parameter], *, optimizer: torch.optim.Optimizer) -> None:
        # accelerate wraps the optimizer and keeps it under this name.
        optimizer = getattr(optimizer, "optimizer", optimizer)
        if not isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)):
            raise ObservationError(
                f"geometry='adam' reads the second moments of torch.optim.Adam or AdamW, got "
                f"{type(optimizer).__name__}: give such an optimizer or measure with geometry='sgd'"
            )
        trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if any(id(p) not in trained for p in parameters):
            raise ObservationError(
                "geometry='adam' needs an optimizer over all trained parameters of the model: make it from "
                "model.parameters() after wrapping, and freeze what it does not train"
            )
        self._optimizer = optimizer
        self._parameters = list(parameters)
        self._second_moments: list[tuple[Tensor, Tensor | float, float] | None] = []

    def open(self) -> None:
        """Look up the second moments; loading a state replaces them, so they are not kept over steps."""
        settings = {id(p): group for group in self._optimizer.param_groups for p in group["params"]}
        self._second_moments = [_second_moment(self._optimizer.state.get(p), settings[id(p)]) for p in self._parameters]

    def norm(self, index: int, grad: Tensor, *, out: Tensor | None = None) -> Tensor:
        """Return ‖Pg‖, or not a number where Adam has no state for this parameter."""
        moment = self._second_moments[index]
        if moment is None:
            return _precise_norm(grad * torch.nan, out=out)
        second, correction, epsilon = moment
        return _precise_norm(grad / ((second / correction).sqrt() + epsilon), out=out)


def _second_moment(
    state: dict[str, Any] | None, settings: dict[str, Any]
) -> tuple[Tensor, Tensor | float, float] | None:
    """Return (v, its bias correction 1 − β₂ᵗ, ε); the correction stays a tensor, so that nothing waits for a device."""
    if not state:
        return None
    second = state["max_exp_avg_sq" if settings["amsgrad"] else "exp_avg_sq"]
    return local(second), 1 - settings["betas"][1] ** state["step"], settings["eps"]


def local(tensor: Tensor) -> Tensor:
    """Return the part of a sharded tensor that this rank holds; a plain tensor as it is."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()
