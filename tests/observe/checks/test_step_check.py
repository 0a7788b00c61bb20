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
