"""The held-out loss: exact for any number of samples, batch size and replicas, and without a trace."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from dptrain.train.evaluation import evaluate
from tests.replicas import run_replicas

CASES = [(num_samples, micro) for num_samples in (1, 2, 7, 37, 53) for micro in (1, 3, 5)]


def make_model():
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.Linear(5, 1))


def make_data(num_samples):
    generator = torch.Generator().manual_seed(3)
    return TensorDataset(torch.randn(num_samples, 4, generator=generator))


def mean_square(model, batch):
    return (model(batch[0]) ** 2).mean()


def evaluate_on(model, num_samples, micro, *, rank=0, world_size=1):
    return evaluate(
        model,
        make_data(num_samples),
        mean_square,
        micro_batch_size=micro,
        collate=None,
        rank=rank,
        world_size=world_size,
        device=torch.device("cpu"),
    )


def evaluate_all(rank, world_size):
    model = make_model()
    return [evaluate_on(model, *case, rank=rank, world_size=world_size) for case in CASES]


def truth(num_samples):
    model = make_model().eval()
    with torch.no_grad():
        return float(mean_square(model, make_data(num_samples)[:]).double())


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_it_is_the_mean_over_all_samples(world_size):
    """On any number of replicas, also where some of them have a short batch or none, and the same on each."""
    results = run_replicas(evaluate_all, world_size=world_size)
    assert all(found == results[0] for found in results)
    assert results[0] == pytest.approx([truth(num_samples) for num_samples, _ in CASES], rel=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_it_leaves_no_trace(training):
    """Mode, gradients, and the numbers that are drawn next are as they were."""
    model = make_model().train(training)
    state = torch.get_rng_state()
    evaluate_on(model, 7, 2)
    assert model.training == model[1].training == training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_loss_that_raises_leaves_the_mode():
    """Whoever catches the error goes on in the mode he had."""
    model = make_model().train()

    def broken(_model, _batch):
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        evaluate(
            model,
            make_data(3),
            broken,
            micro_batch_size=1,
            collate=None,
            rank=0,
            world_size=1,
            device=torch.device("cpu"),
        )
    assert model.training
