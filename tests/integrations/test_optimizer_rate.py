"""The factor on an optimizer's rate."""

import pytest
import torch

from dptrain.integrations.optimizer_rate import scale_learning_rate


@pytest.mark.parametrize("rewrites", [True, False])
def test_a_factor_on_the_rate_never_compounds(rewrites):
    """With a scheduler that rewrites the rates, and with one that multiplies them, each step has base × factor."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    scheduler = (
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
        if rewrites
        else torch.optim.lr_scheduler.MultiplicativeLR(optimizer, lambda _: 0.5)
    )
    factors = iter((1.0, 4.0, 2.0))
    stop = scale_learning_rate(optimizer, lambda: next(factors))
    rates = []
    for _ in range(3):
        before = parameter.item()
        parameter.grad = torch.ones(1)
        optimizer.step()
        rates.append(before - parameter.item())
        scheduler.step()
    assert rates == [1.0, 4 * 0.5, 2 * 0.25]
    assert optimizer.param_groups[0]["lr"] == 0.125
    stop()
    optimizer.step()
    assert parameter.item() == -(1.0 + 2.0 + 0.5 + 0.125)


def test_a_step_that_raised_leaves_no_scaled_rate_behind():
    """The next step starts from the base rate again."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    scale_learning_rate(optimizer, lambda: 3.0)
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: 1 / 0)
    parameter.grad = torch.ones(1)
    optimizer.step()
    assert parameter.item() == -3.0
    assert optimizer.param_groups[0]["lr"] == 1.0
