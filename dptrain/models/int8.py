"""Weights as int8 with a scale for each output channel, made after training, and back; no layer computes with them.

A weight of the name `x.weight` becomes two tensors: `x.weight`, int8 in −127 … 127, and `x.weight_scale`, float32, one
number for each output channel. The weight is their product.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from dptrain.errors import ConfigError

SCALE = "_scale"
"""The end of the name of a weight's scales."""
_LARGEST = 127  # symmetric round zero


def int8_weights(model: nn.Module) -> list[str]:
    """Return the names of the weights of linear and convolutional layers, each under the first of its names.

    Transposed convolutions are left out: their output channels are not the first dimension.
    """
    layers = (m for m in model.modules() if isinstance(m, (nn.Linear, _ConvNd)) and not isinstance(m, _ConvTransposeNd))
    found = {id(layer.weight) for layer in layers}
    return [name for name, parameter in model.named_parameters() if id(parameter) in found]


def as_int8(tensors: Mapping[str, Tensor], names: Collection[str]) -> dict[str, Tensor]:
    """Return the tensors with some weights as int8 and their scales; the others are the same.

    Args:
        tensors: by name.
        names: of the weights, whose first dimension is that of the output channels.

    Raises:
        ConfigError: where a weight is not finite, or the name of its scales is taken.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name not in names:
            found[name] = tensor
            continue
        weight = tensor.float()
        if not torch.isfinite(weight).all():
            raise ConfigError(f"{name} holds numbers that are not finite, and int8 has none: export it without --int8")
        if name + SCALE in tensors:
            raise ConfigError(f"the model has a tensor {name + SCALE} of its own: export it without --int8")
        scale = weight.abs().flatten(1).amax(1) / _LARGEST
        by_channel = scale.view(-1, *(1,) * (weight.dim() - 1))
        # A channel of zeros has the scale 0, and stays one.
        numbers = torch.where(by_channel > 0, weight / by_channel, 0.0).round().clamp(-_LARGEST, _LARGEST)
        found[name], found[name + SCALE] = numbers.to(torch.int8), scale
    return found


def from_int8(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of `as_int8` with weights in float32 again; any others as they are."""
    found = {}
    for name, tensor in tensors.items():
        of = tensors.get(name.removesuffix(SCALE))
        if name.endswith(SCALE) and of is not None and of.dtype == torch.int8:
            continue
        scale = tensors.get(name + SCALE)
        if tensor.dtype == torch.int8 and scale is not None:
            tensor = tensor.float() * scale.view(-1, *(1,) * (tensor.dim() - 1))  # noqa: PLW2901 - the same, wider
        found[name] = tensor
    return found
