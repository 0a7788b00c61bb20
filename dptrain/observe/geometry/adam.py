"""The norm that Adam's preconditioner makes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dptrain.errors import ObservationError
from dptrain.observe.geometry.base import local, precise_norm


class AdamGeometry:
    """‖Pg‖ with Adam's preconditioner P = 1/(√v̂ + ε) (Naganuma et al., arXiv 2602.03001).

    v̂ is Adam's bias-corrected second moment as it stands *before* the step: it is the same on all replicas, for all
    micro-batches and for the averaged gradient, and does not depend on the samples of the step. A step before Adam
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
            return precise_norm(grad * torch.nan, out=out)
        second, correction, epsilon = moment
        return precise_norm(grad / ((second / correction).sqrt() + epsilon), out=out)


def _second_moment(
    state: dict[str, Any] | None, settings: dict[str, Any]
) -> tuple[Tensor, Tensor | float, float] | None:
    """Return (v, its bias correction 1 − β₂ᵗ, ε); the correction stays a tensor, so that nothing waits for a device."""
    if not state:
        return None
    second = state["max_exp_avg_sq" if settings["amsgrad"] else "exp_avg_sq"]
    return local(second), 1 - settings["betas"][1] ** state["step"], settings["eps"]
