"""Ensemble and codistillation: their limits, what is averaged, and what travels."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from dptrain.errors import ConfigError, TaskError
from dptrain.exchange import Codistillation, Ensemble
from dptrain.exchange.predictions import AveragedPredictions, Recorder, distance
from tests.replicas import run_replicas

NUM_CLASSES = 3


def predict(rank, world_size):
    """What members of an ensemble say together of the same inputs, and each by itself."""
    torch.manual_seed(rank)
    model = nn.Linear(4, NUM_CLASSES)
    inputs = torch.randn(5, 4, generator=torch.Generator().manual_seed(7))
    found = {"own": model(inputs).tolist()}
    for predictions in ("outputs", "probabilities"):
        exchange = Ensemble(predictions)
        exchange.wrap(model)
        with exchange.evaluating(model) as (averaged, sees_all):
            assert sees_all
            found[predictions] = averaged(inputs).tolist()
    with Codistillation().evaluating(model) as (own, sees_all):
        found["codistillation"] = (own is model, sees_all)
    return found


def codistil(rank, world_size, staleness):
    """A dozen steps on a model without a loss of its own: replicas can only come nearer to one another."""
    torch.manual_seed(rank)
    model = nn.Linear(4, NUM_CLASSES)
    exchange = Codistillation(1.0, staleness=staleness, predictions="probabilities")
    exchange.wrap(model)
    seen = []

    def shared(called, step):
        seen.append(step)
        return called(torch.randn(16, 4, generator=torch.Generator().manual_seed(step))).sum()

    exchange.share(shared)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    norms = []
    for _ in range(12):
        exchange.combine()
        norms.append(0.0 if model.weight.grad is None else model.weight.grad.norm().item())
        optimizer.step()
        exchange.updated()
        optimizer.zero_grad()
    return {
        "seen": seen,
        "norms": norms,
        "weights": model.weight.flatten().tolist(),
        "bytes": exchange.bytes_per_step(),
    }


def test_an_ensemble_says_the_mean_of_its_members():
    """Of outputs, or of probabilities as their logarithm, whose softmax is the mean; equal on all replicas."""
    one, two = run_replicas(predict, world_size=2)
    own = torch.tensor([one["own"], two["own"]])
    assert torch.allclose(torch.tensor(one["outputs"]), own.mean(0))
    mean = functional.softmax(own, -1).mean(0)
    assert torch.allclose(functional.softmax(torch.tensor(one["probabilities"]), -1), mean, atol=1e-6)
    assert one["outputs"] == two["outputs"]
    assert one["codistillation"] == [True, True] or one["codistillation"] == (True, True)


@pytest.mark.parametrize("staleness", [0, 3])
def test_codistilled_replicas_come_nearer(staleness):
    """Each follows the other's predictions, from the first ones that have arrived on."""
    one, two = run_replicas(codistil, world_size=2, args=(staleness,))
    begin = [torch.manual_seed(rank) and nn.Linear(4, NUM_CLASSES).weight.detach().flatten() for rank in (0, 1)]
    apart = (torch.tensor(one["weights"]) - torch.tensor(two["weights"])).norm()
    assert apart < (begin[0] - begin[1]).norm()
    assert [norm > 0 for norm in one["norms"]] == [step > staleness for step in range(1, 13)]
    assert one["bytes"] == 16 * NUM_CLASSES * 4
    if staleness:  # what is sent in step t is of the samples of step t + 3, and used there
        assert one["seen"][:8] == [4, 5, 6, 7, 4, 8, 5, 9]


def test_the_distance_is_none_from_oneself_and_has_a_gradient():
    """Divergence and squared difference are 0 at equal predictions, above 0 elsewhere."""
    output = torch.randn(6, NUM_CLASSES, requires_grad=True)
    for predictions in ("outputs", "probabilities"):
        same = distance(output, output.detach()[None], predictions=predictions)
        other = distance(output, torch.randn(2, 6, NUM_CLASSES), predictions=predictions)
        assert same.item() == pytest.approx(0, abs=1e-6)
        assert other.item() > 0
        assert torch.autograd.grad(other, output)[0].norm() > 0


def test_what_is_no_prediction_is_refused():
    """A model that returns several things, a loop that shares nothing, a weight below 0."""
    pair = nn.LSTM(2, 2)
    with pytest.raises(TaskError, match="returns tuple"):
        Recorder(pair)(torch.zeros(1, 1, 2))
    with pytest.raises(TaskError, match="returns tuple"):
        AveragedPredictions(pair, predictions="outputs", group=None, num_replicas=2)(torch.zeros(1, 1, 2))
    with pytest.raises(ConfigError, match="at least 0"):
        Codistillation(-1.0)


def test_one_member_is_the_model_itself():
    """In one process nothing is averaged, added or sent."""
    model = nn.Linear(2, 2)
    for exchange in (Ensemble(), Codistillation()):
        assert exchange.wrap(model) is model
        exchange.combine()
        assert model.weight.grad is None
        with exchange.evaluating(model) as found:
            assert found == (model, False)
        assert exchange.bytes_per_step() == 0
