"""Which part of a model's FLOPs is left where its sparse weights are not multiplied; dense kernels save none of it."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping

import torch
from torch.utils.data import default_collate
from torch.utils.flop_counter import FlopCounterMode

from dptrain.cost.flops import FORMULAS, uncompiled
from dptrain.data.source import random_state_kept
from dptrain.tasks.base import LossFunction, Task, split_loss


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
    # A teacher may have modules of the same names, whose products are dense: they count in the whole alone.
    whole, _ = _counted(task, task.loss)
    _, by_module = _counted(task, inspect.unwrap(task.loss))
    root = type(task.model).__name__
    saved = 0.0
    for name, density in owners.items():
        saved += (1 - density) * by_module.get(f"{root}.{name}" if name else root, 0)
    return 1 - saved / whole


def _counted(task: Task, function: LossFunction) -> tuple[int, dict[str, int]]:
    """Return the FLOPs of a forward and a backward pass, and those of each module by name, the root's class first."""
    with random_state_kept(), torch.enable_grad(), uncompiled():
        batch = (task.collate or default_collate)([task.train_data[index] for index in range(2)])
        model = copy.deepcopy(task.model).cpu().train()
        with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
            loss, _ = split_loss(function(model, batch))
            loss.backward()  # type: ignore[no-untyped-call]
    by_module = {name: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}
    return int(counter.get_total_flops()), by_module
