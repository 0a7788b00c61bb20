"""Task functions that the races train: built-in tasks with a held-out set that is cheap to look at often."""

from __future__ import annotations

from dataclasses import replace

from torch.utils.data import Subset

from dptrain.tasks import Task
from dptrain.tasks.pysource import pysource

_NUM_HELD_OUT = 512


def small_pysource() -> Task:
    """Return `pysource` with a model of 30,000 parameters, 16 bytes of context and 512 held-out windows."""
    task = pysource(context=16, width=32, depth=1, heads=2)
    assert task.eval_data is not None
    num_windows = len(task.eval_data)  # type: ignore[arg-type]
    return replace(task, eval_data=Subset(task.eval_data, range(0, num_windows, max(1, num_windows // _NUM_HELD_OUT))))
