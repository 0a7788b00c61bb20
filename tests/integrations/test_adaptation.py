"""The windows that the integrations share, without any framework."""

from __future__ import annotations

import json

import pytest
import torch

from dptrain.control import Limits, Schedule
from dptrain.errors import CheckpointError, ConfigError
from dptrain.integrations.adaptation import Adaptation, scale_learning_rate
from dptrain.noise import noise_scale

UNKNOWN = noise_scale(None)


def adaptation(*, world_size=2, accumulation_steps=2, **settings):
    options = {"law": Schedule.parse("0:16 32:32 64:64"), "limits": Limits(largest=64), "rule": "linear", **settings}
    return Adaptation(micro_batch_size=4, world_size=world_size, accumulation_steps=accumulation_steps, **options)


def test_windows_follow_the_law_and_the_rate_follows_the_windows():
    """Positions are counted in samples of windows done, and each factor is that of its own window's batch."""
    adaptive = adaptation()
    windows = [adaptive.decide(UNKNOWN, micro_steps=adaptive.window.accumulation_steps) for _ in range(4)]
    assert [window.accumulation_steps for window in windows] == [2, 4, 8, 8]
    assert [window.learning_rate_factor for window in windows] == [1, 2, 4, 4]
    assert adaptive.as_metrics()["batch/num_changes"] == 2
    assert adaptive.as_metrics()["progress/samples"] == 8 * (2 + 2 + 4 + 8)


def test_a_window_that_cannot_be_stays_and_is_asked_for_again():
    """The loop's veto keeps batch and factor; the next decision brings the change."""
    adaptive = adaptation()
    for _ in range(2):
        window = adaptive.decide(UNKNOWN, micro_steps=2, may_be=lambda steps: steps == 2)
    assert (window.accumulation_steps, window.learning_rate_factor) == (2, 1)
    assert adaptive.decide(UNKNOWN, micro_steps=2).accumulation_steps == 4


def test_the_state_goes_through_json_and_on():
    """A restored one decides as the whole one does."""
    whole, first, second = adaptation(), adaptation(), adaptation()
    for _ in range(2):
        whole.decide(UNKNOWN, micro_steps=2)
        first.decide(UNKNOWN, micro_steps=2)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.window == first.window
    assert whole.decide(UNKNOWN, micro_steps=4) == second.decide(UNKNOWN, micro_steps=4)
    assert whole.state_dict() == second.state_dict()


def test_on_other_replicas_the_batch_is_kept():
    """A batch of 32 is four micro-batches of 4 on two replicas and two on four; on three it is refused."""
    adaptive = adaptation()
    for _ in range(2):
        adaptive.decide(UNKNOWN, micro_steps=2)
    wider = adaptation(world_size=4)
    wider.load_state_dict(adaptive.state_dict())
    assert (wider.global_batch_size, wider.window.accumulation_steps) == (32, 2)
    with pytest.raises(CheckpointError, match="multiple of micro-batch × world size = 12"):
        adaptation(world_size=3).load_state_dict(adaptive.state_dict())


def test_refuses_what_is_not_a_setting_or_a_state():
    """An unknown rule and a foreign record are named."""
    with pytest.raises(ConfigError, match="linear"):
        adaptation(rule="cubic")
    with pytest.raises(CheckpointError, match="window"):
        adaptation().load_state_dict({"meter": {}})


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
