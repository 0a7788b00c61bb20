"""A model with a tied weight, a frozen bias and an unused parameter, its micro-batches and its loss."""

from __future__ import annotations

import torch
from torch import nn

STEPS, ACCUMULATION, MICRO = 6, 3, 5


class TiedModel(nn.Module):
    """Has a tied weight, a frozen bias and a parameter that no forward pass uses."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.first.bias.requires_grad_(False)
        self.unused = nn.Parameter(torch.ones(3))
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


def make_model():
    torch.manual_seed(1)
    return TiedModel()


def micro_batch(step, micro_step, rank, size=MICRO):
    generator = torch.Generator().manual_seed(1000 * step + 100 * micro_step + rank)
    return torch.randn(size, 6, generator=generator), torch.randn(size, 2, generator=generator)


def mean_loss(model, x, y):
    return ((model(x) - y) ** 2).sum(1).mean()
