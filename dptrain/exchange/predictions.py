"""Predictions of several replicas: recorded where a loss calls the model, averaged, and compared."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from dptrain.errors import TaskError

Predictions = Literal["outputs", "probabilities"]
"""What is averaged: what the model returns, or the softmax of it over the last dimension."""


class Recorder(nn.Module):
    """Calls a model, and keeps what it returned last.

    Args:
        model: not wrapped.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module = model
        self.output: Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401 - whatever the model takes
        """Return what the model returns.

        Raises:
            TaskError: where that is no tensor of predictions.
        """
        self.output = _checked(self.module(*args, **kwargs))
        return self.output


class AveragedPredictions(nn.Module):
    """Calls a model on all replicas at once, each with parameters of its own, and returns the mean prediction.

    Means of probabilities are returned as their logarithms, whose softmax they are: a loss of logits is right for them.

    Args:
        model: not wrapped.
        predictions: what is averaged.
        group: process group; None for the default one.
        num_replicas: in it.
    """

    def __init__(
        self, model: nn.Module, *, predictions: Predictions, group: dist.ProcessGroup | None, num_replicas: int
    ) -> None:
        super().__init__()
        self.module = model
        self._predictions = predictions
        self._group = group
        self._num_replicas = num_replicas

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401 - whatever the model takes
        """Return the mean over the replicas of what their models say of the same samples. A collective.

        Raises:
            TaskError: where the model returns no tensor of predictions.
        """
        output = _checked(self.module(*args, **kwargs)).detach()
        single = output.float() if output.element_size() < 4 else output  # noqa: PLR2004 - bytes of single precision
        mean = functional.softmax(single, -1) if self._predictions == "probabilities" else single.clone()
        dist.all_reduce(mean, group=self._group)
        mean /= self._num_replicas
        if self._predictions == "probabilities":
            mean = mean.clamp_min(torch.finfo(mean.dtype).tiny).log()
        return mean.to(output.dtype)


def distance(output: Tensor, targets: Tensor, *, predictions: Predictions) -> Tensor:
    """Return how far predictions are from those of the other replicas; differentiable in the former.

    Args:
        output: of this replica, shape (…, classes) for probabilities.
        targets: of the others, shape (others, *output.shape).
        predictions: outputs: mean squared difference from the mean of the others; probabilities: the
            Kullback-Leibler divergence from the mean of their probabilities, in nats, a mean over the samples.
    """
    if predictions == "outputs":
        return functional.mse_loss(output, targets.mean(0).to(output.dtype))
    mean = functional.softmax(targets, -1).mean(0)
    logs = functional.log_softmax(output.to(mean.dtype), -1)
    entropy = torch.special.entr(mean).sum(-1).mean()
    divergence: Tensor = -(mean * logs).sum(-1).mean() - entropy
    return divergence


def _checked(output: object) -> Tensor:
    if not isinstance(output, Tensor) or not output.is_floating_point():
        raise TaskError(
            f"replicas can share predictions only where the model returns one tensor of floating-point numbers, and it "
            f"returns {type(output).__name__}: have the model's forward return its logits or outputs alone"
        )
    return output
