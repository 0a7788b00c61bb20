"""Task functions that the timed runs train: built-in tasks, small enough for hundreds of trainings."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

from torch import nn
from torch.utils.data import Subset

from dptrain.tasks import Task
from dptrain.tasks.digits import digits
from dptrain.tasks.pysource import pysource

_NUM_HELD_OUT = 512
_LAYERS = (64, 96, 48, 8, 48, 96, 64)


def small_pysource() -> Task:
    """Return `pysource` with a model of 30,000 parameters, 16 bytes of context and 512 held-out windows."""
    task = pysource(context=16, width=32, depth=1, heads=2)
    held_out = task.eval_sets[""]
    num_windows = len(held_out)  # type: ignore[arg-type]
    return replace(task, eval_data=Subset(held_out, range(0, num_windows, max(1, num_windows // _NUM_HELD_OUT))))


def deep_digits() -> Task:
    """Return `digits` with an autoencoder of layers 64-96-48-8-48-96-64, which takes any batch many steps.

    With tanh, because with ReLU seeds differ by several times as much.
    """
    layers: list[nn.Module] = []
    for before, after in pairwise(_LAYERS):
        layers += [nn.Linear(before, after), nn.Tanh()]
    narrowest = 2 * _LAYERS.index(min(_LAYERS)) - 1
    del layers[-1], layers[narrowest]  # neither the code nor the pixels are cut off at 0
    return replace(digits(model="autoencoder"), model=nn.Sequential(*layers))
