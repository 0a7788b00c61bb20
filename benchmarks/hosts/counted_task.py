"""A task that counts: its parameters say how often each sample was trained."""

from __future__ import annotations

import os
import time

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from dptrain.tasks import Suggestion, Task

NUM_SAMPLES = 400_000
LEARNING_RATE = 1.0
SHIFT = "DPTRAIN_BENCHMARK_SHIFT"
"""The variable that makes it another data set."""

_PACE_S = 0.05


class Numbered(Dataset[tuple[Tensor, int]]):
    """Noise, and the number of each sample; with `shift` it is another data set."""

    def __init__(self, shift: float) -> None:
        self._targets = torch.randn(NUM_SAMPLES, generator=torch.Generator().manual_seed(1)) + shift

    def __len__(self) -> int:
        return NUM_SAMPLES

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._targets[index], index


class Counted(nn.Module):
    """A mean to learn, and a count for each sample, which its gradient moves by one for each time it is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(()))
        self.count = nn.Parameter(torch.zeros(NUM_SAMPLES))

    def forward(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean, and the counts of some samples."""
        return self.mean, self.count[numbers]


def counted_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return a loss whose gradient for each sample's count is minus one over the batch."""
    time.sleep(_PACE_S)
    targets, numbers = batch
    mean, counts = model(numbers)
    return torch.as_tensor(0.01 * ((mean - targets) ** 2).mean() - counts.mean())


def task() -> Task:
    """Build the task."""
    shift = float(os.environ.get(SHIFT, "0"))
    return Task(
        name="counted",
        model=Counted(),
        train_data=Numbered(shift),
        loss=counted_loss,
        suggestion=Suggestion(
            learning_rate=LEARNING_RATE,
            global_batch_size=12,
            micro_batch_size=4,
            max_samples=NUM_SAMPLES,
            eval_every_samples=NUM_SAMPLES,
        ),
    )
