"""Random bases, in one process."""

import pytest
import torch
from torch import nn

from dptrain.exchange import RandomBases


def projected(exchange, gradient):
    model = nn.Linear(gradient.numel(), 1, bias=False)
    exchange.wrap(model)
    model.weight.grad = gradient.clone().view_as(model.weight)
    exchange.combine()
    return model.weight.grad.flatten()


def test_the_mean_projection_is_the_gradient_times_the_share_of_directions():
    """Directions are uniform on the sphere: E Σ (g·v)v = g·d/D, over 4,000 draws within 3 %."""
    gradient = torch.randn(40, generator=torch.Generator().manual_seed(0))
    exchange = RandomBases(4)
    mean = torch.stack([projected(exchange, gradient) for _ in range(4000)]).mean(0)
    assert (mean - gradient * 4 / 40).norm() < 0.03 * (gradient * 4 / 40).norm() * 3


@pytest.mark.parametrize("redraw", [True, False])
def test_directions_are_redrawn_or_fixed(redraw):
    """Two steps with the same gradient differ only where directions are redrawn."""
    gradient = torch.randn(40, generator=torch.Generator().manual_seed(0))
    exchange = RandomBases(4, redraw=redraw)
    assert torch.equal(projected(exchange, gradient), projected(exchange, gradient)) != redraw


def test_blocks_change_nothing(monkeypatch):
    """Generated in blocks of few directions, the projection is that of one block."""
    gradient = torch.randn(40, generator=torch.Generator().manual_seed(0))
    whole = projected(RandomBases(12), gradient)
    monkeypatch.setattr("dptrain.exchange.random_bases._BLOCK_ELEMENTS", 100)
    assert torch.allclose(projected(RandomBases(12), gradient), whole, rtol=1e-5, atol=1e-7)
