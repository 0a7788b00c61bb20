"""Tasks of dptrain as problems of the atlas: a plain loop, with the meter attached where noise is to be seen."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import default_collate

import dptrain
from benchmarks.prediction.problem import Problem
from dptrain.noise import SquaredNorms
from dptrain.observe import Meter
from dptrain.tasks import Task, resolve_task
from dptrain.tasks.base import split_loss


@dataclass(frozen=True, kw_only=True, eq=False)
class Network(Problem):
    """A task of dptrain, its batches drawn with replacement from its training samples.

    Attributes:
        task: name of the task.
        options: of the task.
        num_eval: training samples, chosen once, whose mean loss is compared with the targets.
    """

    kind: str = "supervised"
    task: str
    options: Mapping[str, Any] = field(default_factory=dict)
    num_eval: int = 512

    def learner(self, *, batch_size: int, rate: float, seed: int, num_parts: int | None = None) -> NetworkLearner:
        """Return a fresh run."""
        task = self._built(seed)
        model = copy.deepcopy(task.model).train()
        return NetworkLearner(
            task,
            model=model,
            samples=self._samples,
            num_eval=self.num_eval,
            optimizer=make_optimizer(self.optimizer, model, rate=rate),
            batch_size=batch_size,
            seed=seed,
            num_parts=num_parts,
        )

    @functools.cached_property
    def _samples(self) -> tuple[Tensor, ...]:
        """All training samples as one batch."""
        data: Any = self._built(0).train_data
        batch = default_collate([data[index] for index in range(len(data))])
        return (batch,) if isinstance(batch, Tensor) else tuple(batch)

    @functools.cache  # noqa: B019 - problems live as long as the process
    def _built(self, seed: int) -> Task:
        torch.manual_seed(seed)
        return resolve_task(self.task, options=self.options)


def make_optimizer(name: str, model: nn.Module, *, rate: float) -> Optimizer:
    """Return SGD or Adam with torch's own settings beside the learning rate."""
    kind = torch.optim.SGD if name == "SGD" else torch.optim.Adam
    return kind(model.parameters(), lr=rate)


class NetworkLearner:
    """One run of a task.

    Args:
        task: whose loss is minimised.
        model: to be trained.
        samples: all training samples as one batch.
        num_eval: how many of them are looked at for `loss`.
        optimizer: of the model.
        batch_size: samples in a step.
        seed: of the draws.
        num_parts: micro-batches in a step, or None for a run whose noise nobody looks at.
    """

    def __init__(
        self,
        task: Task,
        *,
        model: nn.Module,
        samples: tuple[Tensor, ...],
        num_eval: int,
        optimizer: Optimizer,
        batch_size: int,
        seed: int,
        num_parts: int | None,
    ) -> None:
        self._task = task
        self._model = model
        self._samples = samples
        self._optimizer = optimizer
        self._batch_size = batch_size
        self._num_parts = num_parts or 1
        self._meter = dptrain.attach(model, every=1) if num_parts else None
        self._generator = torch.Generator().manual_seed(seed)
        # The same ones in all runs.
        self._looked_at = torch.randperm(len(samples[0]), generator=torch.Generator().manual_seed(0))[:num_eval]

    def step(self) -> SquaredNorms | None:
        """Take a step along the mean gradient of samples drawn with replacement."""
        indices = torch.randint(len(self._samples[0]), (self._batch_size,), generator=self._generator)
        self._optimizer.zero_grad()
        for part in indices.chunk(self._num_parts):
            (self._mean_loss(part) / self._num_parts).backward()  # type: ignore[no-untyped-call] # torch's own
        seen = read_norms(self._meter)
        self._optimizer.step()
        return seen

    def loss(self) -> float:
        """Return the mean loss of the samples that are looked at."""
        with torch.no_grad():
            found = self._mean_loss(self._looked_at).item()
        return found if math.isfinite(found) else math.inf

    def _mean_loss(self, indices: Tensor) -> Tensor:
        batch = tuple(tensor[indices] for tensor in self._samples)
        loss, _ = split_loss(self._task.loss(self._model, batch if len(batch) > 1 else batch[0]))
        return loss


def read_norms(meter: Meter | None) -> SquaredNorms | None:
    """Close the step of `meter` and return what it saw; None without a meter."""
    return None if meter is None else meter.absorb(meter.local_sums().tolist())
