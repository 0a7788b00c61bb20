"""A learning rate for each layer: full at the head, and a constant factor less with each block below it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from dptrain.errors import ConfigError
from dptrain.tasks.base import Task
from dptrain.train.execution.wrapping import find_blocks


def with_layer_rates(task: Task, *, decay: float) -> Task:
    """Return the task with parameter groups by layer; vectors (biases, norms) are not decayed in weight.

    Args:
        task: without groups of its own.
        decay: rate of a block over that of the block after it.

    Raises:
        ConfigError: where the task has its own groups.
    """
    if task.parameter_groups is not None:
        raise ConfigError(f"task {task.name!r} has parameter groups of its own: leave model.layer_decay out")

    def groups(model: nn.Module) -> list[dict[str, Any]]:
        """Return a group for each ratio of the rate, matrices apart from vectors."""
        ratios = layer_ratios(model, decay=decay)
        found: dict[tuple[float, bool], list[nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                found.setdefault((ratios[name], parameter.dim() > 1), []).append(parameter)
        return [
            {"params": members, "lr_ratio": ratio, **({} if is_matrix else {"weight_decay": 0.0})}
            for (ratio, is_matrix), members in found.items()
        ]

    return replace(task, parameter_groups=groups)


def layer_ratios(model: nn.Module, *, decay: float) -> dict[str, float]:
    """Return the rate of each parameter over the run's: 1 after the last block, decay^k in the k-th block from the end.

    What comes before the first block, such as an embedding, is one layer further down. Where a model has no list of
    equal blocks, its children are the layers, and the last of them is the head.
    """
    blocks = find_blocks(model)
    owner = {id(p): place for place, block in enumerate(blocks) for p in block.parameters()}
    children = [child for child in model.children() if next(child.parameters(), None) is not None]
    num_layers = len(blocks) - 1 if blocks == children else len(blocks)
    ratios: dict[str, float] = {}
    is_before = True
    for name, parameter in model.named_parameters():
        place = owner.get(id(parameter))
        is_before = is_before and place is None
        depth = num_layers - place if place is not None else (num_layers + 1 if is_before else 0)
        ratios[name] = decay**depth
    return ratios
