"""What the trainer needs to know of a problem: its model, its samples, its loss; no problem lives here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils.data import Dataset

Batch = Any
"""One collated micro-batch: a tensor, or a tuple, list or dict of tensors, first dimension = samples."""

LossFunction = Callable[[nn.Module, Batch], Tensor]
"""(model, micro-batch) → scalar: the **mean** over the micro-batch's samples of the loss per sample."""


@dataclass(frozen=True, kw_only=True)
class Suggestion:
    """Settings under which a task is known to train; the trainer uses each one that its user did not set.

    Attributes:
        learning_rate: at `global_batch_size`, for the trainer's default optimizer.
        global_batch_size: samples per optimizer step to start from.
        micro_batch_size: samples in one forward–backward on one replica.
        max_samples: length of a run, in samples.
        eval_every_samples: how often the held-out loss is worth its cost, in samples.
    """

    learning_rate: float
    global_batch_size: int
    micro_batch_size: int
    max_samples: int
    eval_every_samples: int


@dataclass(frozen=True, kw_only=True)
class Task:
    """A problem that is ready to train.

    Attributes:
        name: short name, used for the run folder.
        model: the model, on CPU, initialised. The trainer seeds torch before it calls the function that
            builds the task, so a plain construction is reproducible.
        train_data: map-style dataset with a length of at least 2; the trainer decides the order.
        eval_data: map-style dataset for the held-out loss, or None for no evaluation.
        loss: the mean loss per sample of one micro-batch, as a scalar with a graph.
        suggestion: settings known to work.
        eval_metrics: further figures computed from the mean held-out loss, by name
            (such as bits per byte from nats per byte).
        collate: samples → micro-batch, or None for torch's default.
    """

    name: str
    model: nn.Module
    train_data: Dataset[Any]
    loss: LossFunction
    suggestion: Suggestion
    eval_data: Dataset[Any] | None = None
    eval_metrics: Mapping[str, Callable[[float], float]] = field(default_factory=dict)
    collate: Callable[[list[Any]], Batch] | None = None
