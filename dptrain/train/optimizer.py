"""The optimizer of a run and its skippable step: non-finite gradients change nothing, decided on the device."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from dptrain.config.filled_in import given
from dptrain.config.train_config import OptimizerConfig

NUM_STATES: Mapping[str, int] = MappingProxyType({"adamw": 2, "sgd": 1})
"""Tensors of the size of the parameters that an optimizer keeps, by its name."""


def build_optimizer(config: OptimizerConfig, model: nn.Module) -> Optimizer:
    """Build the optimizer over the trainable parameters; vectors (biases, norms) are not decayed.

    The fused implementations are used because they skip a step on the device (`found_inf`).
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.dim() <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    learning_rate, fused = given(config.learning_rate), _can_fuse(trainable)
    if config.name == "adamw":
        return AdamW(groups, lr=learning_rate, betas=(config.beta1, config.beta2), fused=fused)
    optimizer = SGD(groups, lr=learning_rate, momentum=config.beta1, fused=fused)
    if config.beta1:
        # Fused SGD leaves its buffers uninitialised if the very first step is skipped. Zeros give the same first
        # step, bit for bit, as no buffer does.
        for parameter in trainable:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def _can_fuse(parameters: Iterable[nn.Parameter]) -> bool:
    return all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in parameters)


def set_rate(
    optimizer: Optimizer,
    learning_rate: float,
    *,
    betas: tuple[float, float] | None = None,
    weight_decay: float | None = None,
) -> None:
    """Set the learning rate of all groups; where given Adam's betas, and the decay of the groups that have one."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
        if betas is not None:
            group["betas"] = betas
        if weight_decay is not None and group["weight_decay"]:
            group["weight_decay"] = weight_decay


def skips_on_device(optimizer: Optimizer) -> bool:
    """Whether a step can be skipped without the host knowing; else each step waits for the device once."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def step_if_finite(optimizer: Optimizer, grad_norm: Tensor) -> None:
    """Take an optimizer step unless the gradient's norm is not finite: then parameters and moments stay as they are.

    The norm is that of the combined gradient, so all replicas skip together or not at all. (Synchronises the device
    where the optimizer cannot skip by itself.)
    """
    not_finite = (~torch.isfinite(grad_norm)).to(torch.float32)
    if skips_on_device(optimizer):
        # The protocol of torch.amp.GradScaler with fused optimizers, without a scale.
        optimizer.grad_scale = None  # type: ignore[attr-defined]
        optimizer.found_inf = not_finite  # type: ignore[attr-defined]
        optimizer.step()
    elif not_finite.item() == 0:
        optimizer.step()
