"""The smallest task that trains, with what a test changes in it."""

from __future__ import annotations

import torch
from torch import nn

from dptrain.tasks import Suggestion, Task

SUGGESTION = Suggestion(
    learning_rate=0.1, global_batch_size=4, micro_batch_size=2, max_samples=100, eval_every_samples=50
)


def small_task(**changes):
    parts = {
        "name": "small",
        "model": nn.Linear(2, 1),
        "train_data": [torch.ones(2), torch.zeros(2)],
        "loss": lambda model, batch: model(batch).mean(),
        "suggestion": SUGGESTION,
    }
    return Task(**(parts | changes))
