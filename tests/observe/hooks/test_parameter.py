"""The hook on the parameters sees what is trained in a step, whatever was frozen between the steps."""

from __future__ import annotations

import warnings

import torch
from torch import nn

import dptrain


def sums(*, toggled, every):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))
    generator = torch.Generator().manual_seed(2)
    with warnings.catch_warnings(), dptrain.attach(model, every=every) as meter:
        warnings.simplefilter("error")
        for _ in range(8):
            model.zero_grad()
            model.requires_grad_(True)
            for _ in range(2):
                (model(torch.randn(6, 4, generator=generator)).square().mean() / 2).backward()
            model.requires_grad_(not toggled)
            meter.step()
        return meter.state().sums


def test_parameters_may_be_frozen_between_the_steps():
    """As in a GAN that takes turns: the sums are those of a loop that freezes nothing."""
    for every in (1, 2):
        assert sums(toggled=True, every=every) == sums(toggled=False, every=every)
