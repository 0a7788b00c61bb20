"""A tap on the parameters: each micro-batch's gradient, seen by a tensor hook before it is accumulated."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from dptrain.errors import ObservationError


class ParameterTap:
    """Squared norm of every micro-batch's gradient, under DDP with or without `no_sync` and in one process.

    A tensor hook runs once per parameter and backward pass, after tied uses were added up and before the gradient
    is accumulated or reduced. It adds one small kernel for each parameter and micro-batch, and no host sync.

    Args:
        parameters: those to watch; frozen ones are passed over.
    """

    name = "parameters"
    accumulated = False

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        watched = [p for p in parameters if p.requires_grad]
        if not watched:
            raise ObservationError("the model has no parameter that requires a gradient: there is nothing to measure")
        self._zero = torch.zeros((), dtype=torch.float64, device=watched[0].device)
        self._handles = [
            p.register_hook(functools.partial(self._see, i))  # type: ignore[no-untyped-call]
            for i, p in enumerate(watched)
        ]
        self._micro_batches: list[dict[int, Tensor]] = []
        self._listening = True
        self._overlap = False

    def begin(self, *, ignore: bool = False) -> bool:
        """Start a micro-batch; one that is ignored is not looked at."""
        self._listening = not ignore
        replaces = bool(self._micro_batches) and not self._micro_batches[-1]
        if self._listening and not replaces:
            self._micro_batches.append({})
        return not replaces

    def _see(self, index: int, grad: Tensor) -> None:
        if not (self._listening and self._micro_batches):
            return
        norms = self._micro_batches[-1]
        if index in norms:
            self._overlap = True
        if grad.is_sparse:
            grad = grad.coalesce().values()
        # Reduced precision would lose the very difference that is measured: sums of squares are kept in fp32.
        norms[index] = torch.linalg.vector_norm(grad.detach(), dtype=_accumulation_dtype(grad.dtype))

    def collect(self, weights: list[float]) -> Tensor:
        """Return Σ ‖seen‖²/v over the micro-batches of the step."""
        seen, overlap = self._micro_batches, self._overlap
        self._micro_batches, self._overlap = [], False
        if overlap:
            raise ObservationError(
                "a parameter received two gradients within one micro-batch (several backward() calls after one "
                "forward), so the squares cannot be added up: measure with method='hook' under DDP, or add the "
                "losses and call backward() once"
            )
        if len(seen) != len(weights) or not all(seen):
            raise ObservationError(
                f"{len(weights)} micro-batches were announced but gradients of {sum(map(bool, seen))} were seen: "
                "each forward pass in training mode needs its backward pass before the step is closed"
            )
        total = self._zero
        for norms, weight in zip(seen, weights, strict=True):
            total = total + torch.stack(list(norms.values())).double().square().sum() / weight
        return total

    def remove(self) -> None:
        """Take the hooks off the parameters."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
