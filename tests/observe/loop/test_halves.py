"""One process without accumulation: the halves of its micro-batch are two small batches, beside the training."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import dptrain
from dptrain.errors import ObservationError
from dptrain.noise import SquaredNorms, unbiased_moments
from tests.observe.plain import gradient, make_model, mean_loss, micro_batch, pair, sq_norm, trained


def test_the_halves_are_two_small_batches():
    """An odd batch of nine is four and five samples, and the pair is that of formula F3."""
    model, (x, y) = make_model(), micro_batch(0, 0, 0, size=9)
    with dptrain.attach(model, every=1) as meter:
        mean_loss(model, x, y).backward()
        meter.split(lambda x, y: mean_loss(model, x, y), x, y)
        meter.step()
    parts = [gradient(model, (x[:4], y[:4])), gradient(model, (x[4:], y[4:]))]
    whole = gradient(model, (x, y))
    norms = SquaredNorms.of([sq_norm(g) for g in parts], sizes=[4, 5], large_sq_norm=sq_norm(whole))
    moments = unbiased_moments(norms)
    assert pair(meter.read()) == pytest.approx((moments.noise_trace, moments.grad_sq_norm), rel=1e-4)
    assert meter.read().num_samples == 9


def test_a_loss_scale_is_none_of_the_halves():
    """The loss given to split has no scale, whatever factor the loop's own backward pass has."""
    pairs = []
    for scale in (1.0, 512.0):
        model, (x, y) = make_model(), micro_batch(0, 0, 0, size=8)
        with dptrain.attach(model, every=1, loss_scale=lambda scale=scale: scale) as meter:
            (scale * mean_loss(model, x, y)).backward()
            meter.split(lambda x, y, model=model: mean_loss(model, x, y), x, y)
            meter.step()
        pairs.append(pair(meter.read()))
    assert pairs[1] == pytest.approx(pairs[0], rel=1e-6)


class Restless(nn.Module):
    """Has dropout and running statistics."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2))

    def forward(self, x):
        return self.net(x)


def run(*, split):
    torch.manual_seed(7)
    model = Restless()
    optimizer = torch.optim.SGD(trained(model), lr=0.1)
    meter = dptrain.attach(model, optimizer=optimizer, every=2)
    for step in range(6):
        x, y = micro_batch(step, 0, 0, size=8)
        optimizer.zero_grad()
        mean_loss(model, x, y).backward()
        if split:
            meter.split(lambda batch: mean_loss(model, *batch.values()), {"x": x, "y": y})
        optimizer.step()
    meter.remove()
    return [*model.state_dict().values(), torch.rand(1)], meter


def test_training_is_untouched():
    """Parameters, running statistics and the random state are the same bit for bit, and three steps are measured."""
    bare, without = run(split=False)
    parameters, meter = run(split=True)
    assert all(map(torch.equal, bare, parameters))
    assert (meter.read().num_steps, without.read().num_steps) == (3, 0)
    assert "meter.split" in without.reason


def test_a_batch_of_one_is_refused():
    """There is no half of one sample."""
    model = make_model()
    with dptrain.attach(model) as meter, pytest.raises(ObservationError, match="two samples"):
        meter.split(lambda x, y: mean_loss(model, x, y), *micro_batch(0, 0, 0, size=1))
