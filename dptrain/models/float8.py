"""Linear layers that multiply in float8 on the GPU, by torchao; everything else stays in bfloat16.

The scales are those of torchao's recipe "rowwise_with_gw_hp": one for each row (token) of activations and of gradients
of outputs, and one for each output of a weight; gradients of weights are computed in bfloat16. With one scale for a
tensor, torchao's default, the gradient of a sample would depend on those that it shares a micro-batch with, and tr(Σ)
per sample would have no meaning.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from dptrain.errors import ConfigError
from dptrain.models.gpt import output_layers

_MULTIPLE = 16
"""Of both sizes of a weight, which the GPU's float8 product asks for."""
_ROUTERS = ("router", "gate")
_LEAST_CAPABILITY = (9, 0)
"""H100: the first whose product takes a scale for each row in hardware."""


def use_float8(model: nn.Module, *, device: torch.device, emulate: bool = False) -> list[str]:
    """Put torchao's float8 layers in place of linear layers, in place; parameters stay the same objects and names.

    Left out are layers whose outputs are logits, routers of experts, layers whose sizes are no multiples of 16, and
    those without trained weights.

    Args:
        model: on the device.
        device: of the replica.
        emulate: whether the products are those of rounded numbers in higher precision, on any device; for tests.

    Returns:
        Names of the layers.

    Raises:
        ConfigError: where the device has no such product, torchao is missing, or there is no such layer.
    """
    if not emulate and (device.type != "cuda" or torch.cuda.get_device_capability(device) < _LEAST_CAPABILITY):
        found = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        raise ConfigError(
            f"precision=fp8 needs a GPU of compute capability 9.0 (H100) or newer, and this is {found}: use "
            f"precision=bf16; model.quantize=fp8 emulates fp8 in order to measure the noise scale under it"
        )
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as error:
        raise ConfigError(f"precision=fp8 needs torchao ({error}): pip install 'dptrain[fp8]'") from error

    outputs = output_layers(model)
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    chosen = {name for name, module in linear.items() if module not in outputs and _fits(name, module.weight)}
    if not chosen:
        raise ConfigError(
            f"precision=fp8 has nothing to do: but for the output, none of {len(linear)} linear layers has trained "
            f"weights of sizes that are multiples of {_MULTIPLE}: use precision=bf16"
        )
    config = replace(Float8LinearConfig.from_recipe_name("rowwise_with_gw_hp"), emulate=emulate)
    convert_to_float8_training(model, module_filter_fn=lambda _, name: name in chosen, config=config)
    return sorted(chosen)


def _fits(name: str, weight: torch.Tensor) -> bool:
    is_router = name.rpartition(".")[2] in _ROUTERS
    return not is_router and weight.requires_grad and all(size % _MULTIPLE == 0 for size in weight.shape)
