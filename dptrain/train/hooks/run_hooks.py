"""What is called beside the steps of a run: the user's hook, the average of the weights, early stopping."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.optim import Optimizer

from dptrain.config.filled_in import given
from dptrain.config.train_config import TrainConfig
from dptrain.observe import PendingSum
from dptrain.tasks import Task
from dptrain.tasks.base import Hooks, Moment, TrainHook
from dptrain.train.execution.master_weights import MasterWeights
from dptrain.train.hooks.early_stopping import EarlyStopping
from dptrain.train.hooks.sparse_training import SparseTraining
from dptrain.train.hooks.weight_average import WeightAverage


def build_hooks(
    config: TrainConfig, task: Task, *, model: nn.Module, optimizer: Optimizer, masters: MasterWeights | None = None
) -> tuple[TrainHook, WeightAverage | None]:
    """Return all hooks as one, and the average of the weights where the settings ask for it.

    Args:
        config: filled in.
        task: may have a hook.
        model: not wrapped, on its device; the meter is not on it yet, so that it sees what hooks leave of gradients.
        optimizer: of the model's parameters.
        masters: float32 copies of the model's parameters, where the optimizer moves those.
    """
    sparse = None
    if config.sparsity.method != "off":  # before the average, which begins with the sparse weights
        length = given(config.max_samples)
        sparse = SparseTraining(config.sparsity, model, optimizer=optimizer, max_samples=length, seed=config.seed)
    average = None
    if config.optimizer.average_decay is not None:
        batch = given(config.optimizer.reference_batch_size)
        decay = config.optimizer.average_decay
        average = WeightAverage(model, decay=decay, reference_batch_size=batch, masters=masters)
    stopping = None if config.early_stopping.patience is None else EarlyStopping(config.early_stopping)
    # Masks first: the task's hook and the average see the weights that the next step trains.
    return Hooks([hook for hook in (sparse, task.hook, average, stopping) if hook is not None]), average


def wants_end(hook: TrainHook, moment: Moment, figures: Mapping[str, float], *, device: torch.device) -> bool:
    """Tell a hook of an evaluation, and return whether it asks for the end on any replica. A collective; waits.

    Asked of all, because one replica that went on alone would wait for the others for ever.
    """
    vote = torch.tensor([float(hook.on_evaluation(moment, figures))], dtype=torch.float64, device=device)
    return PendingSum(vote).read()[0] > 0
