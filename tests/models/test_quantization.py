"""Layers in few bits: products of rounded numbers, samples that do not see one another, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from dptrain.errors import ConfigError
from dptrain.models.number_formats import FORMATS, rounded
from dptrain.models.quantization import quantize_layers, quantized_layers


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Unflatten(1, (2, 8)),
        nn.Conv1d(2, 3, 3),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(18, 5),
        nn.Tanh(),
        nn.Linear(5, 4),
    )


@pytest.mark.parametrize("kind", ["fp8", "int4"])
def test_products_of_a_linear_layer_are_of_rounded_numbers(kind):
    """Output and the gradients of input, weight and bias are those of the formula, to the last bit."""
    torch.manual_seed(0)
    layer = nn.Linear(6, 3)
    inputs, upstream = torch.randn(4, 6, requires_grad=True), torch.randn(4, 3)
    quantize_layers(layer_of := nn.Sequential(layer), to=kind)
    out = layer_of(inputs)
    out.backward(upstream)
    form = FORMATS[kind]
    x, w = rounded(inputs.detach(), form.forward, dims=(-1,)), rounded(layer.weight.detach(), form.forward)
    g = rounded(upstream, form.backward, dims=(-1,))
    assert torch.equal(out, functional.linear(x, w) + layer.bias)
    assert torch.equal(inputs.grad, g @ w)
    assert torch.equal(layer.weight.grad, g.T @ x)
    assert torch.equal(layer.bias.grad, upstream.sum(0))
    assert not torch.allclose(inputs.grad, upstream @ layer.weight)


@pytest.mark.parametrize(("kind", "shape"), [(nn.Conv1d, (7,)), (nn.Conv2d, (7, 6)), (nn.Conv3d, (5, 4, 6))])
def test_a_convolution_has_one_scale_for_each_sample(kind, shape):
    """It is the convolution of activations and weights that were rounded so, also of one sample without a batch."""
    torch.manual_seed(0)
    layer = kind(2, 3, 3, padding=1, padding_mode="circular")
    inputs = torch.randn(4, 2, *shape) * torch.tensor([1.0, 10.0, 0.1, 3.0]).view(-1, 1, *(1,) * len(shape))
    plain = kind(2, 3, 3, padding=1, padding_mode="circular")
    plain.load_state_dict({"weight": rounded(layer.weight.detach(), FORMATS["fp4"].forward), "bias": layer.bias})
    expected = plain(torch.stack([rounded(one, FORMATS["fp4"].forward) for one in inputs]))
    quantize_layers(nn.Sequential(layer), to="fp4")
    assert torch.allclose(layer(inputs), expected, atol=1e-6)
    assert torch.allclose(layer(inputs[1]), expected[1], atol=1e-5)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_samples_gradient_does_not_depend_on_those_beside_it(kind):
    """The gradient of a batch is the mean of those of its samples, to rounding in float64, though sizes differ."""
    model = network().double()
    quantize_layers(model, to=kind)
    inputs, classes = (
        torch.randn(5, 16).double() * torch.tensor([[1.0], [30.0], [0.1], [2.0], [5.0]]),
        torch.arange(5) % 4,
    )
    parameters = list(model.parameters())
    whole = torch.autograd.grad(functional.cross_entropy(model(inputs), classes), parameters)
    singles = [
        torch.autograd.grad(functional.cross_entropy(model(inputs[[at]]), classes[[at]]), parameters) for at in range(5)
    ]
    # bf16 has no scale, so the factor 1/5 of the mean may round other numbers.
    allowed = 2e-2 if kind == "bf16" else 1e-9
    for found, parts in zip(whole, zip(*singles, strict=True), strict=True):
        mean = torch.stack(parts).mean(0)
        assert (found - mean).abs().max() <= allowed * mean.abs().max()


def test_only_what_is_asked_for_draws_and_only_in_training():
    """Forward passes differ with stochastic alone, backward passes with both, neither in evaluation mode."""
    inputs = torch.randn(3, 16)
    for rounding, forward, backward in (
        ("nearest", False, False),
        ("stochastic", True, True),
        ("stochastic_gradients", False, True),
    ):
        model = network()
        quantize_layers(model, to="int4", rounding=rounding)
        for mode in (True, False):
            model.train(mode)
            outs = [model(inputs) for _ in range(2)]
            grads = [torch.autograd.grad(out.square().sum(), list(model.parameters()))[-2] for out in outs]
            assert torch.equal(*outs) == (not (forward and mode))
            if not forward:
                assert torch.equal(*grads) == (not (backward and mode))


def test_names_and_values_of_parameters_stay():
    """A checkpoint of the plain model fits, and layers that are named stay as they are."""
    model, plain = network(), network()
    quantize_layers(model, to="fp8", unquantized="6")
    assert list(quantized_layers(model)) == ["1", "4"]
    model.load_state_dict(plain.state_dict())
    assert type(model[6]) is nn.Linear
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


@pytest.mark.parametrize(
    ("model", "unquantized", "says"),
    [
        (nn.Sequential(nn.MultiheadAttention(8, 2), nn.Linear(8, 2)), None, r"unquantized=0\.out_proj"),
        (nn.Sequential(nn.ConvTranspose1d(2, 3, 3)), None, "ConvTranspose1d"),
        (nn.Sequential(nn.Embedding(3, 3)), None, "the model has none"),
        (nn.Sequential(nn.Linear(2, 2)), "0", "the model has none left"),
        (nn.Sequential(nn.Linear(2, 2)), "head", "no layer is named 'head'; they are 0"),
        (nn.Sequential(nn.Linear(2, 2)).to(torch.bfloat16), None, "build the model in float32"),
    ],
)
def test_what_cannot_be_emulated_is_refused_with_what_to_write(model, unquantized, says):
    """Layers that are used otherwise, have another type, or are none; in one sentence."""
    with pytest.raises(ConfigError, match=says):
        quantize_layers(model, to="fp8", unquantized=unquantized)
