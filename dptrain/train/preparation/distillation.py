"""A task's loss with a teacher in it: part of it is how far the model's prediction is from the teacher's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import default_collate

from dptrain.data.source import random_state_kept
from dptrain.errors import ConfigError, TaskError
from dptrain.tasks.base import Batch, Loss, LossFunction, Task, split_loss
from dptrain.tasks.check import reported
from dptrain.train.preparation.hidden_states import HiddenStates, captured


class DistilledLoss:
    """(1 − weight) × the task's loss + weight × T² × KL(teacher ‖ model), both predictions at temperature T.

    With hidden states, their distance times its own weight is added. Where the task's loss has a part `cross_entropy`,
    that alone is weighted by 1 − weight; the rest of it, such as the balance loss of experts, stays as it is.

    Hinton et al. 2015 (arXiv 1503.02531), section 2. The divergence is a mean over the samples of its mean over the
    places of a sample, so the loss stays a mean over samples and the noise scale keeps its meaning. Whatever the task's
    loss calls the model with, the teacher is called with too; it never draws a random number.

    Args:
        loss: the task's.
        teacher: in eval mode, without gradients; it is moved to where the model's outputs are.
        temperature: T, above 0.
        weight: of the divergence, in (0, 1].
        hidden: states that are compared beside the logits.
    """

    def __init__(
        self,
        loss: LossFunction,
        teacher: nn.Module,
        *,
        temperature: float,
        weight: float,
        hidden: HiddenStates | None = None,
    ) -> None:
        self.__wrapped__ = loss  # what `inspect.unwrap` and the digest of a task's source look for
        self._loss = loss
        self._teacher = teacher
        self._temperature = temperature
        self._weight = weight
        self._hidden = hidden

    def __call__(self, model: nn.Module, batch: Batch) -> Loss:
        """Return the loss of a micro-batch, with a graph through the model alone."""
        hidden, seen = self._hidden, _SeenModel(model)
        with captured(model, hidden.of_model if hidden else ()) as states:
            found = self._loss(seen, batch)  # type: ignore[arg-type] # it passes for the model
        if not seen.calls:
            return found  # the check of the task says that its loss calls no model
        if len(seen.calls) > 1:
            raise TaskError(
                f"the loss of the task calls the model {len(seen.calls)} times for one micro-batch: which prediction "
                f"the teacher is to be compared with is not known"
            )
        args, kwargs, output = seen.calls[0]
        logits = _logits(output, of="model")
        self._teacher.to(logits.device)
        with (
            reported("the teacher does not run on what the task calls its model with"),
            torch.no_grad(),
            captured(self._teacher, hidden.of_teacher if hidden else ()) as taught_states,
        ):
            taught = _logits(self._teacher(*args, **kwargs), of="teacher")
        if taught.shape != logits.shape:
            raise ConfigError(
                f"the teacher's outputs have shape {tuple(taught.shape)} and the model's {tuple(logits.shape)}: both "
                f"must predict the same classes or tokens at the same places"
            )
        loss, parts = split_loss(found)
        mixed = (1 - self._weight) * loss + self._weight * divergence(logits, taught, temperature=self._temperature)
        own = parts.get("cross_entropy")
        if own is not None and own.requires_grad == loss.requires_grad:
            # The divergence takes the place of the cross-entropy alone: at a weight of 1 a router of experts would have
            # no balance loss. A detached part is for the log, and its gradient could not be told from the rest.
            mixed = mixed + self._weight * (loss - own)
        if hidden:
            mixed = mixed + hidden.weight * hidden.distance(states, taught_states)
        return {"loss": mixed, **parts} if parts else mixed


def divergence(logits: Tensor, taught: Tensor, *, temperature: float) -> Tensor:
    """Return T² × the mean over all places of KL(teacher ‖ model), in nats.

    Args:
        logits: of the model, shape (samples, …, classes).
        taught: of the teacher, the same shape.
        temperature: T.
    """
    own = functional.log_softmax(logits.float() / temperature, dim=-1)
    target = functional.log_softmax(taught.float() / temperature, dim=-1)
    return temperature**2 * functional.kl_div(own, target, reduction="none", log_target=True).sum(-1).mean()


def check_logits(task: Task) -> None:
    """Refuse a task whose outputs are no logits: a softmax of them would mean nothing, and nothing would show it.

    A loss of logits stays the same where one number is added to all of them; two samples are tried, in eval mode.

    Raises:
        ConfigError: where it does not.
    """
    with random_state_kept(), torch.no_grad():
        batch = (task.collate or default_collate)([task.train_data[index] for index in range(2)])
        was_training = task.model.training
        task.model.eval()
        try:
            plain, _ = split_loss(task.loss(task.model, batch))
            with reported(
                "a teacher needs a model that returns logits, and the loss fails on outputs to which 1 is added"
            ):
                moved, _ = split_loss(task.loss(_SeenModel(task.model, shift=1.0), batch))  # type: ignore[arg-type]
        finally:
            task.model.train(was_training)
    if not torch.allclose(plain, moved, rtol=1e-4, atol=1e-5):
        raise ConfigError(
            f"a teacher is for models that predict classes or tokens, but the loss of task {task.name!r} goes from "
            f"{float(plain):.4g} to {float(moved):.4g} where 1 is added to all outputs, so they are no logits"
        )


class _SeenModel:
    """Stands for a model in a loss, and keeps what it is called with and what it returns.

    Args:
        model: the model.
        shift: is added to the logits.
    """

    def __init__(self, model: nn.Module, *, shift: float = 0.0) -> None:
        self._model = model
        self._shift = shift
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any], Any]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - the model's own
        output = self._model(*args, **kwargs)
        if self._shift:
            output = _shifted(output, self._shift)
        self.calls.append((args, kwargs, output))
        return output

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - the model's own
        return getattr(self._model, name)


def _logits(output: Any, *, of: str) -> Tensor:  # noqa: ANN401 - whatever a model returns
    """Return the logits among a model's outputs: the tensor itself, `.logits`, or the first of several."""
    found = output
    if isinstance(output, Mapping):
        found = output.get("logits")
    elif isinstance(output, (tuple, list)):
        found = output[0]
    elif not isinstance(output, Tensor):
        found = getattr(output, "logits", None)
    if not isinstance(found, Tensor) or found.dim() < 2 or not found.is_floating_point():  # noqa: PLR2004 - samples and classes
        raise ConfigError(
            f"the {of} returns {type(output).__name__} without logits of shape (samples, …, classes): a teacher needs "
            f"a model that returns them, alone, first in a tuple, or as .logits"
        )
    return found


def _shifted(output: Any, shift: float) -> Any:  # noqa: ANN401 - whatever a model returns
    _logits(output, of="model")
    if isinstance(output, Tensor):
        return output + shift
    if isinstance(output, Mapping):  # a ModelOutput of transformers is one, and an OrderedDict
        output["logits"] = output["logits"] + shift  # type: ignore[index]
        return output
    if hasattr(output, "_fields"):  # a NamedTuple, whose class takes values one by one
        return output._replace(**{output._fields[0]: output[0] + shift})
    if isinstance(output, (tuple, list)):
        return type(output)((output[0] + shift, *output[1:]))
    if is_dataclass(output) and not isinstance(output, type):  # it may be frozen
        return replace(output, logits=output.logits + shift)  # type: ignore[attr-defined]
    output.logits = output.logits + shift
    return output
