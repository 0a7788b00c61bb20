"""From gradients to parameters: the norm, clipping, a step that is skipped, and float32 copies of short parameters."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from dptrain.exchange.base import total_norm
from dptrain.runtime.step_reduction import StepRecord
from dptrain.train.execution.loss_scale import LossScale
from dptrain.train.execution.master_weights import MasterWeights
from dptrain.train.execution.update import Update, clip


def record_of(learning_rate):
    return StepRecord(
        step=1, position=0, global_batch_size=8, micro_batch_size=4, learning_rate=learning_rate, wall_s=0.0
    )


def parameters_with_gradients(scale=1.0):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    for parameter in model.parameters():
        parameter.grad = scale * torch.randn_like(parameter)
    return list(model.parameters())


def test_norm_and_clipping_are_those_of_torch():
    """The same bits as get_total_norm and clip_grads_with_norm_, for a norm above the limit and one below it."""
    for largest in (0.1, 1e3):
        ours, torchs = parameters_with_gradients(), parameters_with_gradients()
        norm = total_norm([p.grad for p in ours])
        expected = torch.nn.utils.get_total_norm([p.grad for p in torchs])
        assert torch.equal(norm, expected)
        clip([p.grad for p in ours], norm=norm, largest=largest)
        torch.nn.utils.clip_grads_with_norm_(torchs, largest, expected)
        assert all(torch.equal(a.grad, b.grad) for a, b in zip(ours, torchs, strict=True))


@pytest.mark.parametrize("fused", [True, False])
def test_a_scaled_gradient_gives_the_step_of_the_plain_one(fused):
    """The factor is taken out on the way, by the fused kernel or before it, and the norm is that of the gradient."""
    plain, scaled = parameters_with_gradients(), parameters_with_gradients(2.0**16)
    for trained, loss_scale in ((plain, None), (scaled, LossScale(torch.device("cpu")))):
        optimizer = torch.optim.AdamW(trained, lr=0.1, fused=fused)
        update = Update(trained, optimizer=optimizer, max_grad_norm=0.5, loss_scale=loss_scale)
        norm, with_factor = update.grad_norms()
        assert with_factor == norm * (1 if loss_scale is None else 2.0**16)
        update.step(norm, record_of(0.1))
    for a, b in zip(plain, scaled, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)


def test_an_overflow_halves_the_scale_and_changes_nothing_else():
    """A gradient that is not finite leaves the parameters; the scale is halved, and doubled after 2,000 good steps."""
    trained = parameters_with_gradients()
    before = [p.detach().clone() for p in trained]
    trained[0].grad[0, 0] = math.inf
    loss_scale = LossScale(torch.device("cpu"))
    update = Update(
        trained, optimizer=torch.optim.AdamW(trained, lr=0.1, fused=True), max_grad_norm=None, loss_scale=loss_scale
    )
    norm, _ = update.grad_norms()
    update.step(norm, record_of(0.1))
    assert all(torch.equal(a, b) for a, b in zip(before, trained, strict=True))
    assert loss_scale.state() == {"value": 2.0**15, "steps_since_change": 0}
    for _ in range(2000):
        loss_scale.update(not_finite=torch.zeros(()))
    assert loss_scale.state()["value"] == 2.0**16
    restored = LossScale(torch.device("cpu"))
    restored.restore(loss_scale.state())
    assert restored.state() == loss_scale.state()


def test_small_steps_are_not_lost_in_short_parameters():
    """A hundred steps of a hundredth of the spacing of bfloat16 move the copies, and the parameters after them."""
    torch.manual_seed(0)
    model = nn.Linear(4, 4, bias=False)
    nn.init.ones_(model.weight)
    masters = MasterWeights(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    masters.take_over(optimizer, device=torch.device("cpu"))
    update = Update([model.weight], optimizer=optimizer, max_grad_norm=None, masters=masters)
    for _ in range(100):
        model.weight.grad = torch.full_like(model.weight, 1e-4)
        norm, _ = update.grad_norms()
        update.step(norm, record_of(1.0))
    assert model.weight.dtype == torch.bfloat16
    assert torch.allclose(masters.parameters[0], torch.full((4, 4), 0.99), atol=1e-4)
    assert torch.equal(model.weight, masters.parameters[0].bfloat16())
    alone = torch.ones(4, 4, dtype=torch.bfloat16)
    for _ in range(100):
        alone -= torch.full_like(alone, 1e-4)
    assert (alone == 1).all()  # what the copies are for
