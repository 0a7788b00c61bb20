"""Whether the layers that are to compute in few bits are called at all: a loss may go past them to their weights."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.data import default_collate

from dptrain.data.source import random_state_kept
from dptrain.errors import ConfigError
from dptrain.models.quantization import quantized_layers
from dptrain.tasks.base import Task

_MAX_NAMED = 5


def check_quantized_layers(task: Task) -> None:
    """Run two samples through a copy of the model, and refuse layers whose weights are used without calling them.

    Such a product would be computed in full precision, and nothing would show it.

    Raises:
        ConfigError: naming them, and what to write.
    """
    model = copy.deepcopy(task.model).train()
    waiting = quantized_layers(model)
    for name, layer in list(waiting.items()):
        layer.register_forward_hook(partial(_note, waiting, name))
    with random_state_kept(), torch.no_grad():
        task.loss(model, (task.collate or default_collate)([task.train_data[index] for index in range(2)]))
    if waiting:
        names = ",".join(list(waiting)[:_MAX_NAMED]) + (",…" if len(waiting) > _MAX_NAMED else "")
        raise ConfigError(
            f"model.quantize: the loss does not call the layers {names}, so they would compute in full precision: say "
            f"so with model.unquantized={names}"
        )


def _note(waiting: dict[str, nn.Module], name: str, *_: Any) -> None:  # noqa: ANN401 - what a hook is given
    waiting.pop(name, None)
