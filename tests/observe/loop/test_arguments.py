"""What `attach` may be given: each wrong kind of value is refused with its name and a remedy, before any hook."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import dptrain
from dptrain.errors import ObservationError


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"loss": None}, "loss must be 'mean' or 'sum'"),
        ({"micro_batch_size": 0}, "micro_batch_size must be a whole number"),
        ({"micro_batch_size": 4.0}, "micro_batch_size must be a whole number"),
        ({"micro_batch_size": True}, "micro_batch_size must be a whole number"),
        ({"micro_batch_size": "4"}, "function of the model's arguments"),
        ({"loss_scale": 1024.0}, "loss_scale=lambda: factor"),
        ({"smoothing": 0.9}, r"Smoothing\(memory=0.2\)"),
        ({"level": 95}, "such as 0.95"),
        ({"level": 1.0}, "level must be"),
        ({"level": "0.95"}, "level must be"),
        ({"level": True}, "level must be"),
        ({"population": 0}, "population must be"),
        ({"population": 1e5}, "population must be"),
        ({"budget": "1%"}, "budget must be a positive share"),
        ({"every": 1.5}, "every must be a whole number"),
        ({"every": "2"}, "every must be a whole number"),
        ({"every": True}, "every must be a whole number"),
        ({"comm_hook": len, "method": "hook"}, r"the pair \(hook, state\)"),
        ({"optimizer": torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)}, "has no parameter of the model"),
    ],
)
def test_a_wrong_argument_is_refused_at_attach(settings, text):
    """The error names the argument and what to give instead, and no hook is left on the model."""
    model = nn.Linear(3, 1)
    with pytest.raises(ObservationError, match=text):
        dptrain.attach(model, **settings)
    assert not any(p._backward_hooks for p in model.parameters())
    assert not model._forward_pre_hooks


@pytest.mark.parametrize("model", [None, [nn.Linear(2, 2)], torch.ones(3), nn.Linear])
def test_what_is_no_module_is_refused(model):
    """A list of modules, a tensor and a class are no model."""
    with pytest.raises(ObservationError, match=r"must be the nn\.Module"):
        dptrain.attach(model)


def test_a_scripted_module_is_refused():
    """TorchScript takes no hooks on its forward pass; the remedy is the module before scripting."""
    with pytest.raises(ObservationError, match=r"before torch\.jit\.script"):
        dptrain.attach(torch.jit.script(nn.Linear(2, 1)))


@pytest.mark.parametrize("factor", [None, 0.0, float("nan"), -1.0, "2"])
def test_a_loss_scale_that_is_none_is_refused(factor):
    """What the function returns must be the factor on the loss."""
    model = nn.Linear(3, 1)
    with dptrain.attach(model, every=1, loss_scale=lambda: factor) as meter:
        for _ in range(2):
            model(torch.randn(4, 3)).mean().backward()
        with pytest.raises(ObservationError, match="loss_scale returned"):
            meter.step()


@pytest.mark.parametrize("size", [0, -3, None, float("nan"), "4", True, torch.ones(2)])
def test_a_size_that_is_none_is_refused(size):
    """Whether the function `micro_batch_size` returns it or the loop announces it."""
    model = nn.Linear(3, 1)
    with (
        dptrain.attach(model, every=1, micro_batch_size=lambda _: size),
        pytest.raises(ObservationError, match="the function micro_batch_size gave"),
    ):
        model(torch.randn(4, 3))
    with dptrain.attach(model) as meter, pytest.raises(ObservationError, match=r"meter\.begin gave"):
        meter.begin(num_samples=size)


def test_a_weight_that_is_negative_is_refused():
    """A micro-batch's loss is multiplied by it, so it is a number of at least 0."""
    with dptrain.attach(nn.Linear(3, 1)) as meter, pytest.raises(ObservationError, match="not negative"):
        meter.begin(num_samples=4, weight=-1)


def test_a_function_of_other_arguments_is_named():
    """The error says with what the function is called."""
    model = nn.Linear(3, 1)
    with (
        dptrain.attach(model, every=1, micro_batch_size=lambda x, y: len(x) + y),
        pytest.raises(ObservationError, match=r"raised TypeError.*called with the model's arguments"),
    ):
        model(torch.randn(4, 3))
