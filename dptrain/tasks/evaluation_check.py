"""A dry run of a task's evaluation: two held-out samples through loss and metrics, before anything is trained."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate

from dptrain.errors import TaskError
from dptrain.tasks.base import Task
from dptrain.tasks.resolve import random_state_kept, reported

_NUM_SAMPLES = 2


def check_evaluation(task: Task) -> None:
    """Evaluate a copy of the model on the first two held-out samples, on the CPU, and call every metric.

    Without it, held-out data of the wrong type or a metric with the wrong arguments would end the run at its first
    evaluation, after the steps before it were paid for.

    Raises:
        TaskError: where a sample, the collation, the loss or a metric raises, or gives something else than a number.
    """
    if task.eval_data is None:
        return
    with random_state_kept(), torch.no_grad():
        num_samples = min(_NUM_SAMPLES, len(task.eval_data))  # type: ignore[arg-type]
        with reported(f"the first samples of eval_data of task {task.name!r} cannot be read"):
            samples = [task.eval_data[index] for index in range(num_samples)]
        with reported(f"the first samples of eval_data of task {task.name!r} do not make a batch"):
            batch = (task.collate or default_collate)(samples)
        with reported(f"the loss of task {task.name!r} does not run on the first samples of eval_data"):
            loss = task.loss(copy.deepcopy(task.model).eval(), batch)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise TaskError(f"the loss of task {task.name!r} must return one number for eval_data, got {got}")
    for name, metric in task.eval_metrics.items():
        _check_metric(name, metric, float(loss), task_name=task.name)


def _check_metric(name: str, metric: Any, loss: float, *, task_name: str) -> None:  # noqa: ANN401 - a user's function
    what = f"eval_metrics[{name!r}] of task {task_name!r}"
    with reported(f"{what} takes the mean held-out loss and returns a number, but it fails"):
        value = metric(loss)
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TaskError(f"{what} must return a number, got {type(value).__name__}")
