"""What a step is dropped for: parameters that are not measured any more, and micro-batches of the same samples."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import dptrain

STEPS = 9


def make_model():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))


def trained(change=None, *, draw=None):
    """Return (steps measured, warnings, reason) of a loop in which `change` comes after attach."""
    model = make_model()
    generator = torch.Generator().manual_seed(2)
    draw = draw or (lambda *_: torch.randn(6, 4, generator=generator))
    with warnings.catch_warnings(record=True) as seen, dptrain.attach(model, every=1) as meter:
        warnings.simplefilter("always")
        if change is not None:
            change(model)
        for step in range(STEPS):
            model.zero_grad()
            for micro_step in range(2):
                (model(draw(step, micro_step)).square().mean() / 2).backward()
            meter.step()
        scale = meter.read()
        return scale.num_steps, [str(w.message) for w in seen if "noise scale" in str(w.message)], meter.reading.reason


def add(model):
    model.append(nn.Linear(1, 1))


def assign(model):
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)


def reparametrize(model):
    parametrizations.weight_norm(model[0])


@pytest.mark.parametrize("change", [add, assign, reparametrize])
def test_parameters_that_are_not_measured_are_told(change):
    """A layer added, loaded with assign=True or put under weight norm after attach: no reading, and the remedy."""
    num_steps, seen, reason = trained(change)
    assert num_steps == 0
    assert len(seen) == 1
    assert "added or replaced after attach" in seen[0]
    assert "attach again" in reason


def test_what_is_added_and_not_trained_is_no_misuse():
    """A copy that is kept as an attribute of the model, as for an average of the weights, changes nothing."""
    plain = trained()
    assert plain == trained(lambda model: model.add_module("average", copy.deepcopy(nn.Identity())))

    def keep_a_copy(model):
        model[0].average = nn.Linear(4, 3)

    assert plain[:2] == trained(keep_a_copy)[:2] == (STEPS, [])


def test_micro_batches_of_the_same_samples_are_told():
    """Accumulating one batch twice has no noise to see: after four steps it is no chance any more."""

    def same(step, _):
        return torch.randn(6, 4, generator=torch.Generator().manual_seed(step))

    num_steps, seen, reason = trained(draw=same)
    assert num_steps == 4
    assert len(seen) == 1
    assert "the same samples" in seen[0]
    assert reason is None or "the same samples" in reason


def test_equal_samples_now_and_then_are_chance():
    """Of a tiny data set two equal micro-batches come up: no warning, all steps count."""

    def sometimes(step, micro_step):
        return torch.randn(1, 4, generator=torch.Generator().manual_seed(step if step % 3 else 10 * step + micro_step))

    assert trained(draw=sometimes)[:2] == (STEPS, [])


def clipped(dtype, *, factor, num_micro_batches, closed_before, steps=8):
    """Return (tr(Σ), |G|²) and steps of a loop whose gradients are multiplied by `factor`, closed before or after."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2)).to(dtype)
    with torch.no_grad():
        model[2].weight.mul_(0.1)
    generator = torch.Generator().manual_seed(2)
    with warnings.catch_warnings(), dptrain.attach(model, every=1) as meter:
        warnings.simplefilter("error")
        for _ in range(steps):
            model.zero_grad()
            for _ in range(num_micro_batches):
                x = torch.randn(4, 8, generator=generator)
                target = 0.1 * x[:, :2] + torch.randn(4, 2, generator=generator)
                loss = (model(x.to(dtype)).float() - target).square().mean()
                (loss / num_micro_batches).backward()
            if closed_before:
                meter.step()
            for p in model.parameters():
                p.grad *= factor
            if not closed_before:
                meter.step()
        scale = meter.read()
    return [scale.noise_trace, scale.grad_sq_norm], scale.num_steps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_clipping_shows_through_the_rounding_of_many_micro_batches(dtype):
    """64 micro-batches, clipped by 4 % and by half: closed after it a step reads as closed before it."""
    expected, num_steps = clipped(dtype, factor=1.0, num_micro_batches=64, closed_before=True)
    assert num_steps == 8
    for factor in (0.96, 0.5):
        found, num_steps = clipped(dtype, factor=factor, num_micro_batches=64, closed_before=False)
        assert found == pytest.approx(expected, rel=0.02 if dtype == torch.bfloat16 else 1e-4)
        assert num_steps == 8


class Branches(nn.Module):
    """Of twelve layers each third one is used; the others' gradients are zero."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4, bias=False) for _ in range(12)])

    def forward(self, x):
        return sum(layer(x) * (number % 3 == 0) for number, layer in enumerate(self.layers))


def test_a_factor_that_no_check_of_a_step_can_tell_is_not_taken_for_one():
    """In two steps of three the parameters looked at have no gradient: they are dropped where others were clipped."""
    found = {}
    for factor in (1.0, 0.5):
        torch.manual_seed(1)
        model = Branches()
        with warnings.catch_warnings(record=True) as seen, dptrain.attach(model, every=1) as meter:
            warnings.simplefilter("always")
            for _ in range(STEPS):
                model.zero_grad()
                for _ in range(2):
                    (model(torch.randn(6, 4)).square().mean() / 2).backward()
                for p in model.parameters():
                    p.grad *= factor
                meter.step()
            found[factor] = meter.read().num_steps, [str(w.message) for w in seen if "noise scale" in str(w.message)]
    assert found[1.0] == (STEPS, [])
    assert found[0.5][0] == STEPS // 3
    assert len(found[0.5][1]) == 1
    assert "right after the last backward" in found[0.5][1][0]
