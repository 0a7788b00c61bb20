"""Which part of a model's FLOPs is left where its sparse weights are not multiplied; dense kernels save none of it."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch.utils.data import default_collate
from torch.utils.flop_counter import FlopCounterMode

from dptrain.cost.flops import FORMULAS, uncompiled
from dptrain.tasks.base import Task, split_loss
from dptrain.tasks.check import random_state_kept


def flop_density(task: Task, densities: Mapping[str, float]) -> float:
    """Return FLOPs by density over FLOPs of forward and backward passes, counted on two samples by a copy of a model.

    A layer's three products, with its inputs, with the gradient of its outputs for that of its inputs, and of both for
    that of its weights, each count by the layer's density. The last one is dense in the few steps in which masks move,
    which is not counted.

    Args:
        task: its model on any device.
        densities: name of a sparse weight → part of it that is not zero.
    """
    owners = {name.rpartition(".")[0]: density for name, density in densities.items()}
    with random_state_kept(), torch.enable_grad(), uncompiled():
        batch = (task.collate or default_collate)([task.train_data[index] for index in range(2)])
        model = copy.deepcopy(task.model).cpu().train()
        with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
            loss, _ = split_loss(task.loss(model, batch))
            loss.backward()  # type: ignore[no-untyped-call]
    total: int = counter.get_total_flops()
    root = type(model).__name__
    saved = 0.0
    for name, density in owners.items():
        counts = counter.get_flop_counts().get(f"{root}.{name}" if name else root, {})
        saved += (1 - density) * sum(counts.values())
    return 1 - saved / total
