"""A dry run of a task's evaluation: two held-out samples of each set through loss and metrics, before training."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

from dptrain.data.source import random_state_kept, state_beside_torch
from dptrain.errors import TaskError
from dptrain.tasks.base import Batch, Task, split_loss
from dptrain.tasks.check import refuse_coroutine, reported

_NUM_SAMPLES = 2


def check_evaluation(task: Task) -> None:
    """Evaluate a copy of the model on the first two samples of each held-out set, on the CPU, and call every metric.

    Without it, held-out data of the wrong type or a metric with the wrong arguments would end the run at its first
    evaluation, after the steps before it were paid for.

    Raises:
        TaskError: where a sample, the collation, the loss or a metric raises, or gives something else than a number.
    """
    for key, data in task.eval_sets.items():
        with random_state_kept(), torch.no_grad():
            loss = _dry_run(task, data, what=f"eval_data{f'[{key!r}]' if key else ''}")
        for name, metric in task.eval_metrics.items():
            _check_metric(name, metric, loss, task_name=task.name)


def _dry_run(task: Task, data: Dataset[Any], *, what: str) -> float:
    """Return the loss of the first samples; the metrics of torchmetrics are updated in copies."""
    with reported(f"the first samples of {what} of task {task.name!r} cannot be read"):
        num_samples = min(_NUM_SAMPLES, len(data))  # type: ignore[arg-type]
        samples: list[Any] = []
        for index in range(num_samples):
            samples.append(data[index])
            refuse_coroutine(samples[-1], f"sample {index} of {what} of task {task.name!r}")
    with reported(f"the first samples of {what} of task {task.name!r} do not make a batch"):
        batch = (task.collate or default_collate)(samples)
    model = copy.deepcopy(task.model).eval()
    state, beside = torch.get_rng_state(), state_beside_torch()
    with reported(f"the loss of task {task.name!r} does not run on the first samples of {what}"):
        found, outputs = held_out_loss(task, model, batch)
        refuse_coroutine(found, f"what the loss of task {task.name!r} returns for {what}")
        loss, parts = split_loss(found)
    if any(module.training for module in model.modules()):
        raise TaskError(
            f"the loss of task {task.name!r} puts the model into training mode, also where held-out data is evaluated: "
            "dropout would act there, and batch norms would learn from it; leave out .train(), which the trainer calls"
        )
    for name, value in {"loss": loss, **parts}.items():
        if not isinstance(value, Tensor) or value.numel() != 1:
            got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            part = "" if name == "loss" else f" as part {name!r}"
            raise TaskError(f"the loss of task {task.name!r} must return one number{part} for {what}, got {got}")
    is_first = not dist.is_initialized() or dist.get_rank() == 0  # one of all replicas says so
    if is_first and (not torch.equal(torch.get_rng_state(), state) or beside != state_beside_torch()):
        warnings.warn(
            f"the loss of task {task.name!r} draws random numbers for {what}, so that held-out figures differ from one "
            "evaluation to the next: dropout must depend on the mode, as functional.dropout(x, training=self.training)",
            stacklevel=1,
        )
    for name, metric in task.metrics.items():
        with reported(f"metrics[{name!r}] of task {task.name!r} does not take what `outputs` gives"):
            copy.deepcopy(metric).update(*outputs)
    return float(loss)


def held_out_loss(task: Task, model: nn.Module, batch: Batch) -> tuple[Any, tuple[Tensor, ...]]:
    """Return the loss of a held-out batch, and what metrics are updated with."""
    if task.metrics and task.outputs is not None:
        return task.outputs(model, batch)
    return (task.eval_loss or task.loss)(model, batch), ()


def _check_metric(name: str, metric: Any, loss: float, *, task_name: str) -> None:  # noqa: ANN401 - a user's function
    what = f"eval_metrics[{name!r}] of task {task_name!r}"
    with reported(f"{what} takes the mean held-out loss and returns a number, but it fails"):
        value = metric(loss)
    refuse_coroutine(value, f"what {what} returns")
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TaskError(f"{what} must return a number, got {type(value).__name__}")
