"""What the trainer needs to know of a problem: its model, its samples, its loss; no problem lives here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset, IterableDataset

from dptrain.data import SampleStream
from dptrain.data.iterable import StreamedSamples
from dptrain.data.weighted import WeightedStream
from dptrain.error_text import shown
from dptrain.errors import TaskError

Batch = Any
"""One collated micro-batch: a tensor, or a tuple, list or dict of tensors, first dimension = samples."""

Loss = Tensor | Mapping[str, Tensor]
"""A scalar, the **mean** over the micro-batch's samples of the loss per sample; or a mapping of such means by name, of
which `loss` is minimised and the others are logged beside it, as means over all samples of a step."""

LossFunction = Callable[[nn.Module, Batch], Loss]
"""(model, micro-batch) → its loss."""

OutputsFunction = Callable[[nn.Module, Batch], tuple[Loss, tuple[Tensor, ...]]]
"""(model, held-out batch) → its loss, and what each metric's `update` is given."""

ParameterGroups = Callable[[nn.Module], Iterable[Mapping[str, Any]]]
"""model → groups for the optimizer: `params`, and options. A group's `lr` stands in place of the run's, and follows the
schedule and the batch as that does; `optimizer` names another class for the group."""


@dataclass(frozen=True, kw_only=True)
class Moment:
    """Where a run is; the same on all replicas.

    Attributes:
        step: optimizer steps taken.
        samples_seen: training samples seen.
        global_batch_size: samples in the latest step.
        model: not wrapped; reading its parameters is allowed, changing them is not.
    """

    step: int
    samples_seen: int
    global_batch_size: int
    model: nn.Module


class TrainHook:
    """Receives steps, evaluations and saves. Derive from it and override what is needed; all of it runs on all ranks.

    It must do the same on each rank. What it remembers goes through `state_dict`, or a resumed run lacks it.
    """

    def on_step(self, moment: Moment) -> None:
        """After an optimizer step was handed to the device. Reading a tensor's value here makes the host wait."""

    def on_evaluation(self, moment: Moment, figures: Mapping[str, float]) -> bool:  # noqa: ARG002 - overridden
        """After an evaluation, with its figures by name (`loss`, …). Return True to end the run here, as at its end."""
        return False

    def on_save(self, moment: Moment) -> None:
        """Before a checkpoint is packed, on rank 0 alone where it is an intermediate one."""

    def state_dict(self) -> Mapping[str, Any]:
        """Return what a checkpoint shall hold of it: numbers, texts, lists and dicts of them."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`."""

    def tensors(self) -> Mapping[str, Tensor]:
        """Return the tensors that a checkpoint shall hold of it; they may share memory with what it works on."""
        return {}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from `tensors`, once parameters are those of the checkpoint; from none, where it holds none of it."""


class Hooks(TrainHook):
    """Several hooks as one, called in their order.

    Args:
        members: may be none.
    """

    def __init__(self, members: Sequence[TrainHook]) -> None:
        self._members = tuple(members)

    def on_step(self, moment: Moment) -> None:
        """Call each."""
        for member in self._members:
            member.on_step(moment)

    def on_evaluation(self, moment: Moment, figures: Mapping[str, float]) -> bool:
        """Call each, and return whether any wants to end the run."""
        wishes = [bool(member.on_evaluation(moment, figures)) for member in self._members]
        return any(wishes)

    def on_save(self, moment: Moment) -> None:
        """Call each."""
        for member in self._members:
            member.on_save(moment)

    def state_dict(self) -> Mapping[str, Any]:
        """Return the states, each under its member's name."""
        return {name: member.state_dict() for name, member in self._named()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Give each its own; one that a checkpoint does not know begins anew."""
        known = _named_by_class(state)
        for name, member in self._named():
            if name in known:
                member.load_state_dict(known[name])

    def tensors(self) -> Mapping[str, Tensor]:
        """Return the tensors of all, each under its member's name."""
        return {
            f"{prefix}/{name}": value for prefix, member in self._named() for name, value in member.tensors().items()
        }

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Give each its own."""
        for prefix, member in self._named():
            start = f"{prefix}/"
            member.load_tensors(
                {name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)}
            )

    def _named(self) -> list[tuple[str, TrainHook]]:
        """Return the members by class, and by their number among those of a class: one that joins moves no other."""
        kinds = [type(member).__name__ for member in self._members]
        return [(f"{kind}-{kinds[:at].count(kind)}", self._members[at]) for at, kind in enumerate(kinds)]


def _named_by_class(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the states of hooks by class and number; older checkpoints have them by place and class, as 1/Average."""
    named: dict[str, Any] = {}
    numbers: dict[str, int] = {}
    for key, value in state.items():
        place, _, kind = key.partition("/")
        if not (kind and place.isdecimal()):
            named[key] = value
            continue
        number = numbers[kind] = numbers.get(kind, -1) + 1
        named[f"{kind}-{number}"] = value
    return named


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
        digests: of what else decides about a step and is in no checkpoint, such as a teacher's weights, by its name in
            an error; the replicas must agree on them, and a run goes on with the same ones only.
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
    digests: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.train_data, IterableDataset):
            object.__setattr__(self, "train_data", StreamedSamples(self.train_data))

    def order(self, *, seed: int) -> SampleStream:
        """Return the order of the training samples: shuffled, by weight, or that of an iterable."""
        if isinstance(self.train_data, StreamedSamples):
            return SampleStream(len(self.train_data), seed=seed, shuffle=False)
        if self.sample_weights is not None:
            return WeightedStream(self.sample_weights, seed=seed)
        return SampleStream(len(self.train_data), seed=seed)  # type: ignore[arg-type] # torch's Dataset declares none

    @property
    def eval_sets(self) -> Mapping[str, Dataset[Any]]:
        """The held-out sets by name; a single one has the name ""."""
        if self.eval_data is None:
            return {}
        return self.eval_data if isinstance(self.eval_data, Mapping) else {"": self.eval_data}


def split_loss(loss: Loss) -> tuple[Tensor, Mapping[str, Tensor]]:
    """Return what is minimised, and the parts beside it.

    Raises:
        TaskError: where it is no loss; a task that was checked may still return something else for a later micro-batch.
    """
    if isinstance(loss, Tensor):
        return loss, {}
    values = (loss.get("loss"), *loss.values()) if isinstance(loss, Mapping) else (None,)
    if not isinstance(loss, Mapping) or not all(isinstance(value, Tensor) for value in values):
        raise TaskError(f"the loss must return a scalar tensor, or a mapping with one named 'loss', got {shown(loss)}")
    return loss["loss"], {name: value for name, value in loss.items() if name != "loss"}


def split_training_loss(loss: Loss) -> tuple[Tensor, Mapping[str, Tensor]]:
    """Return the same of a loss that is to be minimised.

    Raises:
        TaskError: where it is no number, or has no graph.
    """
    total, parts = split_loss(loss)
    for name, value in (("the loss", total), *parts.items()):
        if value.shape != () or not value.is_floating_point():
            got = f"{tuple(value.shape)} of {value.dtype}"
            raise TaskError(f"{name} must be one floating-point number for each micro-batch, got the shape {got}")
    if not total.requires_grad:
        raise TaskError("the loss returned no graph: is there a .detach(), .item() or no_grad in it?")
    return total, parts


def loss_and_accuracy(logits: Tensor, classes: Tensor) -> dict[str, Tensor]:
    """Return the mean cross-entropy of a classifier in nats, and the part of the samples that it has right."""
    loss = functional.cross_entropy(logits, classes)
    return {"loss": loss, "accuracy": (logits.argmax(-1) == classes).to(loss.dtype).mean()}
