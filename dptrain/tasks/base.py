"""What the trainer needs to know of a problem: its model, its samples, its loss; no problem lives here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from dptrain.tasks.hook import TrainHook

Batch = Any
"""One collated micro-batch: a tensor, or a tuple, list or dict of tensors, first dimension = samples."""

Loss = Tensor | Mapping[str, Tensor]
"""A scalar, the **mean** over the micro-batch's samples of the loss per sample; or a mapping of such means by name, of
which `loss` is minimised and the others are logged beside it."""

LossFunction = Callable[[nn.Module, Batch], Loss]
"""(model, micro-batch) → its loss."""

OutputsFunction = Callable[[nn.Module, Batch], tuple[Loss, tuple[Tensor, ...]]]
"""(model, held-out batch) → its loss, and what each metric's `update` is given."""

ParameterGroups = Callable[[nn.Module], Iterable[Mapping[str, Any]]]
"""model → groups for the optimizer: `params`, and options. A group's `lr` stands in place of the run's, and follows the
schedule and the batch as that does; `optimizer` names another class for the group."""


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
        train_data: map-style dataset with a length of at least 2, whose order the trainer decides; or an
            `IterableDataset`, which is read in its own order, see `dptrain.data.iterable`.
        eval_data: map-style dataset for the held-out loss; several by name, of which the first decides about early
            stopping; or None for no evaluation.
        loss: the mean loss per sample of one micro-batch, with a graph.
        suggestion: settings known to work.
        eval_loss: for held-out data, where it is another one, or has further parts such as an accuracy.
        eval_metrics: further figures computed from the mean held-out loss, by name
            (such as bits per byte from nats per byte).
        metrics: metrics of `torchmetrics` over all held-out samples, by name; they need `outputs`.
        outputs: for held-out data in place of the loss, where there are `metrics`.
        collate: samples → micro-batch, or None for torch's default.
        parameter_groups: groups for the optimizer, or None for matrices that decay and vectors that do not.
        sample_weights: how often each training sample is drawn, relative to the others, with replacement; None for
            each once in a pass.
        tokens_per_sample: length of a sample, where tokens are what its user counts in.
        hook: is called on steps, evaluations and saves.
    """

    name: str
    model: nn.Module
    train_data: Dataset[Any]
    loss: LossFunction
    suggestion: Suggestion
    eval_data: Dataset[Any] | Mapping[str, Dataset[Any]] | None = None
    eval_loss: LossFunction | None = None
    eval_metrics: Mapping[str, Callable[[float], float]] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    outputs: OutputsFunction | None = None
    collate: Callable[[list[Any]], Batch] | None = None
    parameter_groups: ParameterGroups | None = None
    sample_weights: Sequence[float] | Tensor | None = None
    tokens_per_sample: int | None = None
    hook: TrainHook | None = None

    @property
    def eval_sets(self) -> Mapping[str, Dataset[Any]]:
        """The held-out sets by name; a single one has the name ""."""
        if self.eval_data is None:
            return {}
        return self.eval_data if isinstance(self.eval_data, Mapping) else {"": self.eval_data}


def split_loss(loss: Loss) -> tuple[Tensor, Mapping[str, Tensor]]:
    """Return what is minimised, and the parts beside it."""
    if isinstance(loss, Tensor):
        return loss, {}
    return loss["loss"], {name: value for name, value in loss.items() if name != "loss"}


def loss_and_accuracy(logits: Tensor, classes: Tensor) -> dict[str, Tensor]:
    """Return the mean cross-entropy of a classifier in nats, and the part of the samples that it has right."""
    loss = functional.cross_entropy(logits, classes)
    return {"loss": loss, "accuracy": (logits.argmax(-1) == classes).to(loss.dtype).mean()}
