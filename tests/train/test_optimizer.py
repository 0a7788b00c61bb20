"""The optimizer: what decays, and that a step which is not finite leaves it as it was."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from dptrain.train import OptimizerConfig
from dptrain.train.optimizer import build_optimizer, set_rate, skips_on_device, step_if_finite

CONFIGS = [
    OptimizerConfig(name="adamw", learning_rate=0.1),
    OptimizerConfig(name="sgd", learning_rate=0.1),
    OptimizerConfig(name="sgd", learning_rate=0.1, beta1=0.0),
]


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2, bias=False))


def give_gradients(model, *, seed, value=None):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    if value is not None:
        parameter.grad.view(-1)[0] = value


def take_step(optimizer, model, *, seed, value=None):
    give_gradients(model, seed=seed, value=value)
    step_if_finite(optimizer, nn.utils.get_total_norm([p.grad for p in model.parameters()]))


def everything(optimizer, model):
    return copy.deepcopy(([p.detach() for p in model.parameters()], optimizer.state_dict()["state"]))


def assert_equal(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_matrices_decay_and_vectors_do_not():
    """Every trainable parameter is in exactly one group; biases and norms are in the one without decay."""
    model = make_model()
    model[0].weight.requires_grad_(False)
    optimizer = build_optimizer(OptimizerConfig(learning_rate=0.1, weight_decay=0.3), model)
    decayed, plain = optimizer.param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    assert [p.shape for p in decayed["params"]] == [(2, 4)]
    assert {id(p) for p in plain["params"]} == {id(model[0].bias), id(model[1].weight), id(model[1].bias)}


def test_a_model_without_vectors_has_one_group():
    """An empty group would be an error of torch's at the first step."""
    assert len(build_optimizer(OptimizerConfig(learning_rate=0.1), nn.Linear(2, 2, bias=False)).param_groups) == 1


@pytest.mark.parametrize("config", CONFIGS)
def test_a_finite_step_is_that_of_torch(config):
    """Bit for bit the step of the same optimizer without anything that could skip."""
    models = [make_model(), make_model()]
    ours, plain = (build_optimizer(config, model) for model in models)
    for state in plain.state.values():
        state.clear()
    for seed in range(3):
        take_step(ours, models[0], seed=seed)
        give_gradients(models[1], seed=seed)
        plain.step()
    assert_equal(list(models[0].parameters()), list(models[1].parameters()))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("broken", [0, 2])
@pytest.mark.parametrize("config", CONFIGS)
def test_a_step_that_is_not_finite_never_happened(config, broken, value):
    """Parameters, moments and step counters end as without it, also where it is the very first."""
    models = [make_model(), make_model()]
    optimizers = [build_optimizer(config, model) for model in models]
    assert all(map(skips_on_device, optimizers))
    for seed in range(4):
        take_step(optimizers[0], models[0], seed=seed, value=value if seed == broken else None)
        if seed != broken:
            take_step(optimizers[1], models[1], seed=seed)
    assert_equal(everything(optimizers[0], models[0]), everything(optimizers[1], models[1]))


def test_an_optimizer_that_cannot_skip_by_itself_is_not_stepped():
    """Without the fused kernels the host looks, and the result is the same."""
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert not skips_on_device(optimizer)
    take_step(optimizer, model, seed=0)
    before = everything(optimizer, model)
    take_step(optimizer, model, seed=1, value=math.nan)
    assert_equal(everything(optimizer, model), before)


def test_the_rate_is_set_for_all_groups():
    """A rate of 0 changes nothing, so it has reached every group."""
    model = make_model()
    optimizer = build_optimizer(CONFIGS[0], model)
    before = [p.detach().clone() for p in model.parameters()]
    set_rate(optimizer, 0.0)
    take_step(optimizer, model, seed=0)
    assert_equal([p.detach() for p in model.parameters()], before)
