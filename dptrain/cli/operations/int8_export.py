"""The weights of a checkpoint in int8, and what that does to the held-out loss of the run's own task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dptrain.checkpoint.opened import Checkpoint
from dptrain.data.source import seed_everything
from dptrain.errors import ConfigError
from dptrain.models.int8 import as_int8, from_int8, int8_weights
from dptrain.tasks import Task
from dptrain.tasks.check import reported
from dptrain.train.evaluation import evaluate_task
from dptrain.train.preparation.saved_task import fill_model, saved_task


@dataclass(frozen=True, kw_only=True)
class Int8Export:
    """Weights in int8, and what was measured.

    Attributes:
        tensors: to write, by name.
        num_weights: how many of them are int8.
        size_bytes: of all numbers before and after.
        loss: held-out loss before and after; None where the task has no held-out data.
        quantize: number format that the run was trained in, whose own held-out figures are of that format.
    """

    tensors: dict[str, Tensor]
    num_weights: int
    size_bytes: tuple[int, int]
    loss: tuple[float, float] | None
    quantize: str | None

    def text(self) -> str:
        """Return it as lines for people."""
        size_before, size_after = self.size_bytes
        head = f"int8: {self.num_weights} weights, {size_before:,} → {size_after:,} bytes of numbers\n"
        if self.loss is None:
            return head + "held-out loss: not measured, since the task has no held-out data\n"
        before, after = self.loss
        kind = self.quantize
        how = f", in full precision (the run's own figures are of model.quantize={kind})" if kind else ""
        return head + f"held-out loss: {before:.6g} → {after:.6g} ({after - before:+.3g}){how}\n"


def in_int8(checkpoint: Checkpoint, weights: Mapping[str, Tensor]) -> Int8Export:
    """Return a model's weights in int8, and its held-out loss before and after.

    Both losses are computed on the CPU in the type that the task builds its model in, float32 as a rule: with the
    weights as they are, and with the products of int8 weights and their scales. It seeds the global generators, from
    which a task may draw what it holds out.

    Args:
        checkpoint: of the run whose settings name the task.
        weights: of its model, by name.

    Raises:
        ConfigError: where the task cannot be built, or there is nothing to round.
        TaskError: where the task cannot be evaluated.
    """
    settings: Any = checkpoint.state["config"]
    seed_everything(settings["seed"])
    task = saved_task(checkpoint, what="--int8 needs the task of the run:", tensors=weights, quantized=False)
    names = [name for name in int8_weights(task.model) if name in weights]
    if not names:
        raise ConfigError("the model has no linear or convolutional layers: export it without --int8")
    found = as_int8(weights, names)
    before = _loss(task, settings)
    fill_model(task.model, from_int8(found))
    after = _loss(task, settings)
    return Int8Export(
        tensors=found,
        num_weights=len(names),
        size_bytes=(_size_bytes(weights), _size_bytes(found)),
        loss=None if before is None or after is None else (before, after),
        quantize=settings.get("model", {}).get("quantize"),
    )


def _loss(task: Task, settings: Mapping[str, Any]) -> float | None:
    if not task.eval_sets:
        return None
    size = settings.get("micro_batch_size")
    with reported(f"the task {task.name!r} cannot be evaluated on its held-out data"):
        figures = evaluate_task(
            task,
            task.model,
            batch_size=size if isinstance(size, int) else task.suggestion.micro_batch_size,
            rank=0,
            world_size=1,
            device=torch.device("cpu"),
        )
    return figures["loss"]


def _size_bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
