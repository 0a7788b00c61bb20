"""From the gradients of a step to new parameters: norm, clipping, and an update that is skipped on the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dptrain.exchange.base import norm_of_whole
from dptrain.runtime.step_reduction import StepRecord
from dptrain.train.execution.loss_scale import LossScale
from dptrain.train.execution.master_weights import MasterWeights
from dptrain.train.optimizer import set_rate, step_if_finite

Norm = Callable[[Sequence[nn.Parameter]], Tensor]


class Update:
    """Makes one optimizer step of the gradients that the replicas have combined.

    Args:
        parameters: those that are trained, of the wrapped model.
        optimizer: over them, or over their float32 copies.
        max_grad_norm: clip the combined gradient to this norm, or None.
        loss_scale: factor on the loss in float16, or None.
        masters: float32 copies of bfloat16 parameters, or None.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        *,
        optimizer: Optimizer,
        max_grad_norm: float | None,
        loss_scale: LossScale | None = None,
        masters: MasterWeights | None = None,
    ) -> None:
        self._parameters = parameters
        self._optimizer = optimizer
        self._max_grad_norm = max_grad_norm
        self._loss_scale = loss_scale
        self._masters = masters

    def scaled(self, loss: Tensor) -> Tensor:
        """Return the loss that the backward pass begins with."""
        return loss if self._loss_scale is None else loss * self._loss_scale.value

    def grad_norms(self, norm: Norm = norm_of_whole) -> tuple[Tensor, Tensor]:
        """Return the norm of the combined gradient, and the same with the factor that float16 puts on it.

        Args:
            norm: of the gradient of some parameters, for replicas that hold parts of the model.
        """
        scaled = norm(self._parameters)
        return scaled if self._loss_scale is None else scaled / self._loss_scale.value, scaled

    def step(self, grad_norm: Tensor, record: StepRecord) -> None:
        """Clip and update, unless the norm is not finite: then parameters and moments stay as they are.

        Args:
            grad_norm: first of `grad_norms`.
            record: learning rate, betas and weight decay of the step.
        """
        if self._masters is not None:
            self._masters.take_gradients()
        if self._max_grad_norm is not None:
            trained = self._parameters if self._masters is None else self._masters.parameters
            clip([p.grad for p in trained if p.grad is not None], norm=grad_norm, largest=self._max_grad_norm)
        set_rate(self._optimizer, record.learning_rate, betas=record.beta_scaling, decay_factor=record.decay_factor)
        scale = None if self._loss_scale is None else self._loss_scale.value
        not_finite = step_if_finite(self._optimizer, grad_norm, grad_scale=scale)
        if self._loss_scale is not None:
            self._loss_scale.update(not_finite=not_finite)
        if self._masters is not None:
            self._masters.give_values()
        self.zero_grad()

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for parameter in self._parameters:
            parameter.grad = None


def clip(grads: Sequence[Tensor], *, norm: Tensor, largest: float) -> None:
    """Shorten the gradient to `largest` where its norm is above it, as `torch.nn.utils.clip_grads_with_norm_` does."""
    # In place, and not by `/`, which is a function in Python.
    factor = (norm + 1e-6).reciprocal_().mul_(largest).clamp_(max=1.0)
    torch._foreach_mul_(list(grads), factor)
