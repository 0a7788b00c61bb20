"""FLOPs by density: each layer counts by its own, and what is dense beside them counts in full."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from dptrain.cost.flop_density import flop_density
from dptrain.tasks import resolve_task
from dptrain.train.preparation.distillation import DistilledLoss

FIRST, SECOND = 2 * 64 * 32, 2 * 32 * 10
"""FLOPs of a sample's product with each matrix of the digits' MLP."""


def test_each_layer_counts_by_its_own_density():
    """The first layer has two products, for its inputs need no gradient, and the second three."""
    task = resolve_task("digits")
    total = 2 * FIRST + 3 * SECOND
    expected = (0.1 * 2 * FIRST + 0.5 * 3 * SECOND) / total
    assert flop_density(task, {"0.weight": 0.1, "2.weight": 0.5}) == pytest.approx(expected)
    assert flop_density(task, {"2.weight": 0.5}) == pytest.approx((2 * FIRST + 1.5 * SECOND) / total)
    assert all(p.grad is None for p in task.model.parameters())


def test_a_teacher_of_the_same_class_is_dense():
    """Its modules have the names of the model's, and its FLOPs count in full."""
    task = resolve_task("digits")
    teacher = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)).eval()
    taught = replace(task, loss=DistilledLoss(task.loss, teacher, temperature=1.0, weight=0.5))
    plain, forward = 2 * FIRST + 3 * SECOND, FIRST + SECOND
    expected = (0.1 * plain + forward) / (plain + forward)
    assert flop_density(taught, {"0.weight": 0.1, "2.weight": 0.1}) == pytest.approx(expected)
    assert torch.is_grad_enabled()
