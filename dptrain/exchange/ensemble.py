"""Nothing: replicas train models of their own, whose predictions are averaged at evaluation."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch.distributed as dist
from torch import nn

from dptrain.exchange.base import Exchange
from dptrain.exchange.predictions import AveragedPredictions, Predictions


class Ensemble(Exchange):
    """Each replica is a member: it begins with parameters of its own, and trains on its own share of each batch.

    K members on N samples together take the compute of one model on N samples (Lakshminarayanan et al. 2017,
    arXiv 1612.01474, train each on all of them). One member is the single model.

    Args:
        predictions: what is averaged at evaluation.
        group: process group; None for the default one.
    """

    name: ClassVar[str] = "ensemble"
    parameters_are_equal: ClassVar[bool] = False
    begins_apart: ClassVar[bool] = True
    on_other_replicas: str | None = "each replica is a member with parameters of its own"
    no_noise_scale: str | None = (
        "each member has a gradient of its own, and no batch of all replicas together: measure one member in a run of "
        "its own, with exchange.kind=all_reduce"
    )

    def __init__(self, predictions: Predictions = "outputs", *, group: dist.ProcessGroup | None = None) -> None:
        super().__init__(group=group)
        self._predictions: Predictions = predictions

    def wrap(self, model: nn.Module, *, ignored_buffers: Collection[str] = (), **ddp: Any) -> nn.Module:  # noqa: ARG002, ANN401 - of DDP
        """Return the model itself, with its own parameters."""
        self._model = model
        return self._without_noise_scale(model)

    @property
    def may_differ(self) -> bool:
        """Whether there is another member."""
        return self.num_replicas > 1

    @contextmanager
    def evaluating(self, model: nn.Module) -> Iterator[tuple[nn.Module, bool]]:
        """Give the ensemble: all members predict each sample."""
        if self.num_replicas == 1:
            yield model, False
            return
        yield (
            AveragedPredictions(model, predictions=self._predictions, group=self.group, num_replicas=self.num_replicas),
            True,
        )

    def bytes_per_step(self) -> float:
        """Return 0."""
        return 0.0
