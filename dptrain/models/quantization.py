"""Linear and convolutional layers whose products are computed in few bits, emulated in the parameters' own type.

The forward pass rounds weights and activations, the backward pass the gradients of outputs; both products of the
backward pass are of rounded numbers. Biases and sums stay as they are, and a gradient goes through the rounding of
weights and activations as if there were none (straight through: Bengio et al. 2013, arXiv 1308.3432).

Activations and gradients have a scale for each row of a linear layer (a sample's token) and for each sample of a
convolution, weights one for the tensor. A scale over several samples would make the gradient of one depend on those
that it shares a micro-batch with; then tr(Σ) per sample would have no meaning. For the same reason weights are rounded
to the nearest number whatever the setting: a draw would be one for all samples of a micro-batch, and would not average
out over them.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd

from dptrain.errors import ConfigError
from dptrain.models.number_formats import FORMATS, Grid, NumberFormat, rounded

_MAX_NAMED = 5


class _Rounded(torch.autograd.Function):
    """Rounds in the forward pass and hands gradients on."""

    generate_vmap_rule = True  # for gradients of single samples by torch.func

    @staticmethod
    def forward(values: Tensor, grid: Grid, dims: tuple[int, ...] | None, stochastic: bool) -> Tensor:  # noqa: FBT001 - torch's own form
        return rounded(values, grid, dims=dims, stochastic=stochastic)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ANN401 - as above
        pass

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:  # noqa: ANN401, ARG004 - as above
        return gradients[0], None, None, None


class _RoundedGradient(torch.autograd.Function):
    """Hands values on and rounds their gradient in the backward pass."""

    generate_vmap_rule = True

    @staticmethod
    def forward(values: Tensor, grid: Grid, dims: tuple[int, ...], stochastic: bool) -> Tensor:  # noqa: ARG004, FBT001 - torch's own form
        return values.view_as(values)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ANN401, ARG004 - as above
        _, ctx.grid, ctx.dims, ctx.stochastic = inputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:  # noqa: ANN401 - as above
        return rounded(gradients[0], ctx.grid, dims=ctx.dims, stochastic=ctx.stochastic), None, None, None


class _Quantized:
    """What the layers below have in common; their classes are put in place of torch's, so that names stay."""

    number_format: NumberFormat
    rounding: str
    training: bool

    def _read(self, inputs: Tensor, weight: Tensor, *, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Return activations and weights in the format; held-out figures draw nothing, as with dropout."""
        stochastic = self.training and self.rounding == "stochastic"
        grid = self.number_format.forward
        found: tuple[Tensor, Tensor] = (
            _Rounded.apply(inputs, grid, dims, stochastic),  # type: ignore[no-untyped-call] # torch declares no types
            _Rounded.apply(weight, grid, None, False),  # type: ignore[no-untyped-call] # noqa: FBT003 - it takes no keywords
        )
        return found

    def _written(self, product: Tensor, bias: Tensor | None, *, dims: tuple[int, ...]) -> Tensor:
        """Return the output; of its gradient the product sees the rounded one, and the bias all of it."""
        stochastic = self.training and self.rounding != "nearest"
        grid = self.number_format.backward
        out: Tensor = _RoundedGradient.apply(product, grid, dims, stochastic)  # type: ignore[no-untyped-call] # as above
        return out if bias is None else out + bias.view(-1, *(1,) * (len(dims) - 1))


class QuantizedLinear(_Quantized, nn.Linear):
    """A linear layer in a number format."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's own name
        """Return the layer's output, shape (…, out_features)."""
        inputs, weight = self._read(input, self.weight, dims=(-1,))
        return self._written(functional.linear(inputs, weight), self.bias, dims=(-1,))


class _QuantizedConv(_Quantized, _ConvNd):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's own name
        """Return the layer's output, shape (samples, out_channels, …), or without samples where the input has none."""
        dims = tuple(range(-1 - len(self.kernel_size), 0))  # channels and places of one sample
        inputs, weight = self._read(input, self.weight, dims=dims)
        return self._written(self._conv_forward(inputs, weight, None), self.bias, dims=dims)


class QuantizedConv1d(_QuantizedConv, nn.Conv1d):
    """A convolution over one dimension in a number format."""


class QuantizedConv2d(_QuantizedConv, nn.Conv2d):
    """A convolution over two dimensions in a number format."""


class QuantizedConv3d(_QuantizedConv, nn.Conv3d):
    """A convolution over three dimensions in a number format."""


_CLASSES: Mapping[type[nn.Module], type[nn.Module]] = MappingProxyType(
    {
        nn.Linear: QuantizedLinear,
        nn.Conv1d: QuantizedConv1d,
        nn.Conv2d: QuantizedConv2d,
        nn.Conv3d: QuantizedConv3d,
    }
)


def quantize_layers(model: nn.Module, *, to: str, rounding: str = "nearest", unquantized: str | None = None) -> None:
    """Have the linear and convolutional layers of a model compute in a format; in place, names and weights stay.

    Args:
        model: with parameters in float32 or float64.
        to: one of `FORMATS`.
        rounding: in training, of activations and of gradients of outputs: nearest; stochastic; or stochastic_gradients,
            which rounds activations to the nearest. In evaluation mode all are rounded to the nearest.
        unquantized: names of layers that stay as they are, patterns with commas.

    Raises:
        ConfigError: where there is no such layer, a pattern matches none, or a layer's class or type has no emulation.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, (nn.Linear, _ConvNd))}
    for pattern in [] if unquantized is None else [part.strip() for part in unquantized.split(",") if part.strip()]:
        matching = [name for name in layers if fnmatchcase(name, pattern)]
        if not matching:
            raise ConfigError(f"model.unquantized: no layer is named {pattern!r}; they are {_listed(layers)}")
        layers = {name: layer for name, layer in layers.items() if name not in matching}
    if not layers:
        raise ConfigError(f"model.quantize={to} needs linear or convolutional layers, and the model has none left")
    if odd := [name for name, layer in layers.items() if type(layer) not in _CLASSES]:
        kinds = ", ".join(sorted({type(layers[name]).__name__ for name in odd}))
        raise ConfigError(
            f"model.quantize={to} cannot compute {kinds} in fewer bits: leave them as they are with "
            f"model.unquantized={','.join(odd[:_MAX_NAMED])}{',…' if len(odd) > _MAX_NAMED else ''}"
        )
    for name, layer in layers.items():
        if layer.weight.dtype not in (torch.float32, torch.float64):
            raise ConfigError(
                f"model.quantize={to} rounds in float32, but the weights of {name} are in {layer.weight.dtype}: build "
                f"the model in float32"
            )
    for layer in layers.values():
        # The class and not a new module: parameters, hooks and what else knows the layer stay.
        layer.__class__ = _CLASSES[type(layer)]  # type: ignore[assignment] # of the same memory
        layer.number_format, layer.rounding = FORMATS[to], rounding  # type: ignore[assignment] # no parameters


def quantized_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers that compute in a format, by name."""
    return {name: module for name, module in model.named_modules() if type(module) in _CLASSES.values()}


def _listed(names: Mapping[str, object]) -> str:
    return ", ".join(list(names)[:_MAX_NAMED]) + (", …" if len(names) > _MAX_NAMED else "")
